"""A pass over the scores, the one thing that costs time: every backend does the same, one file each.

`chunked`    torch, a few thousand rows at a time in buffers that stay in cache; any device, any dtype
`compiled`   C, for CPU tensors, where a compiler is
`topk`       the last pass: the K best experts of each row and their weights
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sinkroute.transport.passes.chunked import ChunkedPass
from sinkroute.transport.passes.compiled import CompiledPass
from sinkroute.transport.problem import Problem

__all__ = ["Pass", "make_pass"]


class Pass(Protocol):
    """Passes over the rows of one problem that this process holds."""

    def column_sums(self, potentials_E: np.ndarray, reg: float, precision: float) -> np.ndarray:
        """(2, E) float64: Σ_i m_i p_ij and Σ_i m_i p_ij², with p_ij = softmax_j((C_ij + g_j) / reg).

        potentials_E: (E,) float64. `precision`: what an entry near its row's maximum may be off by, relatively: the
        shift is float32, off by about 1.2e-7 |C + g| / reg, where that is less, else float64, which takes longer.
        Exponentials are of the working dtype.
        NaN where a score is NaN or +inf, or a whole row −inf.
        """

    def column_ranks(self, ranks_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E,) float64 each: the mean of a column's finite costs, and its `ranks_E[j]`-th largest cost (from 1)."""


def make_pass(problem: Problem) -> Pass:
    """The fastest backend for the problem's scores."""
    if CompiledPass.serves(problem):
        return CompiledPass(problem)
    return ChunkedPass(problem)
