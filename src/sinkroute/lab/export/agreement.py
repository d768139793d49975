"""Whether two models say the same: measured at every export, on symbols that no model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkroute.lab.models import SparseModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Agreement", "measure_agreement"]

_ROWS = 8


@dataclass(frozen=True)
class Agreement:
    """Of one forward pass.

    Attributes:
        symbols: how many were looked at.
        logit_difference: the largest absolute difference of a logit.
        usual_difference: the largest of a symbol's logits, at the median symbol.
        logit_size: the largest absolute logit, for comparison.
        same_best: share of the symbols after which both expect the same one.
        same_experts: share of (symbol, layer) with the same set of experts. Where scores are all but equal, rounding
            chooses.
    """

    symbols: int
    logit_difference: float
    usual_difference: float
    logit_size: float
    same_best: float
    same_experts: float


@torch.no_grad()
def measure_agreement(decoder: SparseModel, exported: PreTrainedModel, length: int) -> Agreement:
    """Compare on 8 rows of `length` random symbols, the same at every call; both models as they serve."""
    generator = torch.Generator().manual_seed(0)
    symbols_BL = torch.randint(0, exported.config.vocab_size, (_ROWS, length), generator=generator)
    chosen: list[Tensor] = []

    def note(gate: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen.append(output[2])

    layers: Any = exported.get_decoder().layers
    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in layers]
    was_training = decoder.training
    try:
        expected_BLV = decoder.eval()(symbols_BL)
        found_BLV = exported(symbols_BL, use_cache=False).logits
    finally:
        decoder.train(was_training)
        for hook in hooks:
            hook.remove()
    routes = [layer.routes.experts for layer in decoder.moe_layers if layer.routes is not None]
    same = [
        (ours.sort(-1).values == theirs.sort(-1).values).all(-1) for ours, theirs in zip(routes, chosen, strict=True)
    ]
    difference_BL = (expected_BLV - found_BLV).abs().amax(-1)
    return Agreement(
        symbols=symbols_BL.numel(),
        logit_difference=difference_BL.max().item(),
        usual_difference=difference_BL.median().item(),
        logit_size=expected_BLV.abs().max().item(),
        same_best=(expected_BLV.argmax(-1) == found_BLV.argmax(-1)).double().mean().item(),
        same_experts=torch.stack(same).double().mean().item(),
    )
