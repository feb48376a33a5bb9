"""Compiled CPU kernels: batches of rows for the engine.

Paper: none (infrastructure).
"""

from fathom.kernels.numba import runner

__all__ = ["runner"]
