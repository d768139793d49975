"""E feed-forward networks, computed over rows that are sorted by expert.

`torch.nn.functional.grouped_mm` does all experts in one call where it can; a loop over the experts does it elsewhere
(float64, rows that are not 16-byte multiples) and is the reference for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute._errors import unknown_name

__all__ = ["Experts", "grouped_linear", "loop_linear"]

# name -> (function, gated). A gated expert has two input maps: down(f(gate(x)) * up(x)).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "swiglu": (F.silu, True),
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
}


class Experts(nn.Module):
    """E independent feed-forward networks D → F → D without biases.

    Args:
        d_model: D.
        d_hidden: F, of each expert.
        num_experts: E.
        activation: `"swiglu"` (gated, three matrices), `"gelu"` or `"relu"` (two matrices).

    Attributes:
        w_in: (E, F, D), or (E, 2F, D) with the gate's rows first when gated; the layout of `nn.Linear` per expert.
        w_out: (E, D, F).
    """

    def __init__(self, d_model: int, d_hidden: int, num_experts: int, activation: str = "swiglu") -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_hidden", d_hidden), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.function, self.gated = ACTIVATIONS[activation]
        self.w_in = nn.Parameter(torch.empty(num_experts, (1 + self.gated) * d_hidden, d_model))
        self.w_out = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as `nn.Linear` would be: uniform within 1/√fan-in."""
        for weight in (self.w_in, self.w_out):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        experts, d_model, d_hidden = self.w_out.shape
        return f"num_experts={experts}, d_model={d_model}, d_hidden={d_hidden}, activation={self.activation}"

    def forward(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows (R, D) sorted by expert, expert e's ending at `ends_E[e]` → (R, D)."""
        if torch.is_autocast_enabled(x_RD.device.type):  # autocast does not know grouped_mm
            dtype = torch.get_autocast_dtype(x_RD.device.type)
            x_RD, w_in, w_out = x_RD.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)
        else:
            w_in, w_out = self.w_in, self.w_out
        grouped = can_group(x_RD, w_in) and can_group(x_RD, w_out)
        linear = grouped_linear if grouped else loop_linear
        hidden_RF = linear(x_RD, w_in, ends_E)
        if self.gated:
            gate_RF, up_RF = hidden_RF.chunk(2, dim=-1)
            hidden_RF = self.function(gate_RF) * up_RF
        else:
            hidden_RF = self.function(hidden_RF)
        return linear(hidden_RF, w_out, ends_E)


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether `grouped_mm` takes these: 16-byte rows, and a dtype for which it has a backward pass too."""
    dtypes = (
        (torch.bfloat16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    )
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    # Inductor cannot lower the float32 kernel (torch 2.13); the loop compiles.
    compiles = not (torch.compiler.is_compiling() and x.dtype == torch.float32)
    return x.dtype == weight.dtype and x.dtype in dtypes and aligned and compiles and x.numel() > 0


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Row r times the matrix of its expert: (R, D), (E, F, D) → (R, F), in one kernel."""
    # The kernel is particular about strides; `y.sum()`, for one, sends back a gradient whose strides are 0.
    y_RF = F.grouped_mm(x_RD.contiguous(), weight_EFD.transpose(-2, -1), offs=ends_E)
    return _ContiguousGradient.apply(y_RF)


class _ContiguousGradient(torch.autograd.Function):
    """The identity; its gradient is brought into row-major order."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

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
