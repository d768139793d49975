"""A product per expert, over rows that are sorted by expert, and what goes with it.

    linear   y_r = W_{e(r)} x_r                      (R, D), (E, F, D) → (R, F)
    outer    V_e = Σ_{r of e} y_r x_rᵀ               (R, F), (R, D) → (E, F, D)

`grouped_linear` does all experts in one kernel. `loop_linear` does one after another and is the reference for it.

How many rows an expert has is known from the data only. Traced, a loop over the experts breaks the graph at every
count, and is compiled anew for others. `opaque_linear` is one operation that is not looked into, for the compiler and
for tensors without values: its shapes are known without the counts. The gradients of linear and outer are made of both.
Transforms of `torch.func` within one another (gradients per example: `vmap` of `grad`) cannot look for the gradient of
an operation. For them it is an `autograd.Function`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkroute.kernels.operations import define
from sinkroute.kernels.storage import holds_values
from sinkroute.moe.function import apply

__all__ = ["add_bias", "can_group", "grouped_linear", "loop_linear", "opaque_linear"]


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_linear` takes these: also for the backward pass, and under the compiler."""
    # What torch knows of the kernel's shapes, which the compiler asks for, is for bfloat16 alone (torch 2.13).
    known = x.dtype == torch.bfloat16 or (holds_values(x) and not torch.compiler.is_compiling())
    return x.dtype == weight.dtype and known and _are_grouped(x, weight)


def _are_grouped(*matrices: Tensor) -> bool:
    """Whether the grouped kernel takes them: rows of 16-byte multiples; on the CPU, no float16."""
    first = matrices[0]
    dtypes = {torch.bfloat16, torch.float32} | ({torch.float16} if first.device.type != "cpu" else set())
    aligned = all(size * first.element_size() % 16 == 0 for matrix in matrices for size in matrix.shape[1:])
    return first.dtype in dtypes and aligned and all(matrix.numel() for matrix in matrices)


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row r times the matrix of its expert: (R, D), (E, F, D) → (R, F), in one kernel."""
    # The kernel is particular about strides; `y.sum()`, for one, sends back a gradient whose strides are 0.
    y_RF: Tensor = apply(_ContiguousGradient, F.grouped_mm(x_RD.contiguous(), weight_EFD.mT, offs=ends_E))
    return y_RF


class _ContiguousGradient(torch.autograd.Function):
    """The identity; its gradient is brought into row-major order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """The gradient needs nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def loop_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The same by one product per expert; waits for the counts where they live on a device.

    >>> x, weight = torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> loop_linear(x, weight, torch.tensor([1, 3])).flatten().tolist()
    [2.0, 4.0, 4.0]
    """
    parts = zip(x_RD.split(_counts(ends_E)), weight_EFD.unbind(), strict=True)
    return torch.cat([part_RD @ weight_FD.t() for part_RD, weight_FD in parts])


def _counts(ends_E: Tensor) -> list[int]:
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


# -- as an operation -------------------------------------------------------------------------------------------------


def opaque_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """The same as one operation, with its gradient.

    >>> x, weight = torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> opaque_linear(x, weight, torch.tensor([1, 3])).flatten().tolist()
    [2.0, 4.0, 4.0]
    """
    operation: Any = _Linear.apply if _is_transformed() else torch.ops.sinkroute.expert_linear
    y_RF: Tensor = operation(x_RD, weight_EFD, ends_E)
    return y_RF


def _opaque_outer(y_RF: Tensor, x_RD: Tensor, ends_E: Tensor) -> Tensor:
    operation: Any = _Outer.apply if _is_transformed() else torch.ops.sinkroute.expert_outer
    v_EFD: Tensor = operation(y_RF, x_RD, ends_E)
    return v_EFD


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    if _are_grouped(x_RD, weight_EFD):
        return F.grouped_mm(x_RD.contiguous(), weight_EFD.mT, offs=ends_E)
    return loop_linear(x_RD, weight_EFD, ends_E)


def _outer(y_RF: Tensor, x_RD: Tensor, ends_E: Tensor) -> Tensor:
    if _are_grouped(y_RF, x_RD):
        return F.grouped_mm(y_RF.contiguous().t(), x_RD.contiguous(), offs=ends_E)
    counts = _counts(ends_E)
    parts = zip(y_RF.split(counts), x_RD.split(counts), strict=True)
    return torch.stack([part_RF.t() @ part_RD for part_RF, part_RD in parts])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RD, weight_EFD, ends_E = ctx.saved_tensors
    to_x_RD = opaque_linear(grad_RF, weight_EFD.mT.contiguous(), ends_E)
    return to_x_RD, _opaque_outer(grad_RF, x_RD, ends_E), None


def _outer_backward(ctx: Any, grad_EFD: Tensor) -> tuple[Tensor, Tensor, None]:
    y_RF, x_RD, ends_E = ctx.saved_tensors
    to_y_RF = opaque_linear(x_RD, grad_EFD.contiguous(), ends_E)
    return to_y_RF, opaque_linear(y_RF, grad_EFD.mT.contiguous(), ends_E), None


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


# -- biases ----------------------------------------------------------------------------------------------------------


def add_bias(y_RF: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    """Row r plus the bias of its expert, in the dtype of `y_RF`; None: no bias.

    >>> add_bias(torch.zeros(3, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([1, 3])).flatten().tolist()
    [1.0, 2.0, 2.0]
    """
    if bias_EF is None:
        return y_RF
    row_R = torch.arange(len(y_RF), dtype=ends_E.dtype, device=ends_E.device)
    expert_R = torch.searchsorted(ends_E, row_R, right=True)
    biased_RF: Tensor = apply(_AddBias, y_RF, bias_EF.to(y_RF.dtype), expert_R)
    return biased_RF


class _AddBias(torch.autograd.Function):
    """y_r + bias[expert_r]. Its gradient is a product: to add up rows by index would be atomic on a GPU, in an order
    that changes, and would lose small numbers to rounding in half precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
        return y_RF + bias_EF[expert_R]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, bias_EF, expert_R = inputs
        ctx.save_for_backward(expert_R)
        ctx.num_experts = len(bias_EF)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:
        (expert_R,) = ctx.saved_tensors
        every_E1 = torch.arange(ctx.num_experts, device=expert_R.device)[:, None]
        return grad_RF, (every_E1 == expert_R).to(grad_RF.dtype) @ grad_RF, None
