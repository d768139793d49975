"""Seeds and effects, held to published tables and to simulated studies."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.power import (
    Scatter,
    alike,
    detectable,
    power,
    power_tables,
    read_sources,
    seeds_needed,
    tost_power,
)

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "study"
Planner = Callable[..., Plan]


@pytest.mark.parametrize(
    # Of the paired t-test, two-sided at 0.05, as G*Power 3.1 and Cohen's tables give them.
    ("effect", "wanted", "seeds"),
    [(0.2, 0.8, 199), (0.2, 0.9, 265), (0.5, 0.8, 34), (0.5, 0.9, 44), (0.8, 0.8, 15), (0.8, 0.9, 19), (1.0, 0.8, 10)],
)
def test_seeds_are_those_of_published_tables(effect: float, wanted: float, seeds: int) -> None:
    assert seeds_needed(lambda n: power(effect, n), wanted) == seeds


@pytest.mark.parametrize(
    # Of the R package PowerTOST, 2x2 crossover, ratio 0.95, limits 0.8 to 1.25: CV, subjects, power.
    ("cv", "subjects", "found"),
    [(0.2, 20, 0.834680), (0.3, 40, 0.815845)],
)
def test_the_power_of_two_one_sided_tests_is_that_of_published_tables(cv: float, subjects: int, found: float) -> None:
    error = math.sqrt(math.log(1 + cv**2)) * math.sqrt(2 / subjects)
    assert alike(math.log(1.25) / error, subjects - 2, true=math.log(0.95) / error) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("n", [3, 10])
def test_powers_are_how_often_simulated_studies_tell(n: int) -> None:
    draws = np.random.default_rng(0).standard_normal((20000, n))
    error = 4 * math.sqrt(0.25 / len(draws))
    effect = detectable(n)
    told = stats.ttest_1samp(draws + effect, 0, axis=1).pvalue < 0.05
    assert told.mean() == pytest.approx(0.8, abs=error)
    assert power(effect, n) == pytest.approx(0.8)
    half = stats.t.ppf(0.95, n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
    for margin, true in ((effect, 0.0), (effect, 0.3)):
        mean = draws.mean(axis=1) + true
        same = (mean - half > -margin) & (mean + half < margin)
        assert same.mean() == pytest.approx(tost_power(margin, n, true=true), abs=error)


@pytest.mark.parametrize(("n", "level"), [(2, 0.05), (3, 0.05 / 12), (5, 0.005), (10, 0.05 / 16), (24, 0.05)])
def test_a_power_is_the_integral_over_the_estimated_scatter(n: int, level: float) -> None:
    """Given the estimate the mean is normal: no noncentral t, whose function in scipy is NaN for some of these."""
    effect = detectable(n, level)
    edge, shift = stats.t.ppf(1 - level / 2, n - 1), effect * math.sqrt(n)
    scatter = np.linspace(1e-6, 6, 200_001)
    told = stats.norm.sf(edge * scatter - shift) + stats.norm.cdf(-edge * scatter - shift)
    density = stats.chi.pdf(scatter * math.sqrt(n - 1), n - 1) * math.sqrt(n - 1)
    assert np.trapezoid(told * density, scatter) == pytest.approx(0.8, abs=1e-5)


def test_a_power_without_an_effect_is_the_level_and_far_out_it_is_one() -> None:
    assert power(0.0, 3) == pytest.approx(0.05)
    assert power(0.0, 3, 0.01) == pytest.approx(0.01)
    # Here scipy's distribution function of the lower tail is NaN.
    assert [power(effect, 16, 0.025) for effect in (2.0, 10.0, 30.0)] == pytest.approx([1, 1, 1], abs=1e-6)
    assert tost_power(1e-3, 3) < 0.01  # and not below 0, as the usual approximation is


def test_an_effect_that_nothing_finds_has_no_number_of_seeds() -> None:
    assert seeds_needed(lambda n: power(1e-4, n), 0.8) is None


def test_a_scatter_is_about_the_mean_of_each_pair_and_its_interval_holds_in_95_of_100_cases() -> None:
    pairs = np.random.default_rng(0).normal(5.0, 2.0, (2000, 6))
    found = [Scatter.of([pair[:3].tolist(), (pair[3:] + 100).tolist()]) for pair in pairs]
    assert all(each is not None and each.freedom == 4 for each in found)
    held = [low < 2.0 < high for low, high in (each.interval for each in found if each)]
    assert np.mean(held) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))
    assert Scatter.of([[1.0], []]) is None


def results(folder: Path, name: str = "old", **metrics: dict[str, list[float]]) -> Path:
    """A file of results: metric → method → a value for each seed."""
    rows = [
        {"size": "", "method": method, "metric": metric.replace("__", "."), "seeds": dict(enumerate(values))}
        for metric, methods in metrics.items()
        for method, values in methods.items()
    ]
    compare = {"base": "", "config": {"train": {"steps": 100}}, "sizes": {}}
    cells = [{"state": "done", "size": "", "parameters": {"active": 50_000}}, {"state": "failed", "size": ""}]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"statistics": rows, "compare": compare, "cells": cells, "seconds": 10}))
    return path


def shown(plan: Plan, path: Path) -> str:
    tables, notes = power_tables(plan, read_sources([path]))
    console = Console(width=120, file=io.StringIO())
    console.print(*tables, *notes)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_needed_is_told_of_the_named_pair_metric_effect_and_margin(plan: Planner, tmp_path: Path) -> None:
    # ssr-l less vanilla: -1, 0, 1, so sd = 1.
    path = results(
        tmp_path, valid__loss={"vanilla": [5.0, 5.0, 5.0], "ssr-l": [4.0, 5.0, 6.0], "other": [0.0, 9.0, 1.0]}
    )
    primary = {"method": "ssr-l", "metric": "valid.loss", "effect": 1.0, "equivalence": 1.0}
    words = shown(plan(seeds=list(range(10)), primary=primary), path)
    assert "ssr-l - vanilla" in words and "other" not in words
    rows = [re.split(r"\s{2,}", line.strip()) for line in words.splitlines()]
    assert ["two-sided, alone, 1", "0.05", "1", "10", "13", "80%"] in rows  # as in the published tables
    alike_at = [str(seeds_needed(lambda n: tost_power(1.0, n), wanted)) for wanted in (0.8, 0.9)]
    assert ["alike (TOST), 1", "0.05", "1", *alike_at, "80%"] in rows


def test_a_family_is_all_methods_at_all_sizes_and_its_first_test_needs_more(plan: Planner, tmp_path: Path) -> None:
    path = results(tmp_path, valid__loss={"vanilla": [5.0, 5.0, 5.0], "ssr-l": [4.0, 5.0, 6.0]})
    words = shown(plan(seeds=[0, 1, 2], sizes={"a": {}, "b": {}}, metrics=["valid.loss"]), path)
    assert "first of 2" in words
    assert f"{detectable(3, 0.025):.3g}" in words
    assert "names no effect" in words


def test_the_scatter_of_other_pairs_is_taken_where_there_is_no_other_and_said(plan: Planner, tmp_path: Path) -> None:
    path = results(tmp_path, valid__loss={"vanilla": [5.0, 5.0, 5.0], "new": [4.0, 5.0, 6.0]})
    words = shown(plan(seeds=[0, 1], metrics=["valid.loss"]), path)
    assert "other methods against vanilla, for no earlier result has these" in words
    with pytest.raises(ValueError, match=r"no earlier result has two methods with two seeds of valid.error; there are"):
        shown(plan(seeds=[0, 1], metrics=["valid.error"]), path)


def test_bits_of_words_are_the_logarithm_of_an_old_perplexity(tmp_path: Path) -> None:
    path = results(tmp_path, valid__perplexity={"vanilla": [256.0]})
    assert read_sources([path])[0].values["", "vanilla", "valid.bits_per_symbol"] == {"0": 8.0}


def test_hours_grow_with_steps_and_active_parameters(plan: Planner, tmp_path: Path) -> None:
    path = results(tmp_path, valid__loss={"vanilla": [5.0, 5.0], "ssr-l": [4.0, 5.0]})
    source = read_sources([path])[0]
    assert (source.seconds_per_step, source.active) == (0.1, 50_000)  # 10 s for the one run of 100 steps
    one = plan(seeds=[0, 1], metrics=["valid.loss"], config={"train": {"steps": 36_000, "warmup": 1}})
    from sinkroute.lab.models.registry import make_model

    active = make_model(one.cells[0].config).count_parameters().active
    hours = 4 * 36_000 * 0.1 * active / 50_000 / 3600
    assert f"about {hours:.1f} core-hours for 4 runs" in " ".join(power_tables(one, [source])[1])


def test_a_place_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no results of a comparison"):
        read_sources([tmp_path])


def test_one_seed_is_refused(plan: Planner) -> None:
    with pytest.raises(ValueError, match="has 1 seed"):
        power_tables(plan(seeds=[0]), read_sources([RESULTS / "dual.json"]))


def test_the_repositorys_results_can_all_be_read() -> None:
    sources = read_sources([RESULTS])
    assert {source.name for source in sources} == {path.stem for path in RESULTS.glob("*.json")}
    assert all(source.seconds_per_step and source.active for source in sources)
