"""Settings of a model's router that may be changed after it was patched: `gate.top_k = 3`, a scaling factor."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import nn

from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.scoring import NotARouter, Scoring, Unknown, read_scoring

__all__ = ["Settings"]


class _Setting(NamedTuple):
    owner: Any
    name: str
    value: Any

    def now(self) -> Any:
        return getattr(self.owner, self.name, None)


class Settings:
    """The numbers and names under which the rule of a router was read.

    Args:
        site: where the router is.
        scoring: the rule that was read there.
    """

    def __init__(self, site: Site, scoring: Scoring) -> None:
        self.site, self.scoring = site, scoring
        self._seen = _settings(site)

    def check(self) -> None:
        """Compare them with what they are now, without touching a tensor.

        Raises:
            ValueError: one was changed, and the rule with it.
        """
        for setting in self._seen:
            if setting.now() != setting.value:
                self._require_same_rule()
                return

    def _require_same_rule(self) -> None:
        changed = [setting for setting in self._seen if setting.now() != setting.value]
        try:
            rule = str(read_scoring(self.site))
        except (NotARouter, Unknown) as error:
            rule = f"no rule that sinkroute knows: {error}"
        if rule != str(self.scoring):
            words = ", ".join(
                f"{name} was {value!r} and is {getattr(owner, name, None)!r}" for owner, name, value in changed
            )
            raise ValueError(
                f"{self.site.block} was changed after sinkroute.patch: {words}. It was patched as ({self.scoring}) and "
                f"is now ({rule}); set it back, or call handle.remove() and sinkroute.patch again"
            )
        self._seen = _settings(self.site)


def _settings(site: Site) -> list[_Setting]:
    """Those of the router, and what its code and its block's name of the configuration and of the block."""
    host, parent = site.host, site.parent
    owners: list[tuple[Any, set[str]]] = [(host, set(vars(host))), (parent, _named_in(parent) & set(vars(parent)))]
    if hasattr(host, "config"):
        owners.append((host.config, _named_in(host)))
    return [
        _Setting(owner, name, value)
        for owner, names in owners
        for name in sorted(names)
        if _may_matter(name) and type(value := getattr(owner, name, None)) in (int, float, bool, str)
    ]


def _may_matter(name: str) -> bool:
    # Modes, noise on the model's own logits and coefficients of its losses are changed in the course of a training.
    other = name in ("training", "gradient_checkpointing") or name.startswith("_")
    return not other and "jitter" not in name and not name.endswith("_coef")


def _named_in(module: nn.Module) -> set[str]:
    """The attributes that the methods of its class name, but for what makes it."""
    methods = [inspect.unwrap(method) for _, method in inspect.getmembers(type(module), inspect.isfunction)]
    skipped = set(dir(nn.Module)) - {"forward"}
    codes = [method.__code__ for method in methods if method.__name__ not in skipped and hasattr(method, "__code__")]
    return {name for code in codes for name in code.co_names}
