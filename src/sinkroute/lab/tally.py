"""What a line of the log tells of the steps since the line before it: the monitor's loads, and what it cannot know."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sinkroute.lab.models import SparseModel
from sinkroute.routing import LoadMonitor
from sinkroute.routing.metrics import max_violation

__all__ = ["State", "Tally"]


@dataclass
class State:
    """What a resumed run must know beside weights and optimiser."""

    step: int = 0
    seconds: float = 0.0


class Tally:
    """Sums since the last line of the log. Tensors stay on their device until a line is written.

    Args:
        model: its routers are watched until `close`.
        each_step: whether a line has loss and MaxVio of each step too.
    """

    def __init__(self, model: SparseModel, each_step: bool = False) -> None:
        self.model, self.each_step, self.monitor = model, each_step, LoadMonitor(model)
        self.grad_norm: Tensor | float = 0.0
        self.clear()

    def clear(self) -> None:
        self.monitor.reset("train")
        self.loss: Tensor | float = 0.0
        self.step_loss: Tensor | float = 0.0
        self.auxiliary: Tensor | None = None
        self.load_LE: Tensor | int = 0
        self.dropped: Tensor | None = None
        self.of_steps: dict[str, list[Tensor]] = {"loss": [], "max_vio": []}
        self.since = time.perf_counter()

    def close(self) -> None:
        self.monitor.remove()

    def add_micro_batch(self, loss: Tensor, auxiliary: Tensor | None, accumulation: int) -> None:
        self.loss = self.loss + loss.detach() / accumulation
        self.step_loss = self.step_loss + loss.detach() / accumulation
        if auxiliary is not None:
            self.auxiliary = (0.0 if self.auxiliary is None else self.auxiliary) + auxiliary.detach() / accumulation
        if left_out := [layer.dropped for layer in self.model.moe_layers if layer.dropped is not None]:
            self.dropped = torch.stack(left_out).sum() + (0 if self.dropped is None else self.dropped)

    def end_step(self) -> None:
        """The load of a step is that of its whole batch: over micro-batches and processes."""
        load_LE = torch.stack(list(self.monitor.end_step(process_group="world").values()))
        self.load_LE = self.load_LE + load_LE
        if self.each_step:
            self.of_steps["loss"].append(torch.as_tensor(self.step_loss))
            self.of_steps["max_vio"].append(max_violation(load_LE).mean())
        self.step_loss = 0.0

    def line(
        self, accelerator: Accelerator, state: State, seconds: float, lr: float, tokens_per_step: int
    ) -> dict[str, Any]:
        """Means over the steps since the last line."""
        assert isinstance(self.load_LE, Tensor)
        loss = accelerator.reduce(self.loss, "mean").item()  # waits for the device: what is timed is done
        elapsed = time.perf_counter() - self.since
        auxiliary = None if self.auxiliary is None else accelerator.reduce(self.auxiliary, "mean")
        layers, (steps, planned) = self.monitor.metrics().values(), self.monitor.steps().values()
        branches: dict[str, int] = {}
        for layer in layers:
            for name, passes in layer["branches"].items():
                branches[name] = branches.get(name, 0) + passes
        line = {
            "kind": "train",
            "step": state.step,
            "loss": loss / steps,
            "aux_loss": None if auxiliary is None else auxiliary.item() / steps,
            "lr": lr,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": steps * tokens_per_step / elapsed,
            "seconds": seconds,
            "max_vio": [layer["max_vio_step"] for layer in layers],
            "load": self.load_LE.tolist(),
            "branches": branches,
            "sinkhorn_steps": planned,
            "plan_passes": sum(round((layer["plan_passes"] or 0) * layer["plans"]) for layer in layers),
        }
        if self.dropped is not None:  # of the choices, which are counted in the load
            line["dropped"] = (accelerator.reduce(self.dropped, "sum") / self.load_LE.sum()).item()
        if self.each_step:
            losses = accelerator.reduce(torch.stack(self.of_steps["loss"]), "mean")
            line["each_step"] = {"loss": losses.tolist(), "max_vio": torch.stack(self.of_steps["max_vio"]).tolist()}
        return line
