"""Products per expert as operations that are not looked into: for the compiler, and for tensors without values.

    linear   y_r = W_{e(r)} x_r                      (R, D), (E, F, D) → (R, F)
    outer    V_e = Σ_{r of e} y_r x_rᵀ               (R, F), (R, D) → (E, F, D)

How many rows an expert has is known from the data only. Traced, a loop over the experts breaks the graph at every
count, and is compiled anew for others. As one operation its shapes are known without the counts. The gradients of each
of the two are made of both.

Transforms of `torch.func` within one another (gradients per example: `vmap` of `grad`) cannot look for the gradient of
an operation. For them it is an `autograd.Function`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkroute.kernels.operations import define

__all__ = ["opaque_linear"]


def opaque_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row r times the matrix of its expert: (R, D), (E, F, D) → (R, F); rows sorted by expert, e's end at `ends_E[e]`.

    >>> x, weight = torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> opaque_linear(x, weight, torch.tensor([1, 3])).flatten().tolist()
    [2.0, 4.0, 4.0]
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Linear.apply(x_RD, weight_EFD, ends_E)
    return torch.ops.sinkroute.expert_linear(x_RD, weight_EFD, ends_E)


def _opaque_outer(y_RF: Tensor, x_RD: Tensor, ends_E: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Outer.apply(y_RF, x_RD, ends_E)
    return torch.ops.sinkroute.expert_outer(y_RF, x_RD, ends_E)


def _groups(*matrices: Tensor) -> bool:
    """Whether the grouped kernel takes them: 16-byte rows; on the CPU, it has no float16."""
    first = matrices[0]
    dtypes = {torch.bfloat16, torch.float32} | ({torch.float16} if first.device.type != "cpu" else set())
    aligned = all(size * first.element_size() % 16 == 0 for matrix in matrices for size in matrix.shape[1:])
    return first.dtype in dtypes and aligned and all(matrix.numel() for matrix in matrices)


def _counts(ends_E: Tensor) -> list[int]:
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def _linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    if _groups(x_RD, weight_EFD):
        return F.grouped_mm(x_RD.contiguous(), weight_EFD.mT, offs=ends_E)
    parts = zip(x_RD.split(_counts(ends_E)), weight_EFD, strict=True)
    return torch.cat([part_RD @ weight_FD.t() for part_RD, weight_FD in parts])


def _outer(y_RF: Tensor, x_RD: Tensor, ends_E: Tensor) -> Tensor:
    if _groups(y_RF, x_RD):
        return F.grouped_mm(y_RF.contiguous().t(), x_RD.contiguous(), offs=ends_E)
    counts = _counts(ends_E)
    parts = zip(y_RF.split(counts), x_RD.split(counts), strict=True)
    return torch.stack([part_RF.t() @ part_RD for part_RF, part_RD in parts])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RD, weight_EFD, ends_E = ctx.saved_tensors
    return (
        opaque_linear(grad_RF, weight_EFD.mT.contiguous(), ends_E),
        _opaque_outer(grad_RF, x_RD, ends_E),
        None,
    )


def _outer_backward(ctx: Any, grad_EFD: Tensor) -> tuple[Tensor, Tensor, None]:
    y_RF, x_RD, ends_E = ctx.saved_tensors
    return (
        opaque_linear(x_RD, grad_EFD.contiguous(), ends_E),
        opaque_linear(y_RF, grad_EFD.mT.contiguous(), ends_E),
        None,
    )


define(
    "expert_linear(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    _linear,
    lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
    backward=_linear_backward,
    save=_save,
)
define(
    "expert_outer(Tensor y, Tensor x, Tensor ends) -> Tensor",
    _outer,
    lambda y, x, ends: y.new_empty(ends.shape[0], y.shape[1], x.shape[1]),
    backward=_outer_backward,
    save=_save,
)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(torch.ops.sinkroute.expert_linear)
    setup_context = staticmethod(_save)
    backward = staticmethod(_linear_backward)


class _Outer(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(torch.ops.sinkroute.expert_outer)
    setup_context = staticmethod(_save)
    backward = staticmethod(_outer_backward)
