"""The page and the picture of a comparison: one file each, written whole or not at all.

The page is self-contained: figures are inline SVG, the style sheet stands in the head, and nothing is fetched. Every
text that comes from a run passes through jinja2's autoescape; only the SVG of the figures, which escape their own
texts, does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sinkroute.lab.files import replace_whole, write_text
from sinkroute.lab.page import render, today
from sinkroute.lab.page.palette import inks
from sinkroute.lab.study.arrange import describe, differences
from sinkroute.lab.study.metric import capital, dig
from sinkroute.lab.study.results import Results
from sinkroute.lab.study.runs import Run
from sinkroute.lab.study.tables import all_tables, sentences
from sinkroute.lab.words import count, duration

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["write_page", "write_picture"]

_FORESTS = 4  # metrics beside the headline that get a separate figure of differences
_DRAWN = 20  # methods whose curves are drawn in one figure
_METHOD = ("label", "seed", "name", "router.")


def write_page(found: Results, path: str | Path) -> Path:
    """Write the page.

    Args:
        found: what there is; unfinished runs are shown as interrupted.
        path: where it goes; its folder is made if need be. A page that is already there is replaced at once, by a
            rename, so that a reader never sees half of one.

    Raises:
        ValueError: `path` is a folder, or does not end in .html.
        ModuleNotFoundError: matplotlib or jinja2 is missing; `pip install 'sinkroute[lab]'` brings both.
    """
    path = _target(path, (".html", ".htm"))
    write_text(_render(found), path)
    return path


def write_picture(found: Results, path: str | Path) -> Path:
    """Write the README's picture, a PNG or an SVG: the quality in validation and MaxVio over training, by method.

    Of several headings the first is drawn. Errors are those of `write_page`; the suffix says which format.
    """
    from sinkroute.lab.study import figures  # matplotlib takes a second to import: only who draws pays for it

    path = _target(path, (".png", ".svg"))
    groups, colours = found.groups(found.sizes[0]), inks(found.routers)
    replace_whole(path, lambda draft: figures.picture(groups, colours, found.baselines, draft))
    return path


def _target(path: str | Path, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"path {str(path)!r} is a folder; pass a file name such as {str(path / ('report' + suffixes[0]))!r}."
        )
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"path {str(path)!r} must end in {' or '.join(suffixes)}; it ends in {path.suffix!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _render(found: Results) -> str:
    from markupsafe import Markup

    from sinkroute.lab.study import figures as drawn

    colours, sizes = inks(found.routers), list(enumerate(found.sizes))
    forests: dict[str, list[tuple[str, Markup]]] = {}
    compared = [metric for metric in found.metrics if metric.ranked]  # times of runs are not
    for place, metric in enumerate(compared[: 1 + _FORESTS]):
        for number, size in sizes:
            if svg := drawn.forest_figure(found, size, metric, colours, f"forest-{number}-{place}"):
                forests.setdefault(metric.title, []).append((size, Markup(svg)))
    pair = [found.headline, *(metric for metric in found.metrics[1:] if metric.key == "train.max_vio")]
    grids = [
        (size, grid, Markup(drawn.grid_figure(found, grid, size, pair, f"grid-{number}-{which}")))
        for number, size in sizes
        for which, grid in enumerate(drawn.grids(found))
        if any(found.counts(size, method)[0] for line in grid.lines.values() for _, method in line)
    ]
    figures, crowded = _figures(found)
    trend = Markup(drawn.size_figure(found, colours))
    there = {"results": True, "differences": forests, "grid": grids, "size": trend, "training": True}
    there |= dict.fromkeys(("balance", "experts", "serving", "tradeoff"), figures.get("balance"))
    setups, differing = _setups(found)
    return render(
        "study/page.html.j2",
        found=found,
        date=today(),
        said=sentences(found),
        capital=capital,
        sections=[
            (name, capital(name)) for name in (*(name for name, one in there.items() if one), "setup", "glossary")
        ],
        inks=colours,
        tables=all_tables(found),
        place={method: number for number, method in enumerate(found.methods)},
        figures=figures,
        crowded=crowded,
        most=_DRAWN,
        forests=forests,
        grids=grids,
        trend=trend,
        alike=_alike(found),
        facts=_facts(found),
        provenance=_provenance(found),
        ngrams=describe(found.baselines),
        swapped=any(metric.key.startswith("attacked.word-swap") for metric in found.metrics),
        setups=setups,
        differing=differing,
    )


def _figures(found: Results) -> tuple[dict[str, list[tuple[str, Markup]]], list[str]]:
    """The figures of the runs under each heading, by their name, and the headings with too many methods for them."""
    from markupsafe import Markup

    from sinkroute.lab.study import figures

    colours, baselines = inks(found.routers), found.baselines
    out: dict[str, list[tuple[str, Markup]]] = {"standing": [], "training": [], "balance": []}
    crowded = []
    for number, size in enumerate(found.sizes):
        groups = found.groups(size)
        if not groups:
            continue
        drawn = {"standing": figures.standing_figure(groups, colours, baselines)}
        if len(groups) > _DRAWN:
            crowded.append(size or f"these {len(groups)}")
        else:
            drawn |= {
                "training": figures.training_figure(groups, colours, baselines),
                "balance": figures.balance_figure(groups, colours),
                "experts": figures.experts_figure(groups, colours),
                "serving": figures.serving_figure(groups, colours),
                "scatter": figures.scatter_figure(groups, colours),
            }
        for name, svg in drawn.items():
            # Ids of a figure begin with its name, and a page has each id once.
            own = svg if number == 0 else svg.replace(f'id="{name}-', f'id="{name}{number}-')
            own = own if number == 0 else own.replace(f"#{name}-", f"#{name}{number}-")
            out.setdefault(name, []).append((size, Markup(own)))
    return out, crowded


def _alike(found: Results) -> str:
    """What is the same under each heading beside router and seed, after looking."""
    keys: dict[str, None] = {}
    for size in found.sizes:
        runs = [run for run in found.runs if run.size == size and run.state.kind != "waiting"]
        texts = {run.text for run in runs if run.text}
        keys |= dict.fromkeys(key for key in differences(runs) if not key.startswith(_METHOD))
        keys |= dict.fromkeys(["data.sha256"] if len(texts) > 1 else [])
    within = "under each heading " if len(found.sizes) > 1 else ""
    if keys:
        return f"{within}the methods differ in {', '.join(keys)} too (see Setup)."
    return f"{within}all else is the same."


def _setups(found: Results) -> tuple[list[dict[str, Any]], list[str]]:
    """The first run of each method under each heading, and the keys in which these differ."""
    groups = [(size, group) for size in found.sizes for group in found.groups(size)]
    first = [group.runs[0] for _, group in groups]
    different = {key: values for key, values in differences(first).items() if key not in ("label", "seed", "name")}
    out = []
    for index, (size, group) in enumerate(groups):
        seeds = [run.seed for run in group.runs]
        out.append(
            {
                "label": group.label,
                "name": f"{size} {group.label}".strip(),
                "folder": first[index].name,
                "seeds": f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
                "tags": [run.tag for run in group.runs if run.tag],
                "different": ["–" if values[index] is None else str(values[index]) for values in different.values()],
                "config": yaml.safe_dump(dict(first[index].config), sort_keys=False, allow_unicode=True, width=100),
            }
        )
    return out, list(different)


def _facts(found: Results) -> list[tuple[str, str, str]]:
    """The numbers below the title: (value, name, detail). What is not known, or not one for all, is left out."""
    runs = found.runs
    seeds, done = sorted({run.seed for run in runs}), [run for run in runs if run.finished]
    several = f"{len(seeds)} seeds each" if len(seeds) > 1 else f"seed {seeds[0]}"
    facts = [(str(len(found.methods)), f"routing method{'s' * (len(found.methods) > 1)}", several)]
    if len(found.sizes) > 1:
        facts.append((str(len(found.sizes)), "headings" if found.plan is None else "sizes", "a table each"))
    facts.append((f"{len(done)} of {len(runs)}", "runs are done", ""))
    if total := _one(done, "parameters.total", results=True):
        active = _one(done, "parameters.active", results=True)
        detail = f"{count(active)} active per {found.quality.token}" if active else ""
        facts.append((count(total), "parameters", detail))
    if experts := _one(runs, "model.experts"):
        top_k, layers = _one(runs, "model.top_k"), _one(runs, "model.layers")
        told = [f"top-{top_k}"] * bool(top_k) + [f"{layers} layers"] * bool(layers)
        facts.append((str(experts), "experts per layer", ", ".join(told)))
    if steps := _one(runs, "train.steps"):
        seconds = [value for run in done if (value := run.value("train", "seconds")) is not None]
        told = [f"about {duration(sum(seconds) / len(seconds))} a run"] if seconds else []
        facts.append((f"{steps:,}", "training steps", "".join(told)))
    corpus = found.baselines.get("corpus")
    if isinstance(corpus, Mapping) and isinstance(corpus.get("train"), int):
        facts.append(
            (f"{count(corpus['train'])}B", "of training text", f"{corpus.get('valid', 0):,} bytes for validation")
        )
    if found.seconds:
        facts.append((duration(found.seconds), "of processes' time in all", ""))
    return facts


def _one(runs: Sequence[Run], key: str, results: bool = False) -> Any:
    """The value that all runs have; None where they differ or have none."""
    values = [dig(run.result if results else run.config, key) for run in runs]
    return values[0] if values and all(value == values[0] for value in values) else None


def _provenance(found: Results) -> list[tuple[str, str]]:
    """Where the data came from, on which machine and by which code it ran, as (name, text)."""
    corpus, machine = (found.baselines.get(name) or {} for name in ("corpus", "machine"))
    begun = [run for run in found.runs if run.state.kind != "waiting"]
    records: list[Mapping[str, Any]] = [{**run.record, **(dig(run.result, "machine") or {})} for run in begun]
    records = [record for record in records if record] or [machine]
    data = [str(corpus[key]) for key in ("name", "source") if corpus.get(key)]
    data += [f"{corpus[key]:,} {key} bytes" for key in ("train", "valid", "test") if isinstance(corpus.get(key), int)]
    data += [f"sha256 {str(corpus['sha256'])[:12]}"] if corpus.get("sha256") else []
    names = [(dig(run.config, "data.name"), dig(run.config, "data.switch_to")) for run in begun]
    data = data or sorted({f"{name}, then {then}" if then else str(name) for name, then in names if name})
    keys = ("cpu", "gpu", "cores", "platform")
    machines = {tuple(_called(key, record[key]) for key in keys if record.get(key)) for record in records}
    keys = ("sinkroute", "commit", "torch", "python")
    versions = {tuple(f"{key} {record[key]}" for key in keys if record.get(key)) for record in records}
    told = [("Data", data), ("Machine", sorted(map(" · ".join, machines))), ("Code", sorted(map(" · ".join, versions)))]
    told.append(("Configuration", [] if found.plan is None else [found.plan.path.name]))
    return [(name, " · ".join(each)) for name, each in told if any(each)]


def _called(key: str, value: Any) -> str:
    return f"{value} cores" if key == "cores" else str(value)
