"""How good a model is on a text, and how its experts share the work when it serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sinkroute.lab.data import evaluation_windows
from sinkroute.lab.model import Decoder
from sinkroute.routing import Router
from sinkroute.routing.metrics import load_metrics, max_violation

__all__ = ["Evaluation", "evaluate_text"]


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a text found.

    Attributes:
        bytes: how many bytes were predicted, each once.
        bits_per_byte: mean −log2 of the probability given to the right byte.
        load_LE: choices per mixture layer and expert over the whole text, int64.
        max_vio_batch: MaxVio of single forward passes, averaged over passes and layers.
    """

    bytes: int
    bits_per_byte: float
    load_LE: Tensor
    max_vio_batch: float

    @property
    def perplexity(self) -> float:
        """Per byte: 2 to the bits per byte."""
        return 2**self.bits_per_byte

    def serving(self) -> dict[str, object]:
        """Load metrics: MaxVio, entropy and CV averaged over layers, dead experts summed, and the counts themselves."""
        layers = [load_metrics(load_E) for load_E in self.load_LE]
        mean = {name: sum(layer[name] for layer in layers) / len(layers) for name in ("max_vio", "entropy", "cv")}
        return {
            **mean,
            "max_vio_batch": self.max_vio_batch,
            "dead": sum(int(layer["dead"]) for layer in layers),
            "experts": self.load_LE.numel(),
            "load": self.load_LE.tolist(),
        }


@torch.no_grad()
def evaluate_text(
    model: Decoder,
    text: np.ndarray,
    *,
    length: int,
    batch: int,
    before: int = 0x0A,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict every byte of `text` once, in windows of `length`, as the model serves.

    Args:
        model: in any mode; it is evaluated in `eval()` mode and left in the one it was in.
        text: uint8, at least one byte.
        length: of the windows; a byte sees what stands before it in its window.
        batch: windows in a forward pass.
        before: the byte that stands before the text.
        on_batch: told (windows done, windows in all) after each forward pass.

    Raises:
        ValueError: an empty text.
    """
    inputs, targets, mask = evaluation_windows(text, length, before)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, violations = 0.0, []
    load_LE = torch.zeros(1, dtype=torch.int64)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for number, start in enumerate(range(0, len(inputs), batch)):
        for router in routers:
            router.micro_batch = number  # a router that is noisy when serving must not repeat itself
        rows = slice(start, start + batch)
        symbols_BL = torch.from_numpy(inputs[rows].astype(np.int64)).to(device)
        targets_BL = torch.from_numpy(targets[rows].astype(np.int64)).to(device)
        mask_BL = None if mask[rows].all() else torch.from_numpy(mask[rows]).to(device)
        scores_BLV = model(symbols_BL, mask_BL)
        nats_BL = F.cross_entropy(scores_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="none").view_as(
            targets_BL
        )
        # Summed in float64: the text may have 10^8 bytes.
        nats += (nats_BL if mask_BL is None else nats_BL * mask_BL).double().sum().item()
        loads = torch.stack([layer.routes.load for layer in model.moe_layers if layer.routes is not None]).cpu()
        load_LE = load_LE + loads
        violations.append(max_violation(loads).mean().item())
        if on_batch is not None:
            on_batch(min(start + batch, len(inputs)), len(inputs))
    model.train(was_training)
    return Evaluation(len(text), nats / len(text) / math.log(2), load_LE, sum(violations) / len(violations))
