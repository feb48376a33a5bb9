"""What the CUDA operations of stored formats need of a device, asked in one place.

They read FP8 codes by the conversions of compute capability 9.0 and multiply pairs of BF16 numbers
as it does, and the largest programs hold 227 KB of shared memory. Earlier cards refuse the
instructions, consumer cards of later generations have less than half of that memory.

Paper: none (infrastructure).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from fathom.errors import ConfigError

CAPABILITY = (9, 0)
SHARED_BYTES = 227 * 1024  # that a program may ask for
DTYPE = torch.bfloat16  # with float32 activations tiles do not fit the shared memory
SCALED_CARDS = ((9, 0),)  # whose matrix library multiplies FP8 blocks with a scale each
SCALED_CUDA = (12, 9)  # the first of its versions that does
NEEDED = (
    f"an NVIDIA card of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later with "
    f"{SHARED_BYTES // 1024} KB of shared memory a program (H100, H200), Triton, and BF16 "
    "activations"
)


def named_device(device: str | torch.device) -> torch.device:
    """The device of this name. Raises ConfigError where torch knows none or it is not there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} names no device: cpu or cuda, for instance") from error
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"there is no device {found}: torch {torch.__version__} sees {count} CUDA devices; "
            "use cpu, or install a torch built for CUDA"
        )
    return found


def unfit(device: torch.device, dtype: torch.dtype = DTYPE) -> str | None:
    """Why the CUDA operations cannot run on a CUDA device in an arithmetic, or None."""
    if dtype != DTYPE:
        return f"activations are {dtype}, not {DTYPE}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, not for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    facts: Any = torch.cuda.get_device_properties(device)
    name, capability = facts.name, (facts.major, facts.minor)
    if capability < CAPABILITY:
        return f"{name} has compute capability {facts.major}.{facts.minor}"
    shared = facts.shared_memory_per_block_optin
    if shared < SHARED_BYTES:
        return f"{name} has {shared:,} bytes of shared memory for a program"
    return None


def multiplies_scaled_fp8(device: torch.device) -> bool:
    """Whether torch multiplies FP8 codes with scales of 1 x 128 and 128 x 128 on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in SCALED_CARDS:
        return False
    return _cuda_version() >= SCALED_CUDA


def _cuda_version() -> tuple[int, ...]:
    """The version of CUDA that torch is built for; () where it is not."""
    parts = (torch.version.cuda or "").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())
