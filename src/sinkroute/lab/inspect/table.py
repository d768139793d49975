"""An inspection in the terminal: what was found in a few sentences, and a row for every layer."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sinkroute.lab.inspect.result import NEAR_DEAD, Audit, Layer

__all__ = ["ALTERNATIVES", "audit_table", "cells", "facts", "labels", "percent", "summary"]

ALTERNATIVES = {
    "ssr-l": "the top k of SSR-L's plan",
    "ssr-s": "the top k of SSR-S's plan",
    "balanced": "balanced top-k",
}
"""Names of alternatives and what they are called in sentences."""

_BLOCKS = " ▁▂▃▄▅▆▇█"
_BARS = 8


def audit_table(audit: Audit) -> Table:
    """A row for every layer; loads are drawn from the most loaded expert to the least."""
    table = Table(
        title=Text(f"Expert load of {audit.setting.model}"), title_justify="left", box=SIMPLE_HEAD, show_edge=False
    )
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    names = labels(audit.layers)
    table.add_column("layer", overflow="fold", min_width=min(14, max(map(len, ["layer", *names]))))
    for column in ("K/E", "MaxVio", "dead", f"<{percent(NEAR_DEAD)}"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("loads", no_wrap=True)
    for name in ALTERNATIVES:
        table.add_column(f"{name}\nmoved   lost", justify="right", no_wrap=True)
    for label, layer in zip(names, audit.layers, strict=True):
        if layer.load is None:
            table.add_row(Text(label), *[""] * 4, Text("unread", style="yellow"))
            continue
        told = cells(layer)
        style = "red" if layer.dead else "yellow" if layer.near_dead else ""
        shares = [f"{told[place]} {told[place + 1]:>6}" for place in range(5, len(told), 3)] if layer.rule else []
        table.add_row(
            Text(label), *told[:2], Text(told[3], style=style), Text(told[4], style=style), _sketch(layer), *shares
        )
    return table


def summary(audit: Audit) -> list[str]:
    """What was found, in sentences."""
    setting, read = audit.setting, audit.read
    out = []
    if read:
        worst = max(read, key=lambda layer: layer.max_vio or 0)
        mean = sum(layer.max_vio or 0 for layer in read) / len(read)
        dead, near = (sum(len(getattr(layer, kind)) for layer in read) for kind in ("dead", "near_dead"))
        experts = sum(len(layer.load) for layer in read if layer.load is not None)
        out.append(
            f"MaxVio is {mean:.2f} on average over {len(read)} layers and {worst.max_vio:.2f} at most ({worst.path}): "
            f"there the busiest expert has {1 + (worst.max_vio or 0):.1f} times its share."
        )
        out.append(
            f"Dead experts (no token chose them): {dead:,} of {experts:,}; "
            f"with less than {percent(NEAR_DEAD)} of their share: {near:,} more."
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
            f"Balanced over batches of {setting.batch} windows, {'; '.join(told)}. "
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
        f"{setting.tokens:,} tokens of {setting.text}: {setting.windows:,} windows of {setting.length}{bos}.",
        f"{setting.architecture}, {setting.dtype}, on {setting.device}. {memory}. {audit.seconds:,.1f} s.",
    ]


def cells(layer: Layer) -> list[str]:
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
    for name in ALTERNATIVES:
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


def percent(share: float) -> str:
    """
    >>> percent(0.1234), percent(0.00012), percent(0.0)
    ('12.3%', '0.01%', '0%')
    """
    return f"{100 * share:.{0 if round(share, 4) in (0, 0.1, 1) else 1 if abs(share) >= 0.0095 else 2}f}%"


def _mean_batch(layers: Sequence[Layer]) -> float:
    found = [layer.max_vio_batch for layer in layers if layer.alternatives and layer.max_vio_batch is not None]
    return sum(found) / len(found) if found else 0.0


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
        mean = sum(group) / len(group)
        style = "red" if mean == 0 else "dark_orange" if mean > 1.5 else "blue" if mean < 0.5 else "green"
        out.append("×" if mean == 0 else _BLOCKS[max(1, min(8, round(4 * mean)))], style=style)
    return out
