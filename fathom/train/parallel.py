"""Several processes train one model: each takes its part of every batch, gradients are averaged.

`torchrun` starts the processes, one for each GPU. Every process holds the whole model and makes the
same update; the first one decides when stages change and writes log, states and weights. Losses are
means over tokens, so each process scales its own by the share of all tokens that it holds: the
average of the gradients is then the gradient of one process with the whole batch.

Paper: none (plain data parallelism; the model is not split).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.errors import TrainError
from fathom.kernels.device import named_device
from fathom.train.muon import copy_each


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`; alone, every method returns what it is given.

    Each method must be called by all processes, in the same order.
    """

    rank: int = 0
    size: int = 1

    def decide(self, *values: float) -> list[float]:
        """The first process's values, for everyone; on the host, without waiting for a GPU."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes. tensor: [...] floating. Returns the same shape."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def share(self, amounts: Tensor) -> Tensor:
        """What to scale means over `amounts` by, so that their average is the mean over all.

        amounts: [entries] floating, how much each mean is over here. Returns [entries] float32.
        """
        amounts = amounts.detach().float()
        if self.size == 1:
            return torch.ones_like(amounts)
        return amounts * self.size / self.sum(amounts).clamp_min(1e-6)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its mean over all processes, in place, summed as float32.

        gradients: [...] floating, the same shapes and dtypes in every process.
        """
        if self.size == 1:
            return
        flat = torch.cat([g.reshape(-1).float() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([g.numel() for g in gradients])
        copy_each(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])

    def level(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values, in place: rounding must not add up.

        tensors: [...] any dtype, contiguous.
        """
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


ALONE = Ranks()


@contextlib.contextmanager
def joined(processes: int, device: str | None) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place among `processes` started by torchrun, and its device.

    Raises TrainError when the run was not started with that many processes, ConfigError when
    there is no such device.
    """
    # What torchrun sets; without it a process is alone.
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size != processes:
        raise TrainError(
            f"the recipe is for {processes} processes and {size} run: start it with "
            f"`torchrun --standalone --nproc-per-node {processes} -m fathom train ...`, or set "
            "another number with --processes"
        )
    where = named_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if size == 1:
        yield ALONE, where
        return
    if where.type == "cuda":
        # A launcher may also show each process a single GPU.
        number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        where = torch.device("cuda", number)
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    # Not after an error: it would wait for the others, who wait for this process. The launcher ends
    # them as soon as this one is gone.
    yield Ranks(rank, size), where
    dist.destroy_process_group()
