"""The same engine on a CUDA device, through the torch model."""

from __future__ import annotations

import pytest
import torch

from fathom.model import Transformer
from tests.engine.helpers import bits, engine, finish, greedy, model, prompt

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantized", [False, True])
def test_the_engine_runs_on_a_gpu(quantized: bool) -> None:
    there = model(quantized=quantized).cuda()
    here = model(quantized=quantized)
    found = []
    for net in (there, here):
        served = engine(net, checkpoint_spacing=256)
        runs = [served.submit(prompt(length, length), greedy(6)) for length in (300, 140, 20)]
        finish(served, *runs)
        again = served.submit([*runs[0].tokens, 5], greedy(6))
        finish(served, again)
        assert again.cached_tokens == 305
        found.append([bits(run) for run in (*runs, again)])
    if not quantized:  # a value on the edge between two codes may fall to either side
        for a, b in zip(*found, strict=True):
            assert [d.token for d in a] == [d.token for d in b]
            assert [d.logprob for d in a] == pytest.approx([d.logprob for d in b], abs=1e-3)


def test_bfloat16_and_drafts_on_a_gpu() -> None:
    plain = model(num_nextn_predict_layers=1)
    net = Transformer(plain.config, dtype=torch.bfloat16, quantized=True).cuda()
    net.load_state_dict(plain.state_dict())
    texts = []
    for drafts in (0, 2):
        served = engine(net.eval(), drafts=drafts, drafts_adaptive=False)
        request = served.submit(prompt(130), greedy(20))
        finish(served, request)
        texts.append([d.token for d in request.output])
        again = served.submit(prompt(130), greedy(2))
        finish(served, again)
        assert again.cached_tokens == 130
    assert len(texts[0]) == len(texts[1]) == 20
