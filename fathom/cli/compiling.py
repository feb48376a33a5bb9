"""Kernels compiled by processes side by side, before anything is measured.

They fill Triton's cache on disk. What goes wrong here goes wrong where it is measured, and is told
there; what is not done in time is compiled there too: nothing of this is waited for any longer.

Paper: none (measurement).
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from typing import Any

COMPILERS = 16  # processes at once
COMPILING = 60.0  # seconds until what is left is compiled where it is needed
SHOWN = 3  # errors


def compile_side_by_side(
    kernels: Collection[Any],
    lists: Mapping[str, Callable[[], set[Any]]],
    compile_kernel: Callable[[Any], None],
    tell: Callable[[str], None],
    seconds: float = COMPILING,
) -> None:
    """Run `compile_kernel` on `kernels`, and on those that `lists` give, each once.

    lists: by name, what is called in a process too. Everything must be fit for another process.
    Raises nothing: what went wrong, and how much is left after `seconds`, is told.
    """
    end, others = time.monotonic() + seconds, set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(COMPILERS, os.cpu_count() or 1), mp_context=spawn)
    compiled: dict[Any, Future[None]] = {}

    def submit(found: Collection[Any]) -> None:
        for kernel in set(found) - compiled.keys():
            compiled[kernel] = pool.submit(compile_kernel, kernel)

    late = True
    try:
        listed = {pool.submit(call): name for name, call in lists.items()}
        submit(kernels)
        for future in as_completed(listed, seconds):
            found = future.result()
            submit(found)
            tell(f"kernels: {listed[future]} launches {len(found)} of them")
        done, left = wait(compiled.values(), max(0.0, end - time.monotonic()))
        failed = [error for future in done if (error := future.exception()) is not None]
        tell(f"kernels: {len(done) - len(failed)} compiled, {len(left)} left")
        for error in failed[:SHOWN]:
            tell(f"kernels: {error}")
        late = bool(left)
    except Exception as error:
        tell(f"kernels: not compiled ahead: {error!r}")
    finally:
        if late:  # what hangs must not be waited for, nor compute beside what is measured
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
        pool.shutdown(cancel_futures=True)
