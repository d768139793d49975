"""The k largest numbers of each row: the K best experts of every token.

Of equal values the lower expert comes first, so that a choice is a function of its values: bfloat16 logits are equal
often. That is so on every device, for every dtype and layout, in exported graphs, under tracers and transforms. On a
CPU, where `torch.topk` is the slowest part of a router, the compiled kernel chooses (native/noisy_topk.c), and
`torch.compile` sees one opaque operation; elsewhere, and for float64, it is `largest`, the reference.

Where all experts are equal at first (a gate of zeros, copies of one expert) that rule sends all tokens to experts 0 to
K − 1. For training there is another: of equal values the order is drawn, from a key as all that is random here.

Noise that is added for the choice is bounded (6.34 standard deviations). Values further below the K-th largest than
twice that stay out whatever is drawn, so that the kernel draws for the others alone.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sinkroute.kernels.backend import c_for, threads_for
from sinkroute.kernels.normal import normal_like
from sinkroute.kernels.operations import define
from sinkroute.kernels.storage import address, readable

__all__ = ["largest", "noisy_topk", "topk"]


def topk(values_TE: Tensor, k: int, ties: Tensor | None = None) -> Tensor:
    """The k largest of each row, descending; of equal ones the lower expert first, or in an order that is drawn.

    Args:
        values_TE: (T, E) of any float dtype; −inf loses to all else, −0 is 0. With NaN in a row its experts are any k.
        k: 1 to E.
        ties: 0-d int64 on the CPU, the seed of `normal_like` numbers by which equal values are ordered, anew for each
            token. The values themselves are not changed. None: the lower expert first.

    Returns:
        (T, k) int64, without gradient.

    >>> topk(torch.tensor([[1.0, 2.0, 2.0], [0.0, float("-inf"), 0.0]]), 2).tolist()
    [[1, 2], [0, 2]]
    >>> topk(torch.zeros(1000, 4), 1, ties=torch.tensor(7)).flatten().bincount().min() > 200
    tensor(True)
    """
    values_TE = values_TE.detach()
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and values_TE.device.type == "cpu":
        experts_TK: Tensor = torch.ops.sinkroute.topk(values_TE, k, ties)
        return experts_TK
    return _topk(values_TE, k, ties)


def _topk(values_TE: Tensor, k: int, ties: Tensor | None) -> Tensor:
    if values_TE.device.type != "cpu" or not readable(values_TE):
        return largest(values_TE, k, None if ties is None else normal_like(values_TE, ties))[1]
    if ties is not None:
        return _drawn(values_TE, k, ties)
    if values_TE.dtype != torch.float64:
        values_TE = _in_rows(values_TE.float())
        if (c := c_for(values_TE)) is not None:
            return _topk_in_c(c, values_TE, k)[0]
    return largest(values_TE, k)[1]


def _drawn(values_TE: Tensor, k: int, ties: Tensor) -> Tensor:
    """Nothing is drawn where nothing is tied, which is soon so in any training."""
    experts = values_TE.shape[1]
    best_TK = _topk(values_TE, min(k + 1, experts), None)  # one more, to see whether the last is tied with it
    top_TK = values_TE.gather(1, best_TK)
    tied_R = (top_TK[:, 1:] == top_TK[:, :-1]).any(1).nonzero()[:, 0]
    experts_TK = best_TK[:, :k].contiguous()
    if len(tied_R):
        experts_TK[tied_R] = largest(values_TE[tied_R], k, normal_like(values_TE, ties)[tied_R])[1]
    return experts_TK


def noisy_topk(
    values_TE: Tensor, k: int, std: float | Tensor, seed: Tensor, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`topk` of values + std · `normal_like(values, seed)` (+ bias), and the noise that the chosen got.

    Args:
        values_TE: (T, E) of any float dtype.
        k: 1 to E.
        std: 0 or more; a number or 0-d.
        seed: 0-d int64 on the CPU.
        bias_E: (E,) added last.

    Returns:
        (T, k) int64 and (T, k) in the dtype of the values, standard normal before it was chosen; both without gradient.

    >>> values_TE, seed = torch.zeros(1, 3), torch.tensor(5)
    >>> experts_TK, noise_TK = noisy_topk(values_TE, 2, 0.1, seed)
    >>> bool((noise_TK == normal_like(values_TE, seed).topk(2).values).all())
    True
    """
    values_TE = values_TE.detach()
    std = std.detach() if isinstance(std, Tensor) else std
    bias_E = None if bias_E is None else bias_E.to(values_TE.dtype)
    if values_TE.dtype == torch.float32 and readable(values_TE, bias_E):
        rows_TE = _in_rows(values_TE)
        if (c := c_for(rows_TE)) is not None:
            return _topk_in_c(c, rows_TE, k, bias_E, float(std), seed)
    noise_TE = normal_like(values_TE, seed)
    noisy_TE = values_TE + std * noise_TE
    experts_TK = topk(noisy_TE if bias_E is None else noisy_TE + bias_E, k)
    return experts_TK, noise_TE.gather(-1, experts_TK)


def _in_rows(values_TE: Tensor) -> Tensor:
    """The values as the kernel reads them, row by row; a copy takes a fraction of its time."""
    return values_TE if values_TE.stride(1) == 1 else values_TE.contiguous()


def _topk_in_c(
    c: ctypes.CDLL, values_TE: Tensor, k: int, bias_E: Tensor | None = None, std: float = 0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tokens, experts = values_TE.shape
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device="cpu")
    noise_TK = torch.empty(tokens, 0 if seed is None else k, dtype=torch.float32, device="cpu")
    bias_E = None if bias_E is None else bias_E.contiguous()
    c.noisy_topk(
        address(values_TE),
        tokens,
        experts,
        values_TE.stride(0),
        address(bias_E),
        k,
        std,
        0 if seed is None else int(seed),
        address(experts_TK),
        None if seed is None else address(noise_TK),
        threads_for(values_TE),
    )
    return experts_TK, noise_TK


define(
    "topk(Tensor values, SymInt k, Tensor? ties) -> Tensor",
    _topk,
    lambda values, k, ties: values.new_empty(values.shape[0], k, dtype=torch.int64),
)


def largest(values_TE: Tensor, k: int, ties_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, and their places, by torch on any device.

    `torch.topk` leaves the order of equal numbers open: it depends on the device, the layout in memory and the
    neighbours. A stable sort does not, nor does it wait for a device, and it can be exported, traced and vectorised. On
    a CPU it takes three to four times as long, so that there only rows in which something is tied are sorted.

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
