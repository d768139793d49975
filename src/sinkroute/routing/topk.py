"""The K best experts of every token.

Of equal values the lower expert comes first, so that a choice is a function of its values: bfloat16 logits are equal
often. That is so on every device, for every dtype and layout, in exported graphs, under tracers and transforms. On a
CPU, where `torch.topk` is the slowest part of a router, the compiled kernel chooses (native/noisy_topk.c), and
`torch.compile` sees one opaque operation; elsewhere, and for float64, it is `largest`.

Where all experts are equal at first (a gate of zeros, copies of one expert) that rule sends all tokens to experts 0 to
K − 1. For training there is another: of equal values the order is drawn, from a key as all that is random here.

Noise that is added for the choice is bounded (6.34 standard deviations). Values further below the K-th largest than
twice that stay out whatever is drawn, so that the kernel draws for the others alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute._operations import define
from sinkroute._values import address, readable
from sinkroute.routing.draws import normal_like
from sinkroute.transport import native
from sinkroute.transport.largest import largest
from sinkroute.transport.passes.compiled import served_by_kernels, threads_for

__all__ = ["noisy_topk", "top_experts"]


def top_experts(values_TE: Tensor, k: int, ties: Tensor | None = None) -> Tensor:
    """The k largest of each row, descending; of equal ones the lower expert first, or in an order that is drawn.

    Args:
        values_TE: (T, E) of any float dtype; −inf loses to all else, −0 is 0. With NaN in a row its experts are any k.
        k: 1 to E.
        ties: 0-d int64 on the CPU, the seed of `normal_like` numbers by which equal values are ordered, anew for each
            token. The values themselves are not changed. None: the lower expert first.

    Returns:
        (T, k) int64, without gradient.

    >>> top_experts(torch.tensor([[1.0, 2.0, 2.0], [0.0, float("-inf"), 0.0]]), 2).tolist()
    [[1, 2], [0, 2]]
    >>> top_experts(torch.zeros(1000, 4), 1, ties=torch.tensor(7)).flatten().bincount().min() > 200
    tensor(True)
    """
    values_TE = values_TE.detach()
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and values_TE.device.type == "cpu":
        return torch.ops.sinkroute.top_experts(values_TE, k, ties)
    return _top_experts(values_TE, k, ties)


def _top_experts(values_TE: Tensor, k: int, ties: Tensor | None) -> Tensor:
    if values_TE.device.type != "cpu" or not readable(values_TE):
        return largest(values_TE, k, None if ties is None else normal_like(values_TE, ties))[1]
    if ties is not None:
        return _drawn(values_TE, k, ties)
    served_TE = _for_kernels(values_TE if values_TE.dtype == torch.float64 else values_TE.float())
    return largest(values_TE, k)[1] if served_TE is None else _native_topk(served_TE, k, None, 0.0, None)[0]


def _drawn(values_TE: Tensor, k: int, ties: Tensor) -> Tensor:
    """Nothing is drawn where nothing is tied, which is soon so in any training."""
    experts = values_TE.shape[1]
    best_TK = _top_experts(values_TE, min(k + 1, experts), None)  # one more, to see whether the last is tied with it
    top_TK = values_TE.gather(1, best_TK)
    tied_R = (top_TK[:, 1:] == top_TK[:, :-1]).any(1).nonzero()[:, 0]
    experts_TK = best_TK[:, :k].contiguous()
    if len(tied_R):
        experts_TK[tied_R] = largest(values_TE[tied_R], k, normal_like(values_TE, ties)[tied_R])[1]
    return experts_TK


def noisy_topk(
    values_TE: Tensor, k: int, std: float | Tensor, seed: Tensor, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`top_experts` of values + std · `normal_like(values, seed)` (+ bias), and the noise that the chosen got.

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
        served_TE = _for_kernels(values_TE)
        if served_TE is not None:
            return _native_topk(served_TE, k, bias_E, float(std), seed)
    noise_TE = normal_like(values_TE, seed)
    noisy_TE = values_TE + std * noise_TE
    experts_TK = top_experts(noisy_TE if bias_E is None else noisy_TE + bias_E, k)
    return experts_TK, noise_TE.gather(-1, experts_TK)


def _for_kernels(values_TE: Tensor) -> Tensor | None:
    """The values as the kernel reads them, row by row, or None where it cannot; a copy takes a fraction of its time."""
    values_TE = values_TE if values_TE.stride(1) == 1 else values_TE.contiguous()
    return values_TE if values_TE.dtype == torch.float32 and served_by_kernels(values_TE) else None


def _native_topk(
    values_TE: Tensor, k: int, bias_E: Tensor | None, std: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels = native.load()
    assert kernels is not None
    tokens, experts = values_TE.shape
    experts_TK = torch.empty(tokens, k, dtype=torch.int64, device="cpu")
    noise_TK = torch.empty(tokens, 0 if seed is None else k, dtype=torch.float32, device="cpu")
    bias_E = None if bias_E is None else bias_E.contiguous()
    kernels.noisy_topk(
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
    "top_experts(Tensor values, SymInt k, Tensor? ties) -> Tensor",
    _top_experts,
    lambda values, k, ties: values.new_empty(values.shape[0], k, dtype=torch.int64),
)
