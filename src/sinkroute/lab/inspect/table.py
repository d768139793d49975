"""An inspection in the terminal: what was found in a few sentences, and a row for every layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.text import Text

from sinkroute.lab.inspect.result import NEAR_DEAD, Audit, Layer, mean
from sinkroute.lab.screen import Column, ScreenTable
from sinkroute.lab.words import percent
from sinkroute.routing.metrics import DEAD
from sinkroute.routing.registry import RECOMMENDED

__all__ = ["ALTERNATIVES", "audit_table", "cells", "facts", "labels", "summary"]

ALTERNATIVES = {
    RECOMMENDED: f"{RECOMMENDED}, as it would serve,",
    "balanced": "balanced top-k",
    "ssr-l": "the top k of SSR-L's plan",
    "ssr-s": "the top k of SSR-S's plan",
}
"""Names of alternatives and what they are called in sentences, the recommended router first."""

_BLOCKS = " ▁▂▃▄▅▆▇█"
_BARS = 8
_VALUES = ("moved", "lost", "MaxVio")
_MATTERS = {RECOMMENDED: 5, "balanced": 3}  # of the others nothing does


def audit_table(audit: Audit) -> ScreenTable:
    """A row for every layer; loads are drawn from the most loaded expert to the least."""
    columns = [
        Column("layer", words=True),
        Column("K/E", 9),
        Column("MaxVio", 9),
        Column("dead", 8),
        Column(f"<{percent(NEAR_DEAD)}", 4),
        Column("loads", 6),
    ]
    known = [name for name in ALTERNATIVES if any(name in layer.alternatives for layer in audit.layers)]
    for name in known:
        matters = _MATTERS.get(name, 0)
        columns += [Column(f"{name}\n{value}", matters + more) for value, more in zip(_VALUES, (0, 0, 1), strict=True)]
    table = ScreenTable(columns, title=f"Expert load of {audit.setting.model}", elsewhere="inspect.html of --output")
    for label, layer in zip(labels(audit.layers), audit.layers, strict=True):
        if layer.load is None:
            table.add(label, Text("unread", style="yellow"), *[""] * (len(columns) - 2))
            continue
        told = cells(layer, known)
        style = "red" if layer.dead else "yellow" if layer.near_dead else ""
        few = [Text(cell, style=style) for cell in told[3:5]]
        table.add(label, *told[:2], *few, _sketch(layer), *told[5:])
    return table


def summary(audit: Audit) -> list[str]:
    """What was found, in sentences."""
    setting, read = audit.setting, audit.read
    out = []
    if read:
        worst = max(read, key=lambda layer: layer.max_vio or 0)
        average = mean([layer.max_vio or 0 for layer in read])
        kinds = ("dead", "unseen", "near_dead")
        dead, unseen, near = (sum(len(getattr(layer, kind)) for layer in read) for kind in kinds)
        experts = sum(len(layer.load) for layer in read if layer.load is not None)
        out.append(
            f"MaxVio is {average:.2f} on average over {len(read)} layers and {worst.max_vio:.2f} at most "
            f"({worst.path}): there the busiest expert has {1 + (worst.max_vio or 0):.1f} times its share."
        )
        out.append(
            f"Dead experts (less than {DEAD:.0%} of a fair share): {dead:,} of {experts:,}, of which {unseen:,} "
            f"were chosen by no token; with less than {percent(NEAR_DEAD)}: {near:,} more."
        )
    told = []
    for name, words in ALTERNATIVES.items():
        moved, lost = audit.mean(name, "tokens_moved"), audit.mean(name, "score_lost")
        after = audit.mean(name, "max_vio_batch")
        if moved is not None and lost is not None and after is not None:
            told.append(
                f"{words} would move {percent(moved)} of the tokens and cost {percent(lost)} of the score "
                f"(MaxVio {after:.2f})"
            )
    if told:
        out.append(
            f"Over batches of {setting.batch} {'images' if audit.of_images else 'windows'}, {'; '.join(told)}. "
            f"The model's own batches have MaxVio {_mean_batch(read):.2f}."
        )
    out += [f"{path}: not understood, {reason}." for path, reason in _reasons(audit.layers).items()]
    return out


def facts(audit: Audit) -> list[str]:
    """How it was measured."""
    setting = audit.setting
    bos = ", each behind a BOS that is not counted" if setting.bos else ""
    memory = f"Peak memory {audit.peak_memory_mb:,.0f} MiB"
    if audit.checkpoint_mb is not None:
        memory += f", for a checkpoint of {audit.checkpoint_mb:,.0f} MiB"
    if setting.by_layer:
        memory += f": one layer at a time, and {setting.held_mb:,.1f} MiB of hidden states"
    return [
        f"{setting.tokens:,} tokens of {setting.text}: {setting.windows:,} "
        f"{'images' if audit.of_images else 'windows'} of {setting.length}{bos}.",
        f"{setting.architecture}, {setting.dtype}, on {setting.device}. {memory}. {audit.seconds:,.1f} s.",
    ]


def cells(layer: Layer, alternatives: Iterable[str] = ALTERNATIVES) -> list[str]:
    """The numbers of a layer with a load, as they are shown: five, and three for each alternative."""
    assert layer.load is not None
    told = layer.json()
    out = [
        f"{layer.top_k}/{len(layer.load)}",
        f"{layer.max_vio:.2f}",
        f"{told['entropy']:.3f}",
        str(len(layer.dead)),
        str(len(layer.near_dead)),
    ]
    for name in alternatives:
        other = layer.alternatives.get(name)
        out += (
            ["", "", ""]
            if other is None
            else [percent(other.tokens_moved), percent(other.score_lost), f"{other.max_vio_batch:.2f}"]
        )
    return out


def labels(layers: Sequence[Layer]) -> list[str]:
    """Paths without what all have in common at both ends, in whole names.

    >>> labels([Layer(f"model.layers.{i}.mlp.gate", "Gate", None, None) for i in (1, 12)])
    ['1', '12']
    """
    paths = [layer.path.split(".") for layer in layers]
    if len(paths) < 2:
        return [layer.path for layer in layers]
    first = _shared(paths)
    last = _shared([path[first:][::-1] for path in paths])
    return [".".join(path[first : len(path) - last]) or ".".join(path) for path in paths]


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """How many names all begin with."""
    return next(
        (place for place, names in enumerate(zip(*paths, strict=False)) if len(set(names)) > 1),
        min(map(len, paths)),
    )


def _mean_batch(layers: Sequence[Layer]) -> float:
    return mean([layer.max_vio_batch or 0.0 for layer in layers if layer.alternatives])


def _reasons(layers: Sequence[Layer]) -> dict[str, str]:
    """Those that share a reason are told once."""
    out: dict[str, str] = {}
    for reason in dict.fromkeys(layer.reason for layer in layers if layer.reason is not None):
        named = [layer for layer in layers if layer.reason == reason]
        more = f" and {len(named) - 1} more" if len(named) > 1 else ""
        out[f"{named[0].path} ({named[0].router}){more}"] = reason.rstrip(".")
    return out


def _sketch(layer: Layer) -> Text:
    """Bars of the loads, sorted, of at most so many groups of experts; the height of 1 is half a block."""
    loads = sorted(layer.relative(), reverse=True)
    bars = min(_BARS, len(loads))
    out = Text()
    for bar in range(bars):
        group = loads[bar * len(loads) // bars : (bar + 1) * len(loads) // bars]
        load = mean(group)
        style = "red" if load < DEAD else "dark_orange" if load > 1.5 else "blue" if load < 0.5 else "green"
        out.append("×" if load < DEAD else _BLOCKS[max(1, min(8, round(4 * load)))], style=style)
    return out
