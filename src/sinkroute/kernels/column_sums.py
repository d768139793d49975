"""A pass over the logits, the one thing that costs time in a solve: what a plan gives to every expert.

The torch reference goes through a few thousand rows at a time, in buffers that are made once and stay in cache. The
one-line form, `((C + g) / ξ).softmax(1).sum(0)`, spends most of its time on getting T × E temporaries from the system;
in parts the same operations are several times faster, and the memory does not grow with T.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from sinkroute.kernels import native
from sinkroute.kernels.backend import c_for, threads_for
from sinkroute.kernels.rows import Rows, wide_dtype
from sinkroute.kernels.storage import address

__all__ = ["Pass", "make_pass"]

FLOOR = -43.0
# A softmax cost of up to 4 MB is kept; a larger one is made anew at each pass, for memory that does not grow.
NUMBERS_TO_KEEP = 1 << 20


def make_pass(rows: Rows) -> Pass:
    """Passes over these rows by the fastest backend.

    >>> rows = Rows(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    >>> make_pass(rows).column_sums(np.array([-1.0, 1.0]), 1.0, 1e-6)[0].round(3).tolist()
    [0.619, 1.381]
    """
    c = c_for(rows.logits_TE)
    return Pass(rows) if c is None else NativePass(rows, c)


class Pass:
    """Passes over the rows that this process holds, by torch: any device and dtype; float64 for float64 logits."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        logits_TE = rows.logits_TE
        self._wide = wide_dtype(logits_TE.device)
        longest = max((part.stop - part.start for part in rows.parts()), default=0)
        self._wide_RE, self._narrow_RE = (
            torch.empty(longest, logits_TE.shape[1], dtype=dtype, device=logits_TE.device)
            for dtype in (self._wide, rows.dtype)
        )

    def column_sums(self, potentials_E: np.ndarray, reg: float, precision: float) -> np.ndarray:
        """(2, E) float64: Σ_i m_i p_ij and Σ_i m_i p_ij², with p_ij = softmax_j((C_ij + g_j) / reg).

        potentials_E: (E,) float64. `precision`: what an entry near its row's maximum may be off by, relatively: the
        shift is float32, off by about 1.2e-7 |C + g| / reg, where that is less, else float64, which takes longer.
        Exponentials are of the working dtype.
        NaN where a logit is NaN or +inf, or a whole row −inf.
        """
        rows = self._rows
        g_E = torch.from_numpy(potentials_E).to(rows.logits_TE.device, self._wide)
        largest = np.abs(potentials_E[np.isfinite(potentials_E)]).max(initial=0)
        wide = not 1.2e-7 * largest / reg <= precision
        sums_2E = torch.zeros(2, len(g_E), dtype=self._wide, device=g_E.device)
        for part in rows.parts():
            length = part.stop - part.start
            p_RE = self._narrow_RE[:length]
            shifted_RE = self._wide_RE[:length] if wide else p_RE
            cost_RE = rows.cost_TE(part)
            # The row's own maximum first: however large the logits are, the sum with g then loses no digits of it.
            torch.sub(cost_RE, cost_RE.amax(dim=1, keepdim=True).to(shifted_RE.dtype), out=shifted_RE)
            shifted_RE.add_(g_E.to(shifted_RE.dtype))
            shifted_RE.sub_(shifted_RE.amax(dim=1, keepdim=True)).mul_(1 / reg)
            # Exponentials below this are nothing beside 1, but their squares would be denormals, which are slow.
            p_RE.copy_(shifted_RE).clamp_(min=FLOOR).exp_()
            p_RE.div_(p_RE.sum(dim=1, keepdim=True))
            mass_R1 = None
            if rows.token_mass is not None:
                mass_R1 = rows.token_mass[part, None]
            elif rows.token_mask is not None:
                mass_R1 = rows.token_mask[part, None].to(p_RE.dtype)
            sums_2E[0] += (p_RE if mass_R1 is None else p_RE * mass_R1).sum(dim=0)
            p_RE.square_()
            sums_2E[1] += (p_RE if mass_R1 is None else p_RE.mul_(mass_R1)).sum(dim=0)
        return sums_2E.cpu().double().numpy()

    def column_ranks(self, ranks_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E,) float64 each: the mean of a column's finite costs, and its `ranks_E[j]`-th largest cost (from 1).

        The reference makes a matrix of all rows: meant for a sample.
        """
        cost_SE = self._rows.cost_TE()
        if self._rows.token_mask is not None:
            cost_SE = cost_SE[self._rows.token_mask]
        if not len(cost_SE):
            return np.zeros(cost_SE.shape[1]), np.zeros(cost_SE.shape[1])
        # What is as low as a float64 goes stands for −inf; some of it would add up to that.
        finite_SE = cost_SE.abs() < torch.finfo(self._wide).max / (1 << 30)
        cost_SE = cost_SE.masked_fill(~finite_SE, -torch.inf)
        means_E = torch.where(finite_SE, cost_SE, 0).sum(dim=0, dtype=self._wide) / finite_SE.sum(dim=0).clamp(min=1)
        top_RE = cost_SE.topk(min(int(ranks_E.max()), len(cost_SE)), dim=0).values
        at_E = torch.from_numpy(ranks_E).to(top_RE.device).clamp(max=len(top_RE)) - 1
        quantiles_E = top_RE.gather(0, at_E[None])[0]
        return means_E.cpu().double().numpy(), quantiles_E.cpu().double().numpy()


class NativePass(Pass):
    """The same by C: float32, bfloat16 or float16 logits on a CPU, columns next to each other.

    The sums do not depend on the number of threads.
    """

    def __init__(self, rows: Rows, c: ctypes.CDLL) -> None:
        self._c, (tokens, self._experts) = c, rows.logits_TE.shape
        if rows.cost == "softmax" and rows.logits_TE.numel() <= NUMBERS_TO_KEEP:
            cost_TE = torch.empty(rows.logits_TE.shape, dtype=torch.float32, device="cpu")
            c.costs(native.Rows.of(rows), address(cost_TE))
            rows = Rows(cost_TE, "linear", rows.token_mask, rows.token_mass)
        self._rows, self._described = rows, native.Rows.of(rows)  # the rows are held: the kernels see addresses only
        self._threads = threads_for(rows.logits_TE)
        self._workspace = np.empty(c.column_sums_workspace(tokens, self._experts))
        # Looking an address up takes a microsecond, as long as the arithmetic of a small problem's step.
        self._potentials_E: np.ndarray = np.empty(self._experts)
        self._sums_2E: np.ndarray = np.empty((2, self._experts))
        self._addresses = [x.ctypes.data for x in (self._potentials_E, self._sums_2E, self._workspace)]

    def column_sums(self, potentials_E: np.ndarray, reg: float, precision: float) -> np.ndarray:
        self._potentials_E[:] = potentials_E
        potentials, sums, workspace = self._addresses
        self._c.column_sums(self._described, potentials, reg, precision, sums, workspace, self._threads)
        return np.array(self._sums_2E)

    def column_ranks(self, ranks_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ranks_E = np.ascontiguousarray(ranks_E, dtype=np.int64)
        means_E, quantiles_E = np.empty((2, self._experts))
        lists = np.empty(int(ranks_E.sum()), dtype=np.float32)
        self._c.column_ranks(self._described, *(x.ctypes.data for x in (ranks_E, means_E, quantiles_E, lists)))
        return means_E, quantiles_E
