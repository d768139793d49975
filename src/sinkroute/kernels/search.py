"""A whole solve on a GPU, without a wait for the host; where there is none, the search runs in `transport.dual`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sinkroute.kernels.backend import leave_triton, triton_for
from sinkroute.kernels.rows import Rows

__all__ = ["search_on_device"]


def search_on_device(
    rows: Rows,
    target_E: Tensor,
    positive_E: Tensor,
    reg: float,
    *,
    tol: float,
    max_passes: int | None,
    init_E: Tensor | None,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Potentials (E,), their 0-d column error and the 0-d number of passes; None where Triton does not serve.

    Args:
        rows: those of this process.
        target_E: (E,) float64 column sums to reach, over all ranks.
        positive_E: (E,) bool, the experts with mass.
        reg: the entropy weight ξ.
        tol, max_passes, init_E: as a solver takes them.
        reduce: the sum over the ranks; None for this process alone.
    """
    if not triton_for(rows.logits_TE):
        return None
    try:
        from sinkroute.kernels.gpu.launch import search

        return search(rows, target_E, positive_E, reg, tol=tol, max_passes=max_passes, init_E=init_E, reduce=reduce)
    except Exception as error:  # whatever it is that Triton lacks on this machine
        leave_triton(error)
        return None
