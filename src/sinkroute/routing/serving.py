"""How a router serves: what it adds before a top-k, and what of the model holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["Link", "Serving"]


class Serving(NamedTuple):
    """What is added before a top-k of logits or scores.

    Attributes:
        bias_E: (E,), added for the choice and not to the weights; None: nothing.
        on: what it is added to, the `"logits"` or their `"scores"`.
    """

    bias_E: Tensor | None = None
    on: Literal["logits", "scores"] = "logits"

    @property
    def plain(self) -> bool:
        """Whether nothing is added."""
        return self.bias_E is None


class Link:
    """Ties a router's state to a tensor of the model that it is plugged into. What is not overridden does nothing.

    Attributes:
        find: gives the tensor, looked up anew.
    """

    find: Callable[[], Tensor]

    def pull(self) -> None:
        """Take over what the model's tensor was set to since the last step."""

    def see(self, tokens: Tensor) -> None:
        """What the model's gate is given in this pass, (..., D); before the router is called with its logits."""

    def count(self, token_mask: Tensor | None) -> Mapping[str, Tensor]:
        """What this micro-batch adds to the state's sums for the link."""
        return {}

    def learn(self, sums: Mapping[str, Tensor]) -> None:
        """The state's sums of the whole batch, when a step is over."""

    def push(self) -> None:
        """Set the model's tensor to what the state has become."""
