"""Whether what a router moves is saved: PEFT's files hold what PEFT trains, and nothing else of the model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ["Saved"]


class Saved:
    """Asks of a model, when it may have changed, whether its adapters are saved with what a router moves.

    Args:
        model: that was patched.
        router: the name of the method, for messages.
    """

    def __init__(self, model: nn.Module, router: str) -> None:
        self.model, self.router = model, router
        self._seen: tuple[object, bool] | None = None

    def check(self, moved: Iterable[Tensor]) -> None:
        """Refuse a model that is trained and saved without a tensor that is moved; asked once for each configuration.

        Args:
            moved: the tensors that routers move.

        Raises:
            ValueError: PEFT trains other parts than these, or no part of the model is trained (PEFT's prompts).
        """
        # Cheap: the first parameter is most often trained.
        now = getattr(self.model, "peft_config", None), any(p.requires_grad for p in self.model.parameters())
        if now == self._seen:
            return
        adapters, trained = now
        moved = list(moved)
        if moved and adapters is not None:
            kept = _saved(self.model)
            self._require(all(id(tensor) in kept for tensor in moved), "PEFT's files do not hold it")
        elif moved:
            self._require(trained, "no parameter of the model is trained: what is trained is saved elsewhere")
        self._seen = now

    def _require(self, holds: bool, why: str) -> None:
        if not holds:
            raise ValueError(
                f"router {self.router!r} moves the gate or its correction bias, and {why}, so that what is loaded "
                'would be another model. Let PEFT save it (LoraConfig(modules_to_save=["gate"]), and patch after '
                "get_peft_model), or take a router that leaves nothing behind, such as ssr-l"
            )


def _saved(model: nn.Module) -> set[int]:
    """The ids of the tensors of modules that PEFT trains and saves whole."""
    wrappers = (part for part in model.modules() if type(part).__name__ == "ModulesToSaveWrapper")
    copies = (getattr(wrapper, "modules_to_save", None) for wrapper in wrappers)
    kept = [copy for copy in copies if isinstance(copy, nn.Module)]
    return {id(tensor) for copy in kept for tensor in (*copy.parameters(), *copy.buffers())}
