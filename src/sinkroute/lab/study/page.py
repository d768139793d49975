"""The page and the picture: one file each, written whole or not at all.

The page is self-contained: figures are inline SVG, the style sheet stands in the head, and nothing is fetched. Every
text that comes from a run passes through jinja2's autoescape; only the SVG of `figures`, which escapes its own texts,
does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sinkroute.lab.page import render, today
from sinkroute.lab.page.palette import inks
from sinkroute.lab.study.metric import Quality as Metric
from sinkroute.lab.study.metric import capital
from sinkroute.lab.study.runs import Group, Run, common_metric, differences, group_runs, read_baselines
from sinkroute.lab.study.table import describe, result_table, run_tag

__all__ = ["write_picture", "write_report"]


def write_report(
    runs: Sequence[Run],
    path: str | Path,
    baselines: Mapping[str, Any] | str | Path | None = None,
    title: str = "sinkroute demo",
) -> Path:
    """Write the HTML report of some runs.

    Args:
        runs: as `read_runs` returns them; unfinished ones are shown as interrupted.
        path: where the page goes; its folder is made if need be. A page that is already there is replaced at once, by a
            rename, so that a reader never sees half of one.
        baselines: content of `baselines.json`, or its path; with None the file beside the runs is read, if it is there.
        title: the page's title.

    Returns:
        `path`, as a `Path`.

    Raises:
        ValueError: `runs` is empty, or they are of different metrics; `path` is a folder.
        ModuleNotFoundError: matplotlib or jinja2 is missing; `pip install 'sinkroute[lab]'` brings both.
    """
    path = _target(runs, path, (".html", ".htm"))
    text = _render(runs, read_baselines(baselines, runs), title)
    return _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_picture(
    runs: Sequence[Run], path: str | Path, baselines: Mapping[str, Any] | str | Path | None = None
) -> Path:
    """Write the README's picture, a PNG or an SVG: the metric in validation and MaxVio over training, by method.

    Arguments, return value and errors are those of `write_report`; the suffix of `path` says which format.
    """
    from sinkroute.lab.study import figures  # matplotlib takes a second to import: only who draws pays for it

    path = _target(runs, path, (".png", ".svg"))
    groups = group_runs(runs)
    colours = inks(group.method for group in groups)
    known = read_baselines(baselines, runs)
    return _replace(path, lambda part: figures.picture(groups, colours, known, part))


def _target(runs: Sequence[Run], path: str | Path, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if not runs:
        raise ValueError("runs is empty; pass what read_runs(['runs/demo']) returns.")
    if path.is_dir():
        raise ValueError(
            f"path {str(path)!r} is a folder; pass a file name such as {str(path / ('report' + suffixes[0]))!r}."
        )
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"path {str(path)!r} must end in {' or '.join(suffixes)}; it ends in {path.suffix!r}.")
    return path


def _replace(path: Path, write: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, for a rename is atomic only within one file system; with the suffix, for it picks the format.
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _render(runs: Sequence[Run], baselines: Mapping[str, Any], title: str) -> str:
    from markupsafe import Markup

    from sinkroute.lab.study import figures

    metric = common_metric(runs)
    groups = group_runs(runs)
    colours = inks(group.method for group in groups)
    table = result_table(runs, baselines)
    place = {group.label: which for which, group in enumerate(groups)}
    different = differences(runs)
    if different.get("name") == [run.name for run in runs]:
        del different["name"]  # the rows are called so already
    return render(
        "study/page.html.j2",
        title=title,
        date=today(),
        table=table,
        metric=metric,
        capital=capital,
        attacks=[column.key.partition("@")[0] for column in table.columns],
        groups=groups,
        inks=colours,
        place=place,
        facts=_facts(runs, metric, baselines),
        provenance=_provenance(baselines),
        baselines=describe(baselines),
        figures={
            "standing": Markup(figures.standing_figure(groups, colours, baselines)),
            "training": Markup(figures.training_figure(groups, colours, baselines)),
            "balance": Markup(figures.balance_figure(groups, colours)),
            "experts": Markup(figures.experts_figure(groups, colours)),
            "serving": Markup(figures.serving_figure(groups, colours)),
            "scatter": Markup(figures.scatter_figure(groups, colours)),
        },
        unfinished=not all(run.finished for run in runs),
        several=any(len(group.runs) > 1 for group in groups),
        selective=[group.label for group in groups if group.selective],
        differences=list(different),
        runs=[
            {
                "name": run.name,
                "label": run.label,
                "seed": run.seed,
                "which": place[run.label],
                "tag": run_tag(run),
                "different": [_plain(values[index]) for values in different.values()],
                "config": yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100),
            }
            for index, run in enumerate(runs)
        ],
    )


def _facts(runs: Sequence[Run], metric: Metric, baselines: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The numbers below the title: (value, name, detail). What is not known is left out."""
    first = runs[0]
    model = first.config.get("model")
    model = model if isinstance(model, Mapping) else {}
    groups: list[Group] = group_runs(runs)
    seeds = sorted({run.seed for run in runs})
    facts = [
        (
            str(len(groups)),
            "routing method" + "s" * (len(groups) > 1),
            f"{len(seeds)} seeds each" if len(seeds) > 1 else f"seed {seeds[0]}",
        )
    ]
    total = next((value for run in runs if (value := run.value("parameters", "total"))), None)
    active = next((value for run in runs if (value := run.value("parameters", "active"))), None)
    if total:
        facts.append((_human(total), "parameters", f"{_human(active)} active per {metric.token}" if active else ""))
    if isinstance(model.get("experts"), int):
        parts = [f"top-{model['top_k']}"] if "top_k" in model else []
        parts += [f"{model['layers']} layers"] if "layers" in model else []
        facts.append((str(model["experts"]), "experts per layer", ", ".join(parts)))
    steps = first.planned_steps
    if steps is not None:
        seconds = [
            value for run in runs if (value := run.value("train", "seconds")) is not None and math.isfinite(value)
        ]
        facts.append(
            (f"{steps:,}", "training steps", f"about {_duration(sum(seconds) / len(seconds))} a run" if seconds else "")
        )
    corpus = baselines.get("corpus")
    if isinstance(corpus, Mapping) and isinstance(corpus.get("train"), int):
        facts.append(
            (_human(corpus["train"]) + "B", "of training text", f"{corpus.get('valid', 0):,} bytes for validation")
        )
    return facts


def _provenance(baselines: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the text came from and which machine it ran on, as (name, text)."""
    out = []
    corpus = baselines.get("corpus")
    if isinstance(corpus, Mapping):
        parts = [str(corpus[key]) for key in ("name", "source") if corpus.get(key)]
        parts += [
            f"{corpus[key]:,} {key} bytes" for key in ("train", "valid", "test") if isinstance(corpus.get(key), int)
        ]
        parts += [f"sha256 {str(corpus['sha256'])[:12]}"] if corpus.get("sha256") else []
        out.append(("Corpus", " · ".join(parts)))
    machine = baselines.get("machine")
    if isinstance(machine, Mapping):
        parts = [str(machine["cpu"])] if machine.get("cpu") else []
        parts += [f"{machine['cores']} cores"] if machine.get("cores") else []
        parts += [str(machine["platform"])] if machine.get("platform") else []
        out.append(("Machine", " · ".join(parts)))
        versions = [f"{name} {machine[name]}" for name in ("sinkroute", "torch", "python") if machine.get(name)]
        out.append(("Versions", " · ".join(versions)))
    return [(name, text) for name, text in out if text]


def _human(count: float) -> str:
    """A count in three digits.

    >>> _human(1234567), _human(345678), _human(12)
    ('1.23 M', '346 k', '12')
    """
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _plain(value: Any) -> str:
    return "–" if value is None else str(value)
