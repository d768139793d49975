from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from sinkroute.lab.page.loads import rgba
from sinkroute.lab.page.palette import inks
from sinkroute.lab.study import figures
from sinkroute.lab.study.figures.loads import _columns
from sinkroute.lab.study.figures.marks import apart
from sinkroute.lab.study.runs import group_runs, read_runs

MakeRun = Callable[..., Path]


def draw_all(folder: Path) -> dict[str, str]:
    groups = group_runs(read_runs(folder))
    colours = inks(group.method for group in groups)
    baselines = {"bigram": {"bits_per_byte": 3.9}}
    return {
        "standing": figures.standing_figure(groups, colours, baselines),
        "training": figures.training_figure(groups, colours, baselines),
        "balance": figures.balance_figure(groups, colours),
        "experts": figures.experts_figure(groups, colours),
        "serving": figures.serving_figure(groups, colours),
        "scatter": figures.scatter_figure(groups, colours),
    }


def test_every_figure_is_clean_inline_svg(demo: Path) -> None:
    for name, svg in draw_all(demo).items():
        root = ET.fromstring(svg)
        assert root.tag == "svg" and root.get("aria-label")
        assert "http" not in svg and "<style" not in svg and "<?xml" not in svg
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert all(str(one).startswith(f"{name}-") for one in ids)
        targets = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
        assert set(targets) <= set(ids)


def test_figures_use_the_colours_of_the_page_and_none_of_the_stand_ins(demo: Path) -> None:
    svg = "".join(draw_all(demo).values())
    assert "var(--ink)" in svg and "var(--m3)" in svg and 'class="m m3"' in svg
    assert not re.search(r"#0000[0-9a-f]{2}\b", svg)
    assert "fill: #000000" not in svg


def test_the_same_runs_draw_the_same_bytes(demo: Path) -> None:
    assert draw_all(demo) == draw_all(demo)


def test_drawing_leaves_no_global_state(demo: Path) -> None:
    before = dict(mpl.rcParams)
    draw_all(demo)
    assert dict(mpl.rcParams) == before


def test_a_curve_over_seeds_is_their_mean_with_their_range(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", seed=0, bits=3.0)
    make_run(tmp_path, "b", "softmax", "Vanilla", seed=1, bits=4.0)
    line = figures.curve(read_runs(tmp_path), "loss")
    # Seed 0 is 3 + 4 / i, seed 1 is 4 + 4 / i, and four lines are not smoothed.
    assert line.steps.tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(line.mean, [7.5, 5.5, 4.5 + 1 / 3, 4.5])
    np.testing.assert_allclose(line.high - line.low, 1.0)


def test_max_vio_is_averaged_over_layers(demo: Path) -> None:
    line = figures.curve(read_runs(demo / "ssr-s"), "max_vio")
    np.testing.assert_allclose(line.mean, [1.0, 0.75, 0.5 + 1 / 6, 0.625])


def test_a_diverged_seed_makes_the_mean_nan_from_there_on(demo: Path, make_run: MakeRun) -> None:
    other = make_run(demo, "ssr-s-1", "ssr-s", "SSR-S", seed=1)
    log = other / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8") + '{"kind": "train", "step": 50, "loss": NaN}\n', encoding="utf-8")
    line = figures.curve(read_runs([demo / "ssr-s", other]), "loss")
    assert math.isnan(line.mean[-1]) and np.isfinite(line.mean[:-1]).all()


def test_smoothing_keeps_a_constant_and_what_is_not_finite() -> None:
    values = np.ones(48)
    values[10] = math.nan
    smoothed = figures.smooth(values)
    assert math.isnan(smoothed[10]) and smoothed[np.arange(48) != 10].tolist() == [1.0] * 47


def test_smoothing_averages_over_an_eighth_of_the_points() -> None:
    values = np.zeros(32)
    values[16] = 5.0
    assert figures.smooth(values)[14:19].tolist() == [1.0] * 5  # reach 2: five points share it
    assert figures.smooth(values)[13] == figures.smooth(values)[19] == 0.0


def test_loads_over_training_are_relative_to_a_fair_share(demo: Path) -> None:
    edges, loads = figures.load_history(read_runs(demo / "ssr-s")[0])
    assert edges.tolist() == [0, 10, 20, 30, 40] and loads.shape == (4, 2, 4)
    np.testing.assert_allclose(loads[0], [[1.05, 1.0, 1.0, 0.95], [2.0, 1.0, 1.0, 0.0]])


def test_a_balanced_expert_is_a_clear_pixel_and_a_dead_or_the_busiest_one_is_opaque() -> None:
    alpha = rgba(np.array([1.0, 0.0, 3.0, 9.0]), top=9.0)[:, 3]
    np.testing.assert_allclose(alpha, [0.0, 1.0, 0.5, 1.0])


def test_log_lines_keep_their_width_in_the_heat_map() -> None:
    image = _columns(np.array([0.0, 10.0, 40.0]), np.array([[1.0], [2.0]]))
    assert image.shape == (1, 60)
    assert (image == 1.0).sum() == 15  # the first line covers a quarter of the steps


def test_labels_are_pushed_apart_by_no_more_than_needed() -> None:
    assert apart([0.0, 100.0, 1.0], 10.0) == pytest.approx([-4.5, 100.0, 5.5])
    places = apart([5.0, 5.0, 5.0], 10.0)
    assert sorted(places) == [-5.0, 5.0, 15.0]


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 13])
def test_few_log_lines_are_drawn(make_run: MakeRun, tmp_path: Path, lines: int) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", lines=lines, finished=False)
    make_run(tmp_path, "b", "ssr-s", "SSR-S", lines=lines, probability=0.1)
    assert len(draw_all(tmp_path)) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_runs_are_drawn(make_run: MakeRun, tmp_path: Path, value: float) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=value, loss=value, max_vio=value)
    make_run(tmp_path, "b", "ssr-s", "SSR-S")
    drawn = draw_all(tmp_path)
    assert "diverged" in drawn["standing"]


def test_a_run_alone_with_nothing_finite_is_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(tmp_path, "a", "softmax", "Vanilla", bits=math.nan, loss=math.nan, max_vio=math.nan)
    assert "no training loss" in draw_all(tmp_path)["training"]


def test_logs_without_loads_and_with_many_layers_are_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    bare = make_run(tmp_path, "a", "softmax", "Vanilla")
    (bare / "log.jsonl").write_text('{"kind": "train", "step": 10, "loss": 2.0}\n', encoding="utf-8")
    deep = make_run(tmp_path, "b", "ssr-s", "SSR-S", result={"serving": {"load": [[3, 1]] * 8, "max_vio": 0.5}})
    line = {"kind": "train", "step": 10, "loss": 2.0, "max_vio": [0.5] * 8, "load": [[3, 1]] * 8}
    (deep / "log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    drawn = draw_all(tmp_path)
    assert "no load logged" in drawn["experts"] and "layer 8" in drawn["serving"]


def test_known_methods_have_fixed_colours_and_no_two_methods_share_one() -> None:
    names = ["ssr-s", "softmax", "load-balance", "z-loss", "sinkhorn", "ssr-l", "mine", "yours", "ssr-s"]
    found = inks(names)
    assert len({ink.light for ink in found}) == len(names)
    assert inks(["softmax"])[0] == found[1]
