"""A pass by torch: any device and dtype, in chunks of rows whose buffers are made once and stay in cache.

The one-line form, `((C + g) / ξ).softmax(1).sum(0)`, spends most of its time on getting T × E temporaries from the
system; in chunks of this size the same operations are several times faster and the memory does not grow with T.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sinkroute.transport.problem import COSTS, Problem

__all__ = ["ChunkedPass", "chunks"]

# Two buffers of this many numbers: 1 MB in float32, 2 MB in float64.
NUMBERS_PER_CHUNK = 1 << 17
FLOOR = -43.0


def chunks(tokens: int, experts: int) -> Iterator[slice]:
    """Rows 0 … tokens in slices of about `NUMBERS_PER_CHUNK` scores."""
    rows = max(1, NUMBERS_PER_CHUNK // experts)
    return (slice(first, min(first + rows, tokens)) for first in range(0, tokens, rows))


class ChunkedPass:
    """See `Pass`. All is float64 for float64 scores."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        scores_TE = problem.scores_TE
        self._wide = problem.target_E.dtype  # float32 on an MPS device, which has no other
        experts = scores_TE.shape[1]
        rows = min(scores_TE.shape[0], max(1, NUMBERS_PER_CHUNK // experts))
        self._wide_RE = torch.empty(rows, experts, dtype=self._wide, device=scores_TE.device)
        self._narrow_RE = torch.empty(rows, experts, dtype=problem.dtype, device=scores_TE.device)

    def _cost(self, rows: slice) -> Tensor:
        problem = self._problem
        scores_RE = problem.scores_TE[rows]
        if problem.token_mask is not None:
            # NaN in a masked row must not reach the sums: 0 · NaN is NaN.
            scores_RE = torch.where(problem.token_mask[rows, None], scores_RE, 0)
        return scores_RE if problem.cost == "linear" else COSTS[problem.cost](scores_RE.to(problem.dtype))

    def column_sums(self, potentials_E: np.ndarray, reg: float, precision: float) -> np.ndarray:
        """See `Pass`."""
        problem = self._problem
        tokens, experts = problem.scores_TE.shape
        g_E = torch.from_numpy(potentials_E).to(problem.scores_TE.device, self._wide)
        largest = np.abs(potentials_E[np.isfinite(potentials_E)]).max(initial=0)
        wide = not 1.2e-7 * largest / reg <= precision
        sums_2E = torch.zeros(2, experts, dtype=self._wide, device=g_E.device)
        for rows in chunks(tokens, experts):
            length = rows.stop - rows.start
            p_RE = self._narrow_RE[:length]
            shifted_RE = self._wide_RE[:length] if wide else p_RE
            cost_RE = self._cost(rows)
            # The row's own maximum first: however large the scores are, the sum with g then loses no digits of it.
            torch.sub(cost_RE, cost_RE.amax(dim=1, keepdim=True).to(shifted_RE.dtype), out=shifted_RE)
            shifted_RE.add_(g_E.to(shifted_RE.dtype))
            shifted_RE.sub_(shifted_RE.amax(dim=1, keepdim=True)).mul_(1 / reg)
            # Exponentials below this are nothing beside 1, but their squares would be denormals, which are slow.
            p_RE.copy_(shifted_RE).clamp_(min=FLOOR).exp_()
            p_RE.div_(p_RE.sum(dim=1, keepdim=True))
            if problem.token_mass is not None:
                mass_R1 = problem.token_mass[rows, None]
            elif problem.token_mask is not None:
                mass_R1 = problem.token_mask[rows, None].to(p_RE.dtype)
            else:
                mass_R1 = None
            sums_2E[0] += (p_RE if mass_R1 is None else p_RE * mass_R1).sum(dim=0)
            p_RE.square_()
            sums_2E[1] += (p_RE if mass_R1 is None else p_RE.mul_(mass_R1)).sum(dim=0)
        return sums_2E.double().cpu().numpy() if self._wide != torch.float64 else sums_2E.cpu().numpy()

    def column_ranks(self, ranks_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Pass`. Makes a matrix of all rows: meant for a sample."""
        cost_SE = self._cost(slice(0, self._problem.scores_TE.shape[0])).to(self._problem.dtype)
        if self._problem.token_mask is not None:
            cost_SE = cost_SE[self._problem.token_mask]
        if not len(cost_SE):
            return np.zeros(cost_SE.shape[1]), np.zeros(cost_SE.shape[1])
        # What is as low as a float64 goes stands for −inf; some of it would add up to that.
        finite_SE = cost_SE.abs() < torch.finfo(self._wide).max / (1 << 30)
        cost_SE = cost_SE.masked_fill(~finite_SE, -torch.inf)
        means_E = torch.where(finite_SE, cost_SE, 0).sum(dim=0, dtype=self._wide) / finite_SE.sum(dim=0).clamp(min=1)
        top_RE = cost_SE.topk(min(int(ranks_E.max()), len(cost_SE)), dim=0).values
        at_E = torch.from_numpy(ranks_E).to(top_RE.device).clamp(max=len(top_RE)) - 1
        quantiles_E = top_RE.gather(0, at_E[None])[0]
        return means_E.double().cpu().numpy(), quantiles_E.double().cpu().numpy()
