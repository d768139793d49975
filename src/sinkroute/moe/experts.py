"""E feed-forward networks, computed over rows that are sorted by expert.

One kernel does all experts where it can. A loop over the experts does it elsewhere (float64, rows that are not 16-byte
multiples). Where neither can be traced, one opaque operation stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute._errors import unknown_name
from sinkroute.kernels.storage import has_tangent, holds_values
from sinkroute.moe.linear import add_bias, can_group, grouped_linear, loop_linear, opaque_linear

__all__ = ["ACTIVATIONS", "Experts", "refuse_tangents", "require_values"]

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
        x_RD, w_in, w_out = self._of_one_dtype(x_RD)
        require_values(w_in, x_RD)
        if can_group(x_RD, w_in) and can_group(x_RD, w_out):
            linear = grouped_linear
        else:
            linear = opaque_linear if torch.compiler.is_compiling() or not holds_values(x_RD) else loop_linear
        # (R, D) → (R, F), or (R, 2F) when gated
        hidden_RF = add_bias(linear(x_RD, w_in, ends_E), self.b_in, ends_E)
        # (R, F)
        if self.gated:
            gate_RF, up_RF = hidden_RF.chunk(2, dim=-1)
            hidden_RF = self.function(gate_RF) * up_RF
        else:
            hidden_RF = self.function(hidden_RF)
        hidden_RF = F.dropout(hidden_RF, self.dropout, self.training)
        # (R, F) → (R, D)
        return add_bias(linear(hidden_RF, w_out, ends_E), self.b_out, ends_E)

    def _of_one_dtype(self, x_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and weights in the dtype of autocast, which does not know `grouped_mm`; else as they are."""
        if not x_RD.is_meta and torch.is_autocast_enabled(x_RD.device.type):
            dtype = torch.get_autocast_dtype(x_RD.device.type)
            return x_RD.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)
        if x_RD.dtype != self.w_in.dtype:
            raise TypeError(
                f"x must have the dtype of the experts' weights, {self.w_in.dtype}, got {x_RD.dtype}; call "
                f"x.to({self.w_in.dtype}), layer.to({x_RD.dtype}), or compute within torch.autocast"
            )
        return x_RD, self.w_in, self.w_out


def require_values(weights: Tensor, x: Tensor) -> None:
    """Refuse weights on the meta device, or what came of them, for tokens that are not there.

    Raises:
        ValueError: the weights hold no values.
    """
    if weights.is_meta and not x.is_meta:
        raise ValueError(
            f"the layer's weights are on the meta device and hold no values, but x is on {x.device}; call "
            f'layer.to_empty(device="{x.device}") and reset_parameters of its modules, or load a checkpoint with '
            "assign=True"
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
