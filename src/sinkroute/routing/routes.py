"""What a router decides for one batch of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["Routes"]


@dataclass(frozen=True)
class Routes:
    """Where each token goes, with what weight, and what it costs.

    The rule of a method gives routes without a load; the router hides masked tokens, counts, and adds the losses.

    Attributes:
        experts: (T, K) int64, the chosen experts, best first. A masked token has valid indices and weight 0. Some
            methods give more columns than K in training.
        weights: (T, K) float32 (float64 for float64 scores), what each expert's output is multiplied by.
        load: (E,) int64, how many choices of real tokens each expert got; sums to K times the real tokens where every
            token chooses K.
        branch: which rule chose: `"softmax"`, `"sinkhorn"`, `"assignment"` or `"expert-choice"`.
        aux_loss: 0-d, to be added to the training loss (its coefficient is in it already), or None. Of a training pass
            without a graph it is a leaf that requires a gradient: that is how it gets one under reentrant activation
            checkpointing.
        plan_error: 0-d, the largest relative deviation of a column of the transport plan, or None without a plan.
        plan_passes: passes over the scores that the solver made, or None without a plan.
        chosen: (T, K) bool, False at places that are no choice, padding and those that are filled up: their weight is 0
            and gets no gradient, so that their expert need not be computed. None: all are choices.
        potentials: (E,) what added to the logits, or to the cost of the plan, balances the choice; None where no
            method asked for it.

    >>> import sinkroute, torch
    >>> routes = sinkroute.create_router("softmax", num_experts=3, top_k=2)(torch.tensor([[3.0, 1.0, 2.0]]))
    >>> routes.experts, routes.load, routes.branch
    (tensor([[0, 2]]), tensor([1, 0, 1]), 'softmax')
    """

    experts: Tensor
    weights: Tensor
    load: Tensor = None  # type: ignore[assignment]  # until the router has counted
    branch: str = "softmax"
    aux_loss: Tensor | None = None
    plan_error: Tensor | None = None
    plan_passes: int | Tensor | None = None
    chosen: Tensor | None = None
    potentials: Tensor | None = None

    def without_padding(self, token_mask: Tensor) -> Routes:
        """The same for (T,) tokens of which only the real ones, True, choose; padding has weight 0."""
        real_T1 = token_mask[:, None]
        chosen_TK = real_T1 if self.chosen is None else self.chosen & real_T1
        return replace(self, weights=self.weights * real_T1, chosen=chosen_TK.expand_as(self.experts))
