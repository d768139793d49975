"""The K best experts of every token.

Of equal values the lower expert comes first, so that a choice is a function of its values: bfloat16 logits are equal
often. `torch.topk` leaves that open, and on a CPU it is the slowest part of a router; there the compiled kernel chooses
(native/noisy_topk.c), or where there is none (or values are float64) rows with ties are sorted. `torch.compile` sees
one opaque operation. On other devices, and in exported graphs, the order of equal values is torch's.

Noise that is added for the choice is bounded (6.34 standard deviations). Values further below the K-th largest than
twice that stay out whatever is drawn, so that the kernel draws for the others alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sinkroute._operations import define
from sinkroute._values import holds_values
from sinkroute.routing.draws import normal_like
from sinkroute.transport import native
from sinkroute.transport.passes.compiled import served_by_kernels, threads_for

__all__ = ["noisy_topk", "top_experts"]


def top_experts(values_TE: Tensor, k: int) -> Tensor:
    """The k largest of each row, descending; on a CPU, of equal ones the lower expert first.

    Args:
        values_TE: (T, E) of any float dtype; −inf loses to all else. With NaN in a row its experts are any k.
        k: 1 to E.

    Returns:
        (T, k) int64, without gradient.

    >>> top_experts(torch.tensor([[1.0, 2.0, 2.0], [0.0, float("-inf"), 0.0]]), 2).tolist()
    [[1, 2], [0, 2]]
    """
    values_TE = values_TE.detach()
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and values_TE.device.type == "cpu":
        return torch.ops.sinkroute.top_experts(values_TE, k)
    return _top_experts(values_TE, k)


def _top_experts(values_TE: Tensor, k: int) -> Tensor:
    if not _in_memory(values_TE):
        return torch.topk(values_TE, k, dim=-1).indices
    if _served(values_TE):
        return _native_topk(values_TE, k, None, 0.0, None)[0]
    # One more than asked, to see whether the last is tied with the next.
    top = torch.topk(values_TE, min(k + 1, values_TE.shape[1]), dim=-1)
    experts_TK = top.indices[:, :k].contiguous()
    tied_R = (top.values[:, 1:] == top.values[:, :-1]).any(-1).nonzero()[:, 0]
    if len(tied_R):
        experts_TK[tied_R] = values_TE[tied_R].sort(dim=-1, descending=True, stable=True).indices[:, :k]
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
    if _in_memory(values_TE) and _served(values_TE):
        return _native_topk(values_TE, k, bias_E, float(std), seed)
    noise_TE = normal_like(values_TE, seed)
    noisy_TE = values_TE + std * noise_TE
    experts_TK = top_experts(noisy_TE if bias_E is None else noisy_TE + bias_E, k)
    return experts_TK, noise_TE.gather(-1, experts_TK)


def _in_memory(values_TE: Tensor) -> bool:
    """Whether the values lie in this machine's memory, to be read now."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or values_TE.device.type != "cpu":
        return False
    try:
        return holds_values(values_TE) and (values_TE.data_ptr() != 0 or values_TE.numel() == 0)
    except RuntimeError:  # what torch.func makes of a tensor
        return False


def _served(values_TE: Tensor) -> bool:
    return values_TE.dtype == torch.float32 and served_by_kernels(values_TE)


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
        values_TE.data_ptr(),
        tokens,
        experts,
        values_TE.stride(0),
        native.pointer(bias_E),
        k,
        std,
        0 if seed is None else int(seed),
        experts_TK.data_ptr(),
        None if seed is None else noise_TK.data_ptr(),
        threads_for(values_TE),
    )
    return experts_TK, noise_TK


define(
    "top_experts(Tensor values, SymInt k) -> Tensor",
    _top_experts,
    lambda values, k: values.new_empty(values.shape[0], k, dtype=torch.int64),
)
