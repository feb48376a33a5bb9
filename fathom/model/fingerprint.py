"""A name for a model's weights, so that nothing stored with others is ever used.

Paper: none (infrastructure).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict

import torch

from fathom.model.stored import StoredModel
from fathom.model.transformer import Transformer

WHOLE = 2**16  # bytes: smaller parameters are hashed whole, of larger ones as many in samples
SAMPLES = 64
AT_ONCE = 2**22  # elements of a large one that are added up together


def fingerprint(model: Transformer | StoredModel, kind: str) -> bytes:
    """16 bytes that depend on configuration, arithmetic, `kind` and weights.

    Of a large parameter 64 evenly spread samples count, and its float64 sum: enough for any
    training step to change it, without reading 150 GB byte by byte.
    """
    digest = hashlib.blake2b(digest_size=16)
    about = (asdict(model.config), str(model.dtype), model.quantized, kind)
    digest.update(repr(about).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1)
        if flat.numel() * flat.element_size() > WHOLE:
            each = WHOLE // flat.element_size() // SAMPLES
            starts = torch.linspace(0, flat.numel() - each, SAMPLES).long().tolist()
            digest.update(str(_sum(flat)).encode())
            flat = torch.cat([flat[start : start + each] for start in starts])
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _sum(flat: torch.Tensor) -> float:
    """In float64, in parts: torch converts a whole tensor before it adds it up on a device."""
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for part in flat.split(AT_ONCE):
        total += part.sum(dtype=torch.float64)
    return total.item()
