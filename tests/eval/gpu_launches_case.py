"""What the launches of one decode step are taken for, without a card: prints it as JSON.

Run by test_gpu_launches.py in a process of its own, whose Triton does not interpret.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from fathom.checkpoint.synthetic import synthetic_layer
from fathom.eval.gpu_launches import Model
from fathom.eval.gpu_speed import step_bytes, three_layers
from fathom.kernels import use_backend
from fathom.kernels.triton import step as _step
from fathom.kernels.triton.ahead import Zeroed, recorded
from fathom.model.config import ModelConfig
from fathom.model.stored import StoredLayer
from fathom.model.stored_cache import SLAB_TOKENS, StoredCache
from fathom.model.stored_forward import run_layers
from fathom.model.stored_work import Step
from tests.cli.pretended_gpu import CONFIG

CONTEXT = 8192


def main() -> None:
    config: ModelConfig = three_layers(CONFIG)
    layers = [
        StoredLayer.from_tensors(synthetic_layer(config, i, seed=1, device="cpu"), ratio)
        for i, ratio in enumerate(config.compress_ratios)
    ]
    ratios = [layer.ratio for layer in layers]
    cache = StoredCache.empty(config, ratios, 1, CONTEXT // SLAB_TOKENS, "cpu")
    head = torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
    model = Model.of(config, layers, cache, CONTEXT, head)
    with use_backend("triton"), Zeroed(), recorded() as launches:
        ids = torch.zeros(1, dtype=torch.int64)
        work = Step.create(config, cache, [CONTEXT - 1], ids, CONTEXT)
        streams = torch.zeros(1, config.hc_mult, config.hidden_size, dtype=torch.bfloat16)
        run_layers(config, layers, cache, work, streams).streams_now()
        _step.head_logits(torch.zeros(1, config.hidden_size), head)
    found = [model.launched(one.kernel, one.arguments, one.keywords) for one in launches]
    topk = config.num_experts_per_tok
    sys.stdout.write(
        json.dumps(
            {
                "launches": [asdict(one) for one in found],
                "bytes": [step_bytes(config, layer, 1, CONTEXT, topk) for layer in layers],
                "head": head.nbytes,
            }
        )
    )


if __name__ == "__main__":
    main()
