"""What a router remembers from step to step, kept where it survives what is done to models.

- Values (a bias, a moving average) stay float32 when the model is cast to bfloat16: a bias that moves by 0.001 a step
  would not move at all in bfloat16. They survive `to_empty` too, and are what they were at first when a model comes
  from the meta device.
- Counts are int64. They are of the whole batch: summed over the micro-batches of a step as these come, over the ranks
  when the step ends. A forward pass that is repeated for activation checkpointing counts once, evaluation never.
- Whole numbers and flags are floats too where they are buffers, read by rounding. Tools that average models (EMA, SWA)
  take buffers for numbers: 0.99 · 5 + 0.01 · 5 is 4 in int64, and a bool cannot be averaged at all. As floats, averages
  of equal ones are equal.
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

from sinkroute.kernels.operations import define

__all__ = ["KeepsDtypes", "RouterState", "check_table", "recomputing", "whole"]


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


def whole(values: Tensor) -> Tensor:
    """Whole numbers that are kept as floats, as int64.

    >>> whole(torch.tensor([4.9999, -1.0]))
    tensor([ 5, -1])
    """
    return values.round().long()


def check_table(table: Tensor | None, name: str, num_experts: int) -> None:
    """Refuse a table of experts from a checkpoint whose dtype cannot hold their numbers.

    Raises:
        ValueError: it was cast to a dtype that is too narrow.

    >>> check_table(torch.zeros(2, 2, dtype=torch.bfloat16), "gate.table_VK", 300)
    Traceback (most recent call last):
    ValueError: gate.table_VK is torch.bfloat16, which holds whole numbers up to 256 only, ...
    """
    if table is None or not table.is_floating_point():
        return
    most = 2 / torch.finfo(table.dtype).eps
    if num_experts - 1 > most:
        raise ValueError(
            f"{name} is {table.dtype}, which holds whole numbers up to {most:g} only, and there are {num_experts} "
            "experts; save the checkpoint without casting this tensor"
        )


class KeepsDtypes(nn.Module):
    """A module whose buffers keep their dtype when the model is cast, and move with it otherwise.

    For whole numbers that are kept as floats: bfloat16 holds them up to 256 only.

    >>> module = KeepsDtypes()
    >>> module.register_buffer("table", torch.tensor([257.0]))
    >>> module.bfloat16().table
    tensor([257.])
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtypes:
        before = dict(self._buffers)
        with torch.inference_mode(False):  # or what is moved in inference mode could not be written to outside it
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, value in before.items():
                now = self._buffers[name]
                if value is not None and now is not None and now.dtype != value.dtype:
                    self._buffers[name] = value.to(now.device)
        return self


class RouterState(nn.Module):
    """Values that persist, and what was counted since the step began.

    Args:
        num_experts: E.
        sums: name → how many; further numbers (float64) that are summed over a step beside the load.
        values: name → initial value of any float dtype, made with `device="cpu"`; registered as float32 buffers, which
            they stay whatever the model is cast to. A flag is 0.0 or 1.0, and read by a threshold.

    Attributes:
        current: the step that the counts are of, −1 before the first.
        ended: the last step whose counts went into the values, −1 before the first.
        load_E: (E,) int64, choices in the current step, on this rank.
        sums: name → (n,) float64, added up in the current step, on this rank; each is an attribute too.

    Raises:
        ValueError: an initial value on the meta device, which holds nothing.
        TypeError: an initial value that is no float; averages of a model would spoil it.

    >>> state = RouterState(4, bias_E=torch.zeros(4, device="cpu"))
    >>> state.begin(7)
    >>> state.note(torch.tensor([3, 1, 0, 0]), {})
    >>> state.load_E, state.current, state.ended
    (tensor([3, 1, 0, 0]), 7, -1)
    """

    @torch.inference_mode(False)  # tensors of inference mode could not be written to outside it
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
            if not value.is_floating_point():
                raise TypeError(f"{name} must be a float tensor, got {value.dtype}; keep a flag as 0.0 or 1.0")
        # Whatever the default dtype was when they were made.
        values = {name: value.float() for name, value in values.items()}
        copies = {f"saved_{name}": count.double() for name, count in self._counts().items()}
        self._initial: dict[str, Tensor] = {}
        device = torch.empty(0).device  # the default one
        self._register(values | {"saved_steps": self._steps(), **copies}, device)
        self._move_counts(device)

    def _register(self, values: dict[str, Tensor], device: torch.device) -> None:
        for name, value in values.items():
            self._initial[name] = value.clone()
            self.register_buffer(name, value.clone().to(device))

    @torch.inference_mode(False)
    def add_sums(self, **sizes: int) -> None:
        """Sum further numbers over a step from now on, as those of `sums`; what is summed already stays.

        >>> state = RouterState(4)
        >>> state.add_sums(token=3)
        >>> state.token
        tensor([0., 0., 0.], dtype=torch.float64)
        """
        for name in sizes:  # in this order: on all ranks the same, as they are summed by their places
            if name in self._sum_names:
                continue
            self._sum_names += (name,)
            count = torch.zeros(sizes[name], dtype=torch.float64, device="cpu")
            setattr(self, name, count.to(self.load_E.device))
            self._register({f"saved_{name}": count}, self.saved_steps.device)

    if TYPE_CHECKING:  # what was registered

        def __getattr__(self, name: str) -> Tensor: ...

    def _steps(self) -> Tensor:
        return torch.tensor([self.current, self.ended], dtype=torch.float64, device="cpu")

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
        with torch.inference_mode(False):
            for name, counted in self._counts().items():
                setattr(self, name, counted.to(device))

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterState:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            assert value is not None
            # Of what fn does, only the move: no other dtype, no emptiness.
            value = self._initial[name].clone() if value.is_meta else value
            setattr(self, name, value.to(getattr(self, name).device))
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
        saved = [self.saved_steps, *(getattr(self, f"saved_{name}") for name in self._counts())]
        if not all(bool(value.isfinite().all()) for value in saved):
            # A checkpoint in a dtype that is too narrow for them: what was counted is lost, one step of many.
            self.current, self.ended = -1, -1
            self._clear()
            return
        self.current, self.ended = (round(step) for step in self.saved_steps.tolist())
        for name, counted in self._counts().items():
            value = getattr(self, f"saved_{name}")
            counted.copy_(value if counted.is_floating_point() else value.round())
