"""Compiled CPU kernels: one token through the blocks, and batches of rows for the engine.

Paper: none (infrastructure).
"""

from fathom.kernels.numba import runner, step

__all__ = ["runner", "step"]
