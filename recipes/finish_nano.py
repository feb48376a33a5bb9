"""From a finished run of `nano.toml` to the folder that is shipped.

    python recipes/finish_nano.py runs/nano fathom/assets/nano

Quantises the weights to the official mix (FP4 experts, FP8 matrices) and writes them in the
official layout with the tokenizer beside them.

Paper: none (recipe).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fathom.checkpoint import save_checkpoint
from fathom.model import ModelConfig, Transformer
from fathom.train.state import load_compact

TOKENIZER = Path(__file__).resolve().parent / "nano"


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of `fathom train recipes/nano.toml`")
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to")
    arguments = parser.parse_args()
    model = Transformer(ModelConfig.preset("nano"))
    load_compact(model, arguments.run / "weights.safetensors")
    save_checkpoint(model, arguments.out, expert_dtype="fp4", quantized=True)
    shutil.copy(TOKENIZER / "tokenizer.json", arguments.out)


if __name__ == "__main__":
    main()
