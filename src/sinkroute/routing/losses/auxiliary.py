"""The auxiliary losses of a router: their sum, the load of the global batch, and a gradient under recomputation."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sinkroute.kernels.storage import holds_values
from sinkroute.routing.losses.inputs import LossInputs
from sinkroute.routing.losses.registry import LOSSES
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.state import recomputing
from sinkroute.transport.ranks import refusals

__all__ = ["AuxiliaryLosses", "attach_gradient"]

# What a rank gives instead of its load when it refuses its logits: below 0 with any loads, however many ranks do so.
_REFUSED = -(2**50)

# Passes of a step that are remembered until they are repeated; more are not under way at once.
_REMEMBERED = 256


class AuxiliaryLosses:
    """Losses by name → coefficient, and what they remember of the passes of a step.

    Args:
        coefficients: of `LOSSES`; the router's own mapping.
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        self.coefficients = coefficients
        self._load_E: Tensor | None = None  # of the step so far, over the ranks
        # By pass: its micro-batch, and its load with what `batch_load` made of it; or the leaf of its loss.
        self._loads: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)
        self._leaves: deque[tuple[int, Tensor]] = deque(maxlen=_REMEMBERED)

    @property
    def of_batch(self) -> bool:
        """Whether one of them asks for the load of the global batch, a collective call."""
        return any(LOSSES[name].of_batch for name in self.coefficients)

    def forget(self) -> None:
        """Another step begins."""
        self.begin_batch()
        self._loads.clear()
        self._leaves.clear()

    def begin_batch(self) -> None:
        """The load of the global batch begins anew."""
        self._load_E = None

    def total(self, inputs: LossInputs, own: Tensor | None) -> Tensor | None:
        """0-d: the sum of the losses, with their coefficients, and of `own`, the method's; None if there are none."""
        for name, coefficient in self.coefficients.items():
            loss = coefficient * LOSSES[name].function(inputs)
            own = loss if own is None else own + loss
        return own

    def batch_load(self, load_E: Tensor, ranks: Ranks, micro_batch: int, *, keep: bool) -> Tensor:
        """(E,) int64: the load over all ranks and the micro-batches of this step up to this one. A collective call.

        Args:
            load_E: of this pass.
            ranks: over which it is summed.
            micro_batch: of this pass.
            keep: whether the step is known, so that its passes can be added up.
        """
        if recomputing():
            known = [(own_E, batch_E) for part, own_E, batch_E in self._loads if part == micro_batch]
            # Several passes under one key: a repetition has the load of the pass that it repeats. One pass: nothing to
            # compare, and a device need not be waited for.
            for own_E, batch_E in reversed(known):
                if len(known) == 1 or torch.equal(own_E, load_E):
                    return batch_E
        batch_E = ranks.sum(load_E.clone())
        if not torch.compiler.is_compiling() and _is_refused(batch_E):
            raise ValueError(f"another rank refused its logits, here they are right; {refusals(ranks.sum)}")
        if keep:
            batch_E = batch_E if self._load_E is None else batch_E + self._load_E
            self._load_E = batch_E
            if not torch.compiler.is_compiling():  # nothing compiled looks it up, and each index would be a graph
                self._loads.append((micro_batch, load_E, batch_E))
        return batch_E

    def withdraw(self, num_experts: int, ranks: Ranks, device: torch.device) -> None:
        """Take part in the other ranks' `batch_load` with nothing to give: there they raise, on a CPU."""
        if not self.of_batch:
            return
        batch_E = ranks.sum(torch.full((num_experts,), _REFUSED, dtype=torch.int64, device=device))
        if _is_refused(batch_E):
            refusals(ranks.sum, sys.exc_info()[1])

    def keep_gradient(self, loss: Tensor, weights_TK: Tensor, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Keep the loss's gradient alive under reentrant activation checkpointing.

        There the forward pass runs without a graph, and what it leaves beside its output, as `Routes` does, gets no
        gradient. So the loss is handed out as a leaf, which collects the gradient that it is given; when the pass is
        repeated inside the backward pass, that gradient is passed on to the loss of the repetition.

        Compiled code cannot ask whether it is a repetition: checkpoint compiled layers with `use_reentrant=False`.
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return loss, weights_TK
        if not torch.is_grad_enabled():
            leaf = loss.detach().requires_grad_()
            self._leaves.append((micro_batch, leaf))
            return leaf, weights_TK
        if recomputing():
            # The last that a loss has reached: there are others where a layer is used several times, and where several
            # forward passes come before a backward pass; one without a gradient is of a pass that was a trial.
            leaves = (leaf for part, leaf in reversed(self._leaves) if part == micro_batch)
            found = next((leaf for leaf in leaves if leaf.is_leaf and leaf.grad is not None), None)
            if found is not None:
                weights_TK = _AddGradient.apply(weights_TK, loss, found.grad)  # type: ignore[no-untyped-call]
                found.grad = None  # this one has been passed on
        return loss, weights_TK


def attach_gradient(weights_TK: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """The same weights; a backward pass that comes to them gives `loss` the gradient `scale`, whatever theirs is.

    So a loss trains the gate without being added to anything, as in Megatron-LM's `MoEAuxLossAutoScaler`.

    Args:
        weights_TK: (T, K), of any dtype.
        loss: 0-d.
        scale: 0-d, what the loss is weighed by.

    >>> gate = torch.ones(2, 3, requires_grad=True)
    >>> weights_TK = attach_gradient(gate[:, :1], gate.sum(), torch.tensor(0.5))
    >>> (10 * weights_TK).sum().backward()
    >>> gate.grad
    tensor([[10.5000,  0.5000,  0.5000],
            [10.5000,  0.5000,  0.5000]])
    """
    scale = scale.to(loss.device, loss.dtype)
    weighted: Tensor = _AddGradient.apply(weights_TK, loss, scale)  # type: ignore[no-untyped-call]
    return weighted


def _is_refused(batch_E: Tensor) -> bool:
    """Whether a rank gave `_REFUSED`; a device is not waited for."""
    return batch_E.device.type == "cpu" and holds_values(batch_E) and int(batch_E[0]) < 0


class _AddGradient(torch.autograd.Function):
    """The identity of its first argument; `loss` gets the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None
