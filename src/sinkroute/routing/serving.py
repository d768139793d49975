"""How a router serves: what it adds before a top-k, and what of the model holds it."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

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


class Link(Protocol):
    """Ties a router's state to a tensor of the model that it is plugged into."""

    def pull(self) -> None:
        """Take over what the model's tensor was set to since the last step."""

    def push(self) -> None:
        """Set the model's tensor to what the state has become."""
