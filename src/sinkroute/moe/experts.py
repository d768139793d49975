"""E feed-forward networks, computed over rows that are sorted by expert.

`torch.nn.functional.grouped_mm` does all experts in one call where it can; a loop over the experts does it elsewhere
(float64, rows that are not 16-byte multiples) and is the reference for it. Where neither can be traced, one opaque
operation stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute._errors import unknown_name
from sinkroute.kernels.storage import has_tangent, holds_values
from sinkroute.moe.function import apply
from sinkroute.moe.opaque import opaque_linear

__all__ = ["Experts", "grouped_linear", "loop_linear"]

# name -> (function, gated). A gated expert has two input maps: down(f(gate(x)) * up(x)).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
}


class Experts(nn.Module):
    """E independent feed-forward networks D → F → D.

    Args:
        d_model: D.
        d_hidden: F, of each expert.
        num_experts: E.
        activation: `"swiglu"` (gated, three matrices), `"gelu"` or `"relu"` (two matrices).
        bias: whether each matrix has a bias.
        dropout: share of the hidden numbers that is zeroed while training.

    Attributes:
        w_in: (E, F, D), or (E, 2F, D) with the gate's rows first when gated; the layout of `nn.Linear` per expert.
        w_out: (E, D, F).
        b_in: (E, F), or (E, 2F) when gated; None without biases.
        b_out: (E, D), or None.
    """

    @torch.inference_mode(False)  # it is to be trained, wherever it is made
    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        activation: str = "swiglu",
        *,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_hidden", d_hidden), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be 0 or more and below 1, got {dropout}")
        self.dropout = dropout
        self.activation = activation
        self.function, self.gated = ACTIVATIONS[activation]
        self.w_in = nn.Parameter(torch.empty(num_experts, (1 + self.gated) * d_hidden, d_model))
        self.w_out = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))
        self.b_in = nn.Parameter(torch.empty(self.w_in.shape[:2])) if bias else None
        self.b_out = nn.Parameter(torch.empty(self.w_out.shape[:2])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each matrix as in `nn.Linear`, uniform within 1/√fan-in; biases 0."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.zeros_(bias)

    def extra_repr(self) -> str:
        experts, d_model, d_hidden = self.w_out.shape
        rest = ("" if self.b_in is None else ", bias=True") + (f", dropout={self.dropout}" if self.dropout else "")
        return f"num_experts={experts}, d_model={d_model}, d_hidden={d_hidden}, activation={self.activation}{rest}"

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows (R, D) sorted by expert, expert e's ending at `ends_E[e]` → (R, D).

        Raises:
            TypeError: rows of another dtype than the weights, without autocast.
            ValueError: weights on the meta device, which hold nothing, for rows that do.
            NotImplementedError: forward-mode differentiation.
        """
        refuse_tangents(x=x_RD, w_in=self.w_in, w_out=self.w_out, b_in=self.b_in, b_out=self.b_out)
        if not x_RD.is_meta and torch.is_autocast_enabled(x_RD.device.type):  # autocast does not know grouped_mm
            dtype = torch.get_autocast_dtype(x_RD.device.type)
            x_RD, w_in, w_out = x_RD.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)
        else:
            w_in, w_out = self.w_in, self.w_out
            if x_RD.dtype != w_in.dtype:
                raise TypeError(
                    f"x must have the dtype of the experts' weights, {w_in.dtype}, got {x_RD.dtype}; call "
                    f"x.to({w_in.dtype}), layer.to({x_RD.dtype}), or compute within torch.autocast"
                )
        if w_in.is_meta and not x_RD.is_meta:
            raise no_values(x_RD.device)
        if can_group(x_RD, w_in) and can_group(x_RD, w_out):
            linear = grouped_linear
        else:
            linear = opaque_linear if torch.compiler.is_compiling() or not holds_values(x_RD) else loop_linear
        hidden_RF = add_bias(linear(x_RD, w_in, ends_E), self.b_in, ends_E)
        if self.gated:
            gate_RF, up_RF = hidden_RF.chunk(2, dim=-1)
            hidden_RF = self.function(gate_RF) * up_RF
        else:
            hidden_RF = self.function(hidden_RF)
        hidden_RF = F.dropout(hidden_RF, self.dropout, self.training)
        return add_bias(linear(hidden_RF, w_out, ends_E), self.b_out, ends_E)


def no_values(device: torch.device) -> ValueError:
    """For weights on the meta device and tokens that are not."""
    return ValueError(
        f"the layer's weights are on the meta device and hold no values, but x is on {device}; call "
        f'layer.to_empty(device="{device}") and reset_parameters of its modules, or load a checkpoint with assign=True'
    )


def refuse_tangents(**tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation, which torch's grouped product does not know.

    Raises:
        NotImplementedError: one of the tensors carries a tangent.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is not None and has_tangent(tensor):
            raise NotImplementedError(
                f"{name} carries a tangent (forward-mode differentiation, torch.func.jvp or jacfwd), but the layer has "
                "derivatives by backward only; take torch.func.vjp or jacrev"
            )


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` takes these: 16-byte rows, and a dtype for which it has a backward pass too."""
    dtypes = (
        (torch.bfloat16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    )
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    # What torch knows of the kernel's shapes, which the compiler asks for, is for bfloat16 alone (torch 2.13).
    known = x.dtype == torch.bfloat16 or (holds_values(x) and not torch.compiler.is_compiling())
    return x.dtype == weight.dtype and x.dtype in dtypes and aligned and known and x.numel() > 0


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row r times the matrix of its expert: (R, D), (E, F, D) → (R, F), in one kernel."""
    # The kernel is particular about strides; `y.sum()`, for one, sends back a gradient whose strides are 0.
    y_RF = F.grouped_mm(x_RD.contiguous(), weight_EFD.transpose(-2, -1), offs=ends_E)
    return apply(_ContiguousGradient, y_RF)


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
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    parts = zip(x_RD.split(counts), weight_EFD.unbind(), strict=True)
    return torch.cat([part_RD @ weight_FD.t() for part_RD, weight_FD in parts])


def add_bias(y_RF: Tensor, bias_EF: Tensor | None, ends_E: Tensor) -> Tensor:
    """Row r plus the bias of its expert, in the dtype of `y_RF`; None: no bias.

    >>> add_bias(torch.zeros(3, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([1, 3])).flatten().tolist()
    [1.0, 2.0, 2.0]
    """
    if bias_EF is None:
        return y_RF
    return apply(_AddBias, y_RF, bias_EF.to(y_RF.dtype), expert_of_rows(len(y_RF), ends_E))


def expert_of_rows(rows: int, ends_E: Tensor) -> Tensor:
    """(R,) int64: which expert each row belongs to."""
    row_R = torch.arange(rows, dtype=ends_E.dtype, device=ends_E.device)
    return torch.searchsorted(ends_E, row_R, right=True)


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
