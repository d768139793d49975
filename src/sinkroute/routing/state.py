"""What a router remembers from step to step, kept where it survives what is done to models.

- Values (a bias, a moving average) stay float32 when the model is cast to bfloat16: a bias that moves by 0.001 a step
  would not move at all in bfloat16.
- Counts are int64. They are of the whole batch: summed over the micro-batches of a step as these come, over the ranks
  when the step ends. A forward pass that is repeated for activation checkpointing counts once, evaluation never.
- All of it is in the `state_dict`, the counts of an unfinished step too, so that a resumed run continues alike. The
  counts are no buffers: DistributedDataParallel would overwrite them with those of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

__all__ = ["RouterState", "recomputing"]


def recomputing() -> bool:
    """Whether this code runs inside a backward pass: a forward pass there is a repetition (activation checkpointing).

    >>> recomputing()
    False
    """
    # What torch.utils.checkpoint itself asks. Nothing compiled asks it: there, a repetition is no second call.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RouterState(nn.Module):
    """Values that persist, and what was counted since the step began.

    Args:
        num_experts: E.
        sums: name → how many; further numbers (float64) that are summed over a step beside the load.
        values: name → initial value, registered as buffers; they keep their dtype whatever the model is cast to.

    Attributes:
        current: the step that the counts are of, −1 before the first.
        ended: the last step whose counts went into the values, −1 before the first.
        load_E: (E,) int64, choices in the current step, on this rank.
        sums: name → (n,) float64, added up in the current step, on this rank; each is an attribute too.
    """

    def __init__(self, num_experts: int, *, sums: dict[str, int] | None = None, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value)
        self.current, self.ended = -1, -1
        self.load_E = torch.zeros(num_experts, dtype=torch.int64)
        self._sum_names = tuple(sums or ())
        for name, size in (sums or {}).items():
            setattr(self, name, torch.zeros(size, dtype=torch.float64))

    if TYPE_CHECKING:  # what was registered

        def __getattr__(self, name: str) -> Tensor: ...

    @property
    def sums(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._sum_names}

    @torch.no_grad()
    def note(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        """Add the counts of a micro-batch, unless it is a repetition."""
        if recomputing():
            return
        if self.load_E.device != load_E.device:  # the router has no parameters that would have told it
            for name in ("load_E", *self._sum_names):
                setattr(self, name, getattr(self, name).to(load_E.device))
        self.load_E += load_E
        for name, value in sums.items():
            getattr(self, name).add_(value)

    def pending(self) -> Tensor:
        """What was counted, in one float64 vector: counts are exact in it up to 2^53."""
        return torch.cat([self.load_E.double(), *self.sums.values()])

    def split(self, totals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`pending()`, summed over ranks, as load (int64) and sums."""
        load_E, *parts = totals.split([len(self.load_E), *map(len, self.sums.values())])
        return load_E.long(), dict(zip(self.sums, parts, strict=True))

    @property
    def steps(self) -> Tensor:
        """`current` and `ended`, as they are saved."""
        return torch.tensor([self.current, self.ended])

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing to be brought up to date: the same on all ranks, and known without a device."""
        return self.current == self.ended

    def end(self) -> None:
        """The counts of the current step have gone into the values."""
        self.ended = self.current
        for counted in (self.load_E, *self.sums.values()):
            counted.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterState:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if value is not None:
                self._buffers[name] = _moved(value, fn)
        for name in ("load_E", *self._sum_names):
            setattr(self, name, _moved(getattr(self, name), fn))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "steps"] = self.steps
        for name, counted in {"load_E": self.load_E, **self.sums}.items():
            destination[prefix + name] = counted.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        steps = self.steps
        own = {prefix + name: mine for name, mine in {"steps": steps, "load_E": self.load_E, **self.sums}.items()}
        for key, mine in own.items():
            theirs = state_dict.get(key)
            if theirs is None:
                missing_keys.append(key)
            elif theirs.shape != mine.shape:
                error_msgs.append(f"size mismatch for {key}: {tuple(theirs.shape)} saved, {tuple(mine.shape)} here.")
            else:
                mine.copy_(theirs)
        self.current, self.ended = steps.tolist()
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _moved(value: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What `fn` makes of a tensor, without a change of dtype."""
    new = fn(value)
    if new.dtype == value.dtype:
        return new
    return torch.empty_like(value, device=new.device) if value.is_meta or new.is_meta else value.to(new.device)
