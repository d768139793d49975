"""Which pass of the training this is: what keys the random draws, and what notices that nobody tells the steps."""

from __future__ import annotations

import warnings

import torch

from sinkroute.routing.draws import hash63

__all__ = ["Clock", "Draws", "warn_of_passes"]

# After so many passes without set_step, accumulation and recomputation cannot explain it: somebody forgot.
_PASSES_BEFORE_WARNING = 64
# Nor after so many of one step, however often set_step was called for it.
_PASSES_OF_A_STEP = 4096


class Clock:
    """The step and the micro-batch that `set_step` told last.

    Attributes:
        step, micro_batch: 0 until they are told.
        told: whether they were.
        total_steps: the length of the training, or None.
        micro_batches: how many a step has, or None where nobody told.
    """

    def __init__(self) -> None:
        self.step, self.micro_batch, self.told = 0, 0, False
        self.total_steps: int | None = None
        self.micro_batches: int | None = None
        self._of_call = self._of_step = 0  # training passes since it was set, and of this step

    def set(
        self, step: int, micro_batch: int, total_steps: int | None = None, micro_batches: int | None = None
    ) -> bool:
        """Go on to this step and micro-batch; whether the step is another one."""
        is_new = (step, True) != (self.step, self.told)
        self._of_step = 0 if is_new else self._of_step
        self._of_call = 0
        self.step, self.micro_batch, self.told = step, micro_batch, True
        self.total_steps = self.total_steps if total_steps is None else total_steps
        self.micro_batches = self.micro_batches if micro_batches is None else micro_batches
        return is_new

    def count_pass(self) -> int:
        """One more training pass: how many there were, if those are too many for one step, else 0."""
        self._of_call += 1
        self._of_step += 1
        # A step that was told may have that many passes; before it is told, one fewer: nobody waits for it.
        if self._of_call <= _PASSES_BEFORE_WARNING - (not self.told) and self._of_step <= _PASSES_OF_A_STEP:
            return 0
        passes = max(self._of_call, self._of_step)
        self._of_call = self._of_step = 0
        return passes


class Draws:
    """The seed of a pass's noise, in a tensor that keeps its place: a compiled graph reads it anew."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # or it could not be written to outside it
            self.seed = torch.zeros((), dtype=torch.int64, device="cpu")
        self._key: tuple[int, ...] | None = None

    def update(self, *key: int) -> None:
        """Make the seed that of this key: seed, layer, step, micro-batch, rank."""
        if key != self._key:
            # A function that torch.func transforms may write to nothing from outside; this is no value of such a one.
            with torch._C._DisableFuncTorch():
                self.seed.fill_(hash63("noise", *key))
            self._key = key


def warn_of_passes(name: str, passes: int, step: int, of_batch: bool) -> None:
    """Say that nobody tells a router the steps.

    Args:
        name: of the router.
        passes: so many were of this step.
        step: the last that it was told.
        of_batch: whether it has a loss of the global batch.
    """
    warnings.warn(
        f"{name} has been trained {passes} times for step {step}: its random draws repeat, its state does not move"
        f"{', the load of its global batch begins anew' if of_batch else ''}. Call sinkroute.set_step(model, step) "
        "before every training step, with micro_batch= where a step has several.",
        stacklevel=8,  # at who calls the router
    )
