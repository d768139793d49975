"""What a router remembers from step to step, kept where it survives what is done to models.

- Values (a bias, a moving average) stay float32 when the model is cast to bfloat16: a bias that moves by 0.001 a step
  would not move at all in bfloat16. They survive `to_empty` too, and are what they were at first when a model comes
  from the meta device.
- Counts are int64. They are of the whole batch: summed over the micro-batches of a step as these come, over the ranks
  when the step ends. A forward pass that is repeated for activation checkpointing counts once, evaluation never.
- All of it is in the `state_dict`, the counts of an unfinished step too, so that a resumed run continues alike. (Not
  what the loss of the global batch has seen of an unfinished step: with that one, save between steps.) The
  counts themselves are no buffers: DistributedDataParallel would overwrite them with those of rank 0 before every
  forward pass. Their copies for the `state_dict` are, since tools for checkpoints look for parameters and buffers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkroute._operations import define

__all__ = ["RouterState", "recomputing"]


def recomputing() -> bool:
    """Whether this code runs inside a backward pass: a forward pass there is a repetition (activation checkpointing).

    >>> recomputing()
    False
    """
    # What torch.utils.checkpoint itself asks. A compiler cannot trace it, and what it traced would ask no more.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _count(total: Tensor, part: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:
        total.add_(part)


# To the compiler one opaque operation, which asks when it runs: a compiled layer may be checkpointed, too.
define("count(Tensor(a!) total, Tensor part) -> ()", _count, lambda total, part: None)


class RouterState(nn.Module):
    """Values that persist, and what was counted since the step began.

    Args:
        num_experts: E.
        sums: name → how many; further numbers (float64) that are summed over a step beside the load.
        values: name → initial value, made with `device="cpu"`; registered as buffers, which keep their dtype whatever
            the model is cast to.

    Attributes:
        current: the step that the counts are of, −1 before the first.
        ended: the last step whose counts went into the values, −1 before the first.
        load_E: (E,) int64, choices in the current step, on this rank.
        sums: name → (n,) float64, added up in the current step, on this rank; each is an attribute too.

    Raises:
        ValueError: an initial value on the meta device, which holds nothing.
    """

    def __init__(self, num_experts: int, *, sums: dict[str, int] | None = None, **values: Tensor) -> None:
        super().__init__()
        self.current, self.ended = -1, -1
        self._sum_names = tuple(sums or ())
        self.load_E = torch.zeros(num_experts, dtype=torch.int64, device="cpu")
        for name, size in (sums or {}).items():
            setattr(self, name, torch.zeros(size, dtype=torch.float64, device="cpu"))
        for name, value in values.items():
            if value.is_meta:
                raise ValueError(f'{name} is on the meta device and has no value; make it with device="cpu"')
        # Whatever the default dtype was when they were made.
        values = {name: value.float() if value.is_floating_point() else value for name, value in values.items()}
        copies = {"saved_steps": self._steps(), **{f"saved_{name}": count for name, count in self._counts().items()}}
        self._initial = {name: value.clone() for name, value in (values | copies).items()}
        device = torch.empty(0).device  # the default one
        for name, value in self._initial.items():
            self.register_buffer(name, value.clone().to(device))
        self._move_counts(device)

    if TYPE_CHECKING:  # what was registered

        def __getattr__(self, name: str) -> Tensor: ...

    def _steps(self) -> Tensor:
        return torch.tensor([self.current, self.ended], device="cpu")

    def _counts(self) -> dict[str, Tensor]:
        return {"load_E": self.load_E, **self.sums}

    @property
    def sums(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._sum_names}

    @torch.no_grad()
    def note(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        """Add the counts of a micro-batch, unless it is a repetition."""
        self._move_counts(load_E.device)  # the router has no parameters that would have told it
        torch.ops.sinkroute.count(self.load_E, load_E)
        for name, value in sums.items():
            torch.ops.sinkroute.count(getattr(self, name), value)

    def pending(self) -> Tensor:
        """What was counted, in one float64 vector: counts are exact in it up to 2^53."""
        return torch.cat([self.load_E.double(), *self.sums.values()])

    def split(self, totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`pending()`, summed over ranks, as load (int64) and sums."""
        load_E, *parts = totals.split([len(self.load_E), *map(len, self.sums.values())])
        return load_E.long(), dict(zip(self.sums, parts, strict=True))

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing to be brought up to date: the same on all ranks, and known without a device."""
        return self.current == self.ended

    def begin(self, step: int) -> None:
        """From now on it is this step that is counted."""
        if step != self.current:
            # What was counted since the last end was of no step: a trial before training, a pass after `end_step`.
            self._clear()
            self.current = step
        elif step == self.ended:  # the same step once more, as after a resume
            self.ended = -1

    def end(self) -> None:
        """The counts of the current step have gone into the values."""
        self.ended = self.current
        self._clear()

    def _clear(self) -> None:
        for counted in self._counts().values():
            counted.zero_()

    def reset_parameters(self) -> None:
        """Forget everything. (By this name, what fills models that come from the meta device finds it.)"""
        with torch.no_grad():
            for name, value in self._initial.items():
                getattr(self, name).copy_(value)
        self.current, self.ended = -1, -1
        self._clear()

    def _move_counts(self, device: torch.device) -> None:
        if self.load_E.device == device or device.type == "meta":  # nothing can be counted there
            return
        for name, counted in self._counts().items():
            setattr(self, name, counted.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterState:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            assert value is not None
            # Of what fn does, only the move: no other dtype, no emptiness.
            setattr(self, name, (self._initial[name] if value.is_meta else value).to(getattr(self, name).device))
        self._move_counts(fn(self.load_E).device)
        return self

    @torch.no_grad()
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in {"steps": self._steps(), **self._counts()}.items():
            getattr(self, f"saved_{name}").copy_(value)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, value in self._initial.items():  # `assign=True` takes tensors as they are
            setattr(self, name, getattr(self, name).to(value.dtype))
        if f"{prefix}saved_steps" not in state_dict or self.saved_steps.is_meta:
            return
        self.current, self.ended = self.saved_steps.tolist()
        for name, counted in self._counts().items():
            counted.copy_(getattr(self, f"saved_{name}"))
