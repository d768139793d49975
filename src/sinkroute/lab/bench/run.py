"""The benchmark of routers, size by size; what is measured is written at once, and not measured again."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sinkroute.lab.bench.memory import extra_memory_mb
from sinkroute.lab.bench.options import Bench
from sinkroute.lab.bench.sizes import GRID, QUICK, Size
from sinkroute.lab.bench.table import size_table
from sinkroute.lab.bench.timing import compare
from sinkroute.lab.bench.variants import BASELINE, Variant, training_pass, variants_of, with_mixtures
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest, stop_on_signal
from sinkroute.lab.machine import machine
from sinkroute.lab.progress import Bar
from sinkroute.routing import list_routers

__all__ = ["begin", "run_bench", "settings_of"]


# Settings that all figures of a file share. Each figure is relative to softmax in its own turns, so that routers may be
# measured one call after another; `seconds` and `repeats` say how exactly that is known.
_SHARED = ("logits", "threads", "clock", "seed")


def settings_of(bench: Bench) -> dict[str, Any]:
    """How a call measures, as its file records it."""
    return {
        "logits": "unit-variance Gaussian + a Gaussian offset per expert",
        "routers": list(bench.routers or list_routers()),
        "seconds": min(bench.seconds, 4.0) if bench.quick else bench.seconds,
        "repeats": bench.repeats,
        "threads": bench.threads,
        "clock": "processor" if bench.threads == 1 else "wall",
        "seed": bench.seed,
    }


def begin(path: Path, settings: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """What the file holds, if it was measured here and in the same way; else an empty record.

    Its settings then name the routers of both calls, and the smaller `seconds` and `repeats`.

    Raises:
        ValueError: it was measured on another machine or with other settings, or it is something else.
    """
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; give a file, such as {path / 'routing.json'}")
    content = {"machine": machine(), "settings": settings, "sizes": {}}
    if fresh or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return content
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
        known = {part: dict(before[part]) for part in content}
        least = {name: min(settings[name], known["settings"][name]) for name in ("seconds", "repeats")}
        routers = list(dict.fromkeys([*known["settings"]["routers"], *settings["routers"]]))
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is no file of this benchmark; give another --out, or --fresh to replace it") from None
    for part, keys in (("machine", content["machine"]), ("settings", _SHARED)):
        for key in keys:
            if known[part].get(key) != (value := content[part][key]):
                raise ValueError(
                    f"{path} was measured with {part} {key}={known[part].get(key)!r}, now it is {value!r}; give "
                    "another --out, or --fresh to begin anew"
                )
    return before | {"settings": settings | least | {"routers": routers}}


def run_bench(bench: Bench, console: Console) -> int:
    """Measure what is missing, write it, show all; the exit code.

    Raises:
        ValueError: a wrong size, an unknown router, or a file that was measured in another way.
    """
    sizes = [Size.parse(text) for text in bench.sizes] or list(QUICK if bench.quick else GRID)
    settings = settings_of(bench)
    variants = variants_of(settings["routers"])
    path = Path(bench.out)
    torch.set_num_threads(bench.threads)
    content = begin(path, settings, fresh=bench.fresh)
    code = 0
    try:
        with stop_on_signal() as stop, Bar(console, len(sizes)) as bar:
            for size in sizes:
                known = content["sizes"].get(str(size), {})
                missing = {name: one for name, one in variants.items() if name not in _names(known)}
                if missing:
                    bar.tell(str(size), f"{len(missing)} variants")
                    found = measure(size, {BASELINE: variants[BASELINE], **missing}, settings, stop)
                    content["sizes"][str(size)] = merged(known, _rounded(found))
                    write_json(content, path)
                bar.advance(str(size))
    except (Interrupted, KeyboardInterrupt):
        code = 130
    for size in sizes:
        if str(size) in content["sizes"]:
            console.print(size_table(size, content))
    if code:
        console.print("[yellow]Interrupted.[/] The same command measures what is left.", highlight=False)
    console.print(f"Figures: [bold]{path}[/]", highlight=False, soft_wrap=True)
    return code


def _names(figures: Mapping[str, Any]) -> set[str]:
    """The variants that were measured, or that refused."""
    return {*figures.get("ratios", ()), *figures.get("refused", ())}


def merged(known: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a size from two calls; what is known stays, and of turns and repeats the fewest are told.

    >>> known = {"turns": 9, "softmax_ms": 2.0, "ratios": {"softmax": [1.0, 1.0]}, "extra_mb": {"softmax": 1.0},
    ...          "refused": {}}
    >>> new = {"turns": 5, "softmax_ms": 2.2, "ratios": {"softmax": [1.0], "base": [3.0]},
    ...        "extra_mb": {"softmax": 1.0, "base": 4.0}, "refused": {}}
    >>> both = merged(known, new)
    >>> both["turns"], both["softmax_ms"], both["ratios"]
    (5, 2.0, {'softmax': [1.0], 'base': [3.0]})
    """
    if not known:
        return dict(new)
    parts = {part: {**new[part], **known[part]} for part in ("extra_mb", "refused")}
    ratios = {**known["ratios"], **{name: new["ratios"][name] for name in new["ratios"] if name not in known["ratios"]}}
    ratios[BASELINE] = min(known["ratios"][BASELINE], new["ratios"][BASELINE], key=len)
    return {**known, **parts, "ratios": ratios, "turns": min(known["turns"], new["turns"])}


def measure(
    size: Size, variants: dict[str, Variant], settings: dict[str, Any], stop: StopRequest | None = None
) -> dict[str, Any]:
    """The figures of one size.

    Returns:
        `turns` and `softmax_ms` (see `Comparison`), `ratios` (of time, by variant, one a repeat, the mixtures of
        branches included), `extra_mb` (memory by variant) and `refused` (why a router does not do this size).
    """

    def pause() -> None:
        if stop:
            raise Interrupted("the size that was being measured is lost")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = functools.cache(lambda width: size.logits(width, settings["seed"], device))
    calls, refused = {}, {}
    for name, variant in variants.items():
        try:
            calls[name] = training_pass(variant, size, logits)
        except ValueError as error:
            refused[name] = str(error)
    timing = compare(
        calls,
        BASELINE,
        device,
        repeats=settings["repeats"],
        seconds=settings["seconds"],
        seed=settings["seed"],
        pause=pause,
    )
    memory = {}
    for name, call in calls.items():
        pause()
        memory[name] = extra_memory_mb(call, device)
    return {
        "turns": timing.turns,
        "softmax_ms": timing.milliseconds,
        "ratios": with_mixtures(timing.ratios, variants),
        "extra_mb": memory,
        "refused": refused,
    }


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """More than five digits are noise."""
    return dict(json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.5g}")))
