"""What an evaluation finds: how good a model is, and how its experts share the work when it serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sinkroute.lab.data import evaluation_windows
from sinkroute.lab.models import SparseModel
from sinkroute.routing import LoadMonitor
from sinkroute.routing.attached import named_routers
from sinkroute.routing.metrics import load_metrics, max_violation

__all__ = ["Evaluation", "Score", "evaluate_text", "serving_mode"]


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a text or over images found.

    Attributes:
        count: symbols or images that were predicted, each once.
        nats: mean −ln of the probability given to the right answer.
        wrong: how many answers were not the right one.
        load_LE: choices per mixture layer and expert over all of it, int64.
        max_vio_batch: MaxVio of single forward passes, averaged over passes and layers.
    """

    count: int
    nats: float
    wrong: int
    load_LE: Tensor
    max_vio_batch: float

    @property
    def bits(self) -> float:
        """Mean −log2 of the probability given to the right answer; of bytes, bits per byte."""
        return self.nats / math.log(2)

    @property
    def perplexity(self) -> float:
        """Per symbol: e to the nats."""
        return math.exp(min(self.nats, 700.0))

    @property
    def error(self) -> float:
        """Wrong answers in per cent."""
        return 100 * self.wrong / self.count

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


class serving_mode:
    """A model as it serves, inside a `with`: no gradients, `eval()`, its routers watched and told which pass it is.

    A router that is noisy when serving must not repeat itself, nor depend on what was evaluated before.
    """

    def __init__(self, model: SparseModel) -> None:
        self.model, self.was_training, self.no_grad = model, model.training, torch.no_grad()
        self.routers = list(named_routers(model).values())

    def __enter__(self) -> serving_mode:
        self.monitor = LoadMonitor(self.model)
        self.model.eval()
        self.no_grad.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.no_grad.__exit__(*error)
        self.monitor.remove()
        self.model.train(self.was_training)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a backward pass would have done it: whole weights are no parameters of the optimiser

    def begin_pass(self, number: int) -> None:
        for router in self.routers:
            router.clock.micro_batch = number

    def loads(self) -> Tensor:
        """(L, E) int64 on the CPU: the choices in the passes since the last call."""
        return torch.stack(list(self.monitor.end_step("eval").values())).cpu()


@dataclass
class Score:
    """Adds up what single forward passes find. Sums are float64: a text may have 10^8 symbols."""

    count: int = 0
    nats: float = 0.0
    wrong: int = 0
    load_LE: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    violations: list[float] = field(default_factory=list)

    def add(self, scores: Tensor, targets: Tensor, mask: Tensor | None = None) -> None:
        """Scores (..., V) against targets (...) int64, where `mask` (...) bool is True or everywhere."""
        kept = slice(None) if mask is None else mask.flatten()
        rows_TV, targets_T = scores.flatten(0, -2)[kept].float(), targets.flatten()[kept]
        self.count += len(targets_T)
        self.nats += F.cross_entropy(rows_TV, targets_T, reduction="none").double().sum().item()
        self.wrong += int((rows_TV.argmax(-1) != targets_T).sum())

    def add_loads(self, loads_LE: Tensor) -> None:
        """What `serving_mode.loads` tells of the pass that the model has just made."""
        self.load_LE = self.load_LE + loads_LE
        self.violations.append(max_violation(loads_LE).mean().item())

    def found(self) -> Evaluation:
        violation = sum(self.violations) / len(self.violations)
        return Evaluation(self.count, self.nats / self.count, self.wrong, self.load_LE, violation)


def evaluate_text(
    model: SparseModel,
    text: np.ndarray,
    *,
    length: int,
    batch: int,
    before: int = 0x0A,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict every symbol of `text` once, in windows of `length`, as the model serves.

    Args:
        model: in any mode; it is evaluated in `eval()` mode and left in the one it was in.
        text: (n,) integers, at least one.
        length: of the windows; a symbol sees what stands before it in its window.
        batch: windows in a forward pass.
        before: the symbol that stands before the text.
        on_batch: told (windows done, windows in all) after each forward pass.

    Raises:
        ValueError: an empty text.
    """
    inputs, targets, mask = evaluation_windows(text, length, before)
    device = next(model.parameters()).device
    score = Score()
    with serving_mode(model) as serving:
        for number, start in enumerate(range(0, len(inputs), batch)):
            serving.begin_pass(number)
            rows = slice(start, start + batch)
            symbols_BL = torch.from_numpy(inputs[rows].astype(np.int64)).to(device)
            targets_BL = torch.from_numpy(targets[rows].astype(np.int64)).to(device)
            mask_BL = None if mask[rows].all() else torch.from_numpy(mask[rows]).to(device)
            score.add(model(symbols_BL, mask_BL), targets_BL, mask_BL)
            score.add_loads(serving.loads())
            if on_batch is not None:
                on_batch(min(start + batch, len(inputs)), len(inputs))
    return score.found()
