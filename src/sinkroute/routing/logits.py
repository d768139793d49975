"""Logits as routers compute with them: checked, float32 or better, 0 where masked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sinkroute._errors import NonFiniteLogits
from sinkroute.kernels.storage import holds_values, plain
from sinkroute.routing.beside import checked_mask

__all__ = ["checked_logits"]

# A float dtype that torch cannot convert; not every build has it.
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


def checked_logits(
    logits_TE: Tensor, token_mask: Tensor | None, num_experts: int, parts: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Logits of `parts` · E columns, or E, and their mask.

    Args:
        logits_TE: (T, E) or (T, parts · E), any float dtype.
        token_mask: (T,) bool, True for real tokens; of the others the logits may be anything.
        num_experts: E.
        parts: how many numbers per token and expert a gate may give.

    Raises:
        TypeError: logits that are no float tensor, a mask that is no bool tensor.
        ValueError: a wrong shape; logits of a real token that are not finite (asked on a CPU only: elsewhere it would
            stall the device).

    >>> checked_logits(torch.tensor([[1.0, math.nan], [0.0, 2.0]]), torch.tensor([False, True]), 2)[0].tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    if not isinstance(logits_TE, Tensor) or not logits_TE.is_floating_point():
        kind = logits_TE.dtype if isinstance(logits_TE, Tensor) else type(logits_TE).__name__
        raise TypeError(f"logits_TE must be a float tensor, got {kind}; pass the gate's logits")
    if logits_TE.dtype == _PACKED:
        raise TypeError(f"logits_TE is {_PACKED}, two numbers in one; pass the gate's logits as torch.bfloat16")
    logits_TE = plain("logits_TE", logits_TE)
    if logits_TE.ndim != 2 or logits_TE.shape[1] not in (num_experts, num_experts * parts):
        raise ValueError(
            f"logits_TE must have shape (tokens, num_experts={num_experts}), got {tuple(logits_TE.shape)}; "
            "flatten batch and sequence into one dimension of tokens"
        )
    logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    token_mask = checked_mask(token_mask, logits_TE, logits_TE.shape[:1])
    if token_mask is not None:
        logits_TE = logits_TE.masked_fill(~token_mask[:, None], 0.0)
    if logits_TE.device.type == "cpu" and holds_values(logits_TE) and not torch.compiler.is_compiling():
        _require_finite(logits_TE)
    return logits_TE, token_mask


def _require_finite(logits_TE: Tensor) -> None:
    # One sum instead of a mask of T×E flags: it is finite unless an entry is not, or (rarely) it overflows.
    if math.isfinite(logits_TE.detach().sum().item()):
        return
    bad = torch.nonzero(~torch.isfinite(logits_TE))
    if len(bad):
        token, expert = bad[0].tolist()
        raise NonFiniteLogits(
            f"logits_TE[{token}, {expert}] is {logits_TE[token, expert].item()}, one of {len(bad)} non-finite "
            "logits; training has probably diverged: lower the learning rate or clip gradients "
            "(padding belongs in token_mask)"
        )
