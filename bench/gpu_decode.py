"""Decode of V4-Flash layers on one GPU: python -m bench.gpu_decode OUT.json"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import torch

from fathom.eval import gpu_speed
from fathom.model import ModelConfig


def main() -> None:
    """Measure and print the tables."""
    full = ModelConfig.preset("flash")
    config = gpu_speed.three_layers(full)
    name = torch.cuda.get_device_name()
    rate = gpu_speed.copy_rate()
    flops = gpu_speed.matmul_rate()
    print(f"{name}: copy {rate / 1e12:.2f} TB/s, BF16 matmul {flops / 1e12:.0f} TFLOP/s", flush=True)
    layers = gpu_speed.stored_layers(config)
    rows = []
    with torch.inference_mode():
        for tokens, context in ((1, 4096), (1, 900_000), (1, 1_048_576), (16, 4096), (64, 4096)):
            if tokens * context > 2_000_000:
                continue
            for row in gpu_speed.layer_times(config, layers, tokens, context, rate):
                rows.append(asdict(row) | {"fraction": row.fraction})
                print(
                    f"{row.kind:4} tokens {row.tokens:3} context {row.context:8} "
                    f"{row.median:.3f} ms (least {row.least:.3f}) floor {row.floor:.3f} "
                    f"= {row.fraction:.0%} launches {row.launches}",
                    flush=True,
                )
        for context in (4096, 1_048_576):
            print(f"kernels, one token, context {context}")
            for key, count, micros in gpu_speed.profile_kernels(config, layers, 1, context)[:24]:
                print(f"  {micros:8.1f} us {count:3} x {key[:70]}", flush=True)
    with open(sys.argv[1], "w") as file:
        json.dump({"device": name, "copy": rate, "matmul": flops, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
