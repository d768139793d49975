"""A pass by the compiled kernels: float32, bfloat16 or float16 scores on a CPU, columns next to each other."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from sinkroute._values import address
from sinkroute.transport import native
from sinkroute.transport.problem import Problem

__all__ = ["CompiledPass", "served_by_kernels"]

MAX_EXPERTS = 4096  # the kernels' rows lie on the stack
# Waking a second thread costs some ten microseconds: about the time of this many scores.
SCORES_PER_THREAD = 100_000
# A softmax cost of up to 4 MB is kept; a larger one is made anew at each pass, for memory that does not grow.
NUMBERS_TO_KEEP = 1 << 20


def served_by_kernels(scores_TE: Tensor) -> bool:
    """Whether the kernels can read these scores."""
    return (
        scores_TE.device.type == "cpu"
        and scores_TE.dtype in native.DTYPES
        and scores_TE.shape[1] <= MAX_EXPERTS
        and (scores_TE.stride(1) == 1 or scores_TE.shape[1] == 1)
        and native.load() is not None
    )


def threads_for(scores_TE: Tensor) -> int:
    """Threads that pay, at most as many as torch may use."""
    return max(1, min(torch.get_num_threads(), scores_TE.numel() // SCORES_PER_THREAD))


class CompiledPass:
    """See `Pass`. The sums do not depend on the number of threads."""

    def __init__(self, problem: Problem) -> None:
        kernels = native.load()
        assert kernels is not None
        scores_TE, mask_T, mass_T = problem.scores_TE, problem.token_mask, problem.token_mass
        self._kernels, self._tokens, self._experts = kernels, *scores_TE.shape
        scores = native.Scores.of(scores_TE, problem.cost == "softmax", mask_T, mass_T)
        if problem.cost == "softmax" and scores_TE.numel() <= NUMBERS_TO_KEEP:
            cost_TE = torch.empty(scores_TE.shape, dtype=torch.float32, device="cpu")
            kernels.costs(ctypes.byref(scores), address(cost_TE))
            scores_TE, scores = cost_TE, native.Scores.of(cost_TE, False, mask_T, mass_T)
        # Held here because the kernels see addresses only.
        self._tensors, self._scores = (scores_TE, mask_T, mass_T), ctypes.byref(scores)
        self._threads = threads_for(scores_TE)
        self._workspace = np.empty(kernels.column_sums_workspace(self._tokens, self._experts))
        # Looking an address up takes a microsecond, as long as the arithmetic of a small problem's step.
        self._potentials_E, self._sums_2E = np.empty(self._experts), np.empty((2, self._experts))
        self._addresses = [x.ctypes.data for x in (self._potentials_E, self._sums_2E, self._workspace)]

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Whether this backend can do the problem."""
        return served_by_kernels(problem.scores_TE)

    def column_sums(self, potentials_E: np.ndarray, reg: float, precision: float) -> np.ndarray:
        """See `Pass`."""
        self._potentials_E[:] = potentials_E
        potentials, sums, workspace = self._addresses
        self._kernels.column_sums(self._scores, potentials, reg, precision, sums, workspace, self._threads)
        return self._sums_2E.copy()

    def column_ranks(self, ranks_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Pass`."""
        ranks_E = np.ascontiguousarray(ranks_E, dtype=np.int64)
        means_E, quantiles_E = np.empty((2, self._experts))
        lists = np.empty(int(ranks_E.sum()), dtype=np.float32)
        self._kernels.column_ranks(
            self._scores, ranks_E.ctypes.data, means_E.ctypes.data, quantiles_E.ctypes.data, lists.ctypes.data
        )
        return means_E, quantiles_E
