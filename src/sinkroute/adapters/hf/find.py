"""The routers in a model, found by what stands beside them and by what they return."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from torch import nn

from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.scoring import NotARouter, Scoring, Unknown, read_scoring

__all__ = ["find_routers"]

# A gate is a matrix (E, D) and some vectors; what stands beside experts and is much larger is something else.
_GATE_SIZES = 64


def find_routers(model: nn.Module) -> tuple[dict[Site, Scoring], dict[Site, str]]:
    """Routers with a known rule, and those that have to be left alone, with the reason."""
    known: dict[Site, Scoring] = {}
    refused: dict[Site, str] = {}
    rules: dict[object, Scoring | Exception] = {}
    for site in _candidates(model):
        key = _kind(site)
        if key not in rules:
            try:
                rules[key] = read_scoring(site)
            except (NotARouter, Unknown) as error:
                rules[key] = error
        rule = rules[key]
        if isinstance(rule, Scoring):
            known[site] = rule
        elif isinstance(rule, Unknown) or _calls_itself_router(site):
            refused[site] = str(rule)
    return known, refused


def _candidates(model: nn.Module) -> Iterator[Site]:
    """Small modules with a matrix of E or more rows beside a module that holds E experts."""
    seen: set[int] = set()
    for path, parent in model.named_modules():
        children = dict(parent.named_children())
        counts = {name: _experts_in(child) for name, child in children.items()}
        for name, child in children.items():
            beside = [count for other, count in counts.items() if other != name and count]
            if not beside or id(child) in seen:
                continue
            matrices = [p for p in child.parameters() if p.ndim == 2 and min(beside) <= p.shape[0] <= 2 * max(beside)]
            size = sum(p.numel() for p in child.parameters())
            if matrices and counts[name] == 0 and size <= _GATE_SIZES * max(p.numel() for p in matrices):
                seen.add(id(child))
                yield Site(f"{path}.{name}".lstrip("."), child, parent)


def _experts_in(module: nn.Module) -> int:
    """How many experts the module holds, in stacked weights or one by one; 0 if none."""
    for parameter in module.parameters():
        if parameter.ndim >= 3 and parameter.shape[0] > 1:
            return parameter.shape[0]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 0:
        _, alike = Counter(map(type, module.children())).most_common(1)[0]
        return alike if alike > 1 else 0
    # Stacked into one matrix they do not show.
    return getattr(module, "num_experts", 0) if "Experts" in type(module).__name__ else 0


def _kind(site: Site) -> object:
    """Routers that are alike in this follow one rule, and one trial does for all layers."""
    host, parent = site.host, site.parent
    told = {name: value for name, value in vars(host).items() if isinstance(value, (int, float, str, bool, type(None)))}
    told.pop("training")
    shapes = [(name, tuple(value.shape)) for name, value in (*host.named_parameters(), *host.named_buffers())]
    return type(host), type(parent), repr(sorted(told.items())), repr(shapes)


def _calls_itself_router(site: Site) -> bool:
    name = site.path.rpartition(".")[2]
    return name in ("gate", "router") or re.search(r"Router|Gating|Gate$", type(site.host).__name__) is not None
