"""The study: its pages say what its results say, and its results are those of its presets."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sinkroute.lab.compare.config import read_comparison

ROOT = Path(__file__).parents[1]
REGISTERED = sorted((ROOT / "experiments" / "study").glob("*.yaml"))
# A preset is committed before its first run; until then a page says that it is to come.
RUN = {path.stem for path in (ROOT / "benchmarks" / "results" / "study").glob("*.json")}
PRESETS = [path for path in REGISTERED if path.stem in RUN]


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "scripts" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_each_preset_has_results_and_they_are_its_own(study, preset):
    found = study.read(preset.stem)
    wanted = json.loads(json.dumps(asdict(read_comparison(preset))))
    assert found["compare"] == study._short(wanted)
    assert not found["overrides"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_each_run_of_a_preset_is_done(study, preset):
    found = study.read(preset.stem)
    assert [cell for cell in found["cells"] if cell["state"] != "done"] == []
    assert {cell["seed"] for cell in found["cells"]} == set(read_comparison(preset).seeds)


def test_the_pages_hold_the_tables_of_the_results(study):
    for path in study.PAGES:
        text = path.read_text(encoding="utf-8")
        assert "<!-- study: " in text
        assert study.page(text) == text, f"run: python scripts/study.py pages ({path.name} is not what it writes)"


def test_every_comparison_stands_on_a_page(study):
    shown = "".join(path.read_text(encoding="utf-8") for path in study.PAGES)
    assert [preset.stem for preset in PRESETS if f"<!-- study: {preset.stem} -->" not in shown] == []


def test_what_is_registered_and_not_run_is_said(study):
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert [path.stem for path in REGISTERED if path.stem not in RUN and f"`study/{path.stem}`" not in text] == []


def test_the_headline_has_five_seeds_or_more_and_everything_else_three(study):
    for preset in PRESETS:
        seeds = {cell["seed"] for cell in study.read(preset.stem)["cells"]}
        assert len(seeds) >= (5 if preset.stem == "paper-lm" else 3), preset.stem


def test_a_difference_in_a_table_is_the_mean_over_the_seeds_of_both(study):
    found = study.read("paper-lm")
    rows = {row["method"]: row for row in found["statistics"] if row["metric"] == "valid.bits_per_byte"}
    ours, theirs = rows["ssr-bias"]["seeds"], rows["vanilla"]["seeds"]
    mean = sum(ours[seed] - theirs[seed] for seed in ours) / len(ours)
    assert rows["ssr-bias"]["against"]["paired"]["difference"]["mean"] == pytest.approx(mean, abs=1e-5)
