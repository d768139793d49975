"""The k largest numbers of each row by torch: of equal ones the lower place comes first, wherever they are.

`torch.topk` leaves the order of equal numbers open: it depends on the device, the layout in memory and the neighbours.
A stable sort does not, nor does it wait for a device, and it can be exported, traced and vectorised. On a CPU it takes
three to four times as long, so that there only rows in which something is tied are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute._values import readable

__all__ = ["largest"]


def largest(values_TE: Tensor, k: int, ties_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, and their places.

    Args:
        values_TE: (T, E) of any float dtype; −0 is 0. NaN comes first, in any order.
        k: 1 to E.
        ties_TE: (T, E); of equal values that with the larger number here comes first. None: the lower place.

    Returns:
        (T, k) of the dtype of the values, and (T, k) int64.

    >>> [x.tolist() for x in largest(torch.tensor([[1.0, 2.0, -0.0, 2.0, 0.0]]), 4)]
    [[[2.0, 2.0, 1.0, -0.0]], [[1, 3, 0, 2]]]
    >>> largest(torch.tensor([[1.0, 2.0, 2.0]]), 3, torch.tensor([[9, 7, 8]]))[1].tolist()
    [[2, 1, 0]]
    """
    if values_TE.device.type != "cpu" or not readable(values_TE, ties_TE):
        places_TK = _places(values_TE, ties_TE)[:, :k]
        return values_TE.gather(1, places_TK), places_TK
    # One more than asked, to see whether the last is tied with the next.
    top = torch.topk(values_TE, min(k + 1, values_TE.shape[1]), dim=1)
    places_TK = top.indices[:, :k].contiguous()
    tied_R = (top.values[:, 1:] == top.values[:, :-1]).any(1).nonzero()[:, 0]
    if len(tied_R):
        places_TK[tied_R] = _places(values_TE[tied_R], None if ties_TE is None else ties_TE[tied_R])[:, :k]
    return values_TE.gather(1, places_TK), places_TK


def _places(values_TE: Tensor, ties_TE: Tensor | None) -> Tensor:
    """(T, E) int64, the places of all values in their order."""
    values_TE = values_TE.masked_fill(values_TE == 0, 0)  # some sorts go by the bits, and −0 has others than 0
    if ties_TE is None:
        return values_TE.sort(dim=1, descending=True, stable=True).indices
    order_TE = ties_TE.sort(dim=1, descending=True, stable=True).indices
    return order_TE.gather(1, values_TE.gather(1, order_TE).sort(dim=1, descending=True, stable=True).indices)
