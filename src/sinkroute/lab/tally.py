"""What a line of the log tells of the steps since the line before it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sinkroute.lab.models import SparseModel
from sinkroute.routing.metrics import max_violation

__all__ = ["State", "Tally"]


@dataclass
class State:
    """What a resumed run must know beside weights and optimiser."""

    step: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """Sums since the last line of the log. Tensors stay on their device until a line is written."""

    steps: int = 0
    loss: Tensor | float = 0.0
    auxiliary: Tensor | None = None
    load_LE: Tensor | int = 0
    dropped: Tensor | None = None
    max_vio_L: Tensor | float = 0.0
    step_loss: Tensor | float = 0.0
    step_load_LE: Tensor | int = 0
    step_sinkhorn: bool = False
    loss_of_steps: list[Tensor] = field(default_factory=list)
    max_vio_of_steps: list[Tensor] = field(default_factory=list)
    branches: Counter[str] = field(default_factory=Counter)
    sinkhorn_steps: int = 0
    plan_passes: int | Tensor = 0
    grad_norm: Tensor | float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add_micro_batch(self, model: SparseModel, loss: Tensor, auxiliary: Tensor | None, accumulation: int) -> None:
        self.loss = self.loss + loss.detach() / accumulation
        self.step_loss = self.step_loss + loss.detach() / accumulation
        if auxiliary is not None:
            self.auxiliary = (0.0 if self.auxiliary is None else self.auxiliary) + auxiliary.detach() / accumulation
        routes = [layer.routes for layer in model.moe_layers if layer.routes is not None]
        self.step_load_LE = self.step_load_LE + torch.stack([route.load for route in routes])
        if left_out := [layer.dropped for layer in model.moe_layers if layer.dropped is not None]:
            self.dropped = torch.stack(left_out).sum() + (0 if self.dropped is None else self.dropped)
        self.branches.update(route.branch for route in routes)
        self.step_sinkhorn = self.step_sinkhorn or any(route.branch == "sinkhorn" for route in routes)
        self.plan_passes += sum(route.plan_passes or 0 for route in routes)

    def end_step(self, accelerator: Accelerator) -> None:
        """The load of a step is that of its whole batch: over micro-batches and processes."""
        load_LE = accelerator.reduce(self.step_load_LE, "sum")
        self.load_LE = self.load_LE + load_LE
        max_vio_L = max_violation(load_LE)
        self.max_vio_L = self.max_vio_L + max_vio_L
        self.max_vio_of_steps.append(max_vio_L.mean())
        self.loss_of_steps.append(torch.as_tensor(self.step_loss))
        self.sinkhorn_steps += self.step_sinkhorn
        self.step_loss, self.step_load_LE, self.step_sinkhorn = 0.0, 0, False
        self.steps += 1

    def line(
        self,
        accelerator: Accelerator,
        state: State,
        seconds: float,
        lr: float,
        tokens_per_step: int,
        *,
        each_step: bool,
    ) -> dict[str, Any]:
        """Means over the steps since the last line; `each_step`: and loss and MaxVio of each of them."""
        assert isinstance(self.load_LE, Tensor) and isinstance(self.max_vio_L, Tensor)
        loss = accelerator.reduce(self.loss, "mean")
        auxiliary = None if self.auxiliary is None else accelerator.reduce(self.auxiliary, "mean")
        line = {
            "kind": "train",
            "step": state.step,
            "loss": loss.item() / self.steps,
            "aux_loss": None if auxiliary is None else auxiliary.item() / self.steps,
            "lr": lr,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": self.steps * tokens_per_step / (time.perf_counter() - self.since),
            "seconds": seconds,
            "max_vio": (self.max_vio_L / self.steps).tolist(),
            "load": self.load_LE.tolist(),
            "branches": dict(self.branches),
            "sinkhorn_steps": self.sinkhorn_steps,
            "plan_passes": int(self.plan_passes),
        }
        if self.dropped is not None:  # of the choices, which are counted in the load
            line["dropped"] = (accelerator.reduce(self.dropped, "sum") / self.load_LE.sum()).item()
        if each_step:
            losses = accelerator.reduce(torch.stack(self.loss_of_steps), "mean")
            line["each_step"] = {"loss": losses.tolist(), "max_vio": torch.stack(self.max_vio_of_steps).tolist()}
        return line

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]
