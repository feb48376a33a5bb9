"""Weights to begin with: an earlier nano under the tokenizer of `recipes/nano`.

    python recipes/retokenize_nano.py OLD_FOLDER runs/nano-init.safetensors

OLD_FOLDER is a checkpoint in the official layout with its tokenizer. A token of both vocabularies
keeps its rows of embedding and head and its experts of the hash layers; a new one gets the mean
rows of the old tokens that spell it, and the experts of the last. Everything else stays as it is.

Paper: none (recipe).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from fathom.chat import Tokenizer
from fathom.checkpoint import load_model
from fathom.model import Transformer
from fathom.train.state import export_compact

TOKENIZER = Path(__file__).resolve().parent / "nano"


def spelled(new: Tokenizer, old: Tokenizer) -> list[list[int]]:
    """For each id of `new`, the ids of `old` that spell it."""
    same = {old.token_bytes(i): i for i in range(old.vocab_size)}
    table = []
    for token in range(new.vocab_size):
        text = new.token_bytes(token)
        table.append([same[text]] if text in same else old.encode(text.decode("utf-8")))
    return table


def retokenize(model: Transformer, table: list[list[int]]) -> Transformer:
    """`model` for another vocabulary, given the old ids that spell each new token."""
    config = dataclasses.replace(model.config, vocab_size=len(table))
    out = Transformer(config, dtype=torch.float32)
    old = dict(model.named_parameters()) | dict(model.named_buffers())
    last = torch.tensor([ids[-1] for ids in table])
    with torch.no_grad():
        for name, to in [*out.named_parameters(), *out.named_buffers()]:
            source: Tensor = old[name]
            if name in ("embed.weight", "head.weight"):
                source = torch.stack([source[ids].float().mean(0) for ids in table])
            elif name.endswith("tid2eid"):
                source = source[last]
            to.copy_(source)
    return out


def main() -> None:
    """Read the arguments and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder of the earlier checkpoint")
    parser.add_argument("out", type=Path, help="weights to write: [model] init of a recipe")
    arguments = parser.parse_args()
    table = spelled(Tokenizer.load(TOKENIZER), Tokenizer.load(arguments.old))
    model = load_model(arguments.old, dtype=torch.float32, quantized=False)
    export_compact(retokenize(model, table), arguments.out)


if __name__ == "__main__":
    main()
