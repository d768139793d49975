"""All routers at a glance, as text, from what the classes say of themselves."""

from __future__ import annotations

import textwrap

from sinkroute.adapters._fit import FRAMEWORKS, frameworks
from sinkroute.lab.screen import left_out
from sinkroute.routing import Router
from sinkroute.routing.registry import ROUTERS, router_options

__all__ = ["overview", "remembers", "serves_as"]

HEAD = ("router", "training", "serving", "served as", "remembers", "in")
DROPPED = (4, 3)  # columns that a narrow terminal goes without, the first first
LEGEND = """
training, serving: whether loads are even there: no; on plans, which are some of the steps; partly; yes; or exact, in
every micro-batch. That is what a method is for; how even, docs/routing.md has measured.
served as: plain, a model without anything beside its weights; in the gate, the same once its bias is folded into the
gate; with a bias, that of a model with a correction bias; either, one of the two; with its rule, by our code only.
remembers: numbers per layer of E experts, without what is counted within a step.
in: all routers are in sinkroute.MoE; H is Hugging Face, M Megatron-Core, T torchtitan, D DeepSpeed.
A line below each: what it does, and the work of a training pass (measured: docs/costs.md).
`sinkroute routers NAME` tells the options of one.
"""


def overview(width: int) -> str:
    """A line of short columns for each router, and below it what is longer, folded to the width between words.

    Args:
        width: columns of the terminal; fewer than 50 are taken for 50.
    """
    width = max(width, 50)
    rows = [HEAD, *(_row(name, kind(8, 2)) for name, kind in ROUTERS.items())]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    shown, wide = list(range(len(HEAD))), sum(widths) + 2 * len(widths) - 2
    for place in DROPPED:
        if sum(widths[one] + 2 for one in shown) - 2 > width:
            shown.remove(place)
    rows, widths = [tuple(row[one] for one in shown) for row in rows], [widths[one] for one in shown]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for place, kind in enumerate(ROUTERS.values(), start=1):
        about = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        lines[place] += "\n" + _folded(f"{about}. Work: {kind.card.work}.", width, indent="    ")
    out = [name for place, name in enumerate(HEAD) if place not in shown]
    more = [_folded(left_out(out, wide), width)] if out else []
    return "\n".join([*lines, *more, "", *(_folded(part, width) for part in _sentences())])


def _row(name: str, router: Router) -> tuple[str, ...]:
    card, found = router.card, frameworks(router)
    where = " ".join(framework[0].upper() if framework in found else "-" for framework in FRAMEWORKS)
    training, serving = ("on plans" if word == "plans" else word for word in (card.training, card.serving))
    return name, training, serving, serves_as(name), remembers(type(router)), where


def serves_as(name: str) -> str:
    """What serves a model that was trained with this router.

    >>> [serves_as(name) for name in ("ssr-l", "quantile", "loss-free", "ssr-dual", "hash")]
    ['plain', 'in the gate', 'with a bias', 'either', 'with its rule']
    """
    serving = ROUTERS[name](8, 2).serving()
    if serving is None:
        return "with its rule"
    if serving.plain:
        return "plain"
    if "bias_on" in router_options(name):
        return "either"
    return "in the gate" if serving.on == "logits" else "with a bias"


def remembers(kind: type[Router]) -> str:
    """How many numbers a method keeps from step to step for a layer of E experts.

    >>> [remembers(ROUTERS[name]) for name in ("softmax", "loss-free", "smebu", "ssr-bias")]
    ['-', 'E', '2E', 'E + 1']
    """
    small, large = (_numbers(kind(experts, 2)) for experts in (8, 16))
    slope = (large - small) // 8
    rest = small - 8 * slope
    factor = f"{slope}E" if slope > 1 else "E"
    return " + ".join([*([factor] if slope else []), *([str(rest)] if rest else [])]) or "-"


def _numbers(router: Router) -> int:
    state = {} if router.state is None else router.state.state_dict()
    return sum(value.numel() for key, value in state.items() if not key.startswith("saved_"))


def _sentences() -> list[str]:
    """The legend, a paragraph each."""
    found: list[str] = []
    for line in LEGEND.strip().splitlines():
        opens = not found or found[-1].endswith((".", ")."))
        found = [*found, line] if opens else [*found[:-1], f"{found[-1]} {line}"]
    return found


def _folded(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
