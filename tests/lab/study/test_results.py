"""What is gathered from the folders of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from scipy import stats

from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.metric import Metric, dig
from sinkroute.lab.study.results import gather
from sinkroute.lab.study.state import record_failure

from .conftest import SMALL, finish

Planner = Callable[..., Plan]
BITS = {"vanilla": [3.0, 3.1, 3.2, 3.3], "ssr-l": [2.9, 3.05, 3.0, 3.25], "ssr-s": [3.1, 3.1, 3.3, 3.5]}
METHODS = {name: {"router": {"name": name.replace("vanilla", "softmax")}} for name in BITS}


def fill(plan: Plan, bits: dict[str, list[float]] = BITS) -> None:
    for cell in plan.cells:
        finish(cell, plan.out, bits[cell.method][cell.seed])


def test_methods_are_paired_with_the_reference_by_seed_and_corrected_together(plan: Planner) -> None:
    found = plan(methods=METHODS, seeds=[0, 1, 2, 3], reference="vanilla")
    fill(found)
    results = gather(found)
    assert results.headline.key == "valid.bits_per_byte"
    key = results.headline.key
    one, two = results.entries["", "ssr-l", key].against, results.entries["", "ssr-s", key].against
    assert one.paired.difference.mean == pytest.approx(-0.1)
    p_one = stats.ttest_rel(BITS["ssr-l"], BITS["vanilla"]).pvalue
    p_two = stats.ttest_rel(BITS["ssr-s"], BITS["vanilla"]).pvalue
    assert p_one < p_two
    assert one.p_corrected == pytest.approx(2 * p_one)
    assert two.p_corrected == pytest.approx(max(2 * p_one, p_two))
    assert results.entries["", "vanilla", key].against is None
    assert results.family == 2


def test_the_family_of_the_correction_goes_over_sizes(plan: Planner) -> None:
    sizes = {"s": {}, "t": {"model": {"d_model": 64}}}
    found = plan(methods=METHODS, sizes=sizes, seeds=[0, 1, 2, 3], reference="vanilla")
    fill(found)
    results = gather(found)
    assert results.family == 4
    p = stats.ttest_rel(BITS["ssr-l"], BITS["vanilla"]).pvalue
    assert results.entries["s", "ssr-l", results.headline.key].against.p_corrected == pytest.approx(4 * p)


def test_a_seed_that_failed_lowers_n_and_is_told(plan: Planner) -> None:
    found = plan(methods=METHODS, seeds=[0, 1, 2, 3], reference="vanilla")
    for cell in found.cells:
        if (cell.method, cell.seed) == ("ssr-l", 3):
            record_failure(found.out / cell.name, cell.hash, "Diverged: loss is nan")
        elif (cell.method, cell.seed) != ("vanilla", 0):
            finish(cell, found.out, BITS[cell.method][cell.seed])
    results = gather(found)
    entry = results.entries["", "ssr-l", results.headline.key]
    assert (entry.estimate.n, entry.against.paired.difference.n) == (3, 2)  # seeds 0, 1, 2; and vanilla has no seed 0
    assert results.counts("", "ssr-l") == (3, 4)
    assert "ssr-l-seed3 failed and is not in the numbers: Diverged: loss is nan" in results.notes
    assert "1 of 12 runs are not done yet; n counts those that are." in results.notes


def test_a_number_that_is_not_finite_is_left_out_and_told(plan: Planner) -> None:
    found = plan(methods=METHODS, seeds=[0, 1, 2, 3], reference="vanilla")
    fill(found, BITS | {"ssr-l": [math.nan, 2.0, 2.0, 2.0]})
    results = gather(found)
    assert results.entries["", "ssr-l", results.headline.key].estimate.n == 3
    assert "ssr-l: 1 of 4 runs have no finite valid bits/byte." in results.notes


def test_with_few_seeds_the_notes_say_what_the_exact_test_cannot(plan: Planner) -> None:
    found = plan(methods=METHODS, seeds=[0, 1, 2, 3], reference="vanilla")
    fill(found)
    assert any("cannot get below p = 0.125 with 4 seeds" in note for note in gather(found).notes)
    one = plan(methods=METHODS, seeds=[0], reference="vanilla")
    assert any("With one seed there is neither interval nor test" in note for note in gather(one).notes)


def test_nothing_yet_is_said(plan: Planner) -> None:
    assert gather(plan()).notes == ("No run is done yet, so there is nothing to compare.",)


def test_default_metrics_are_quality_attacks_balance_and_time(plan: Planner) -> None:
    attacks = {"word-swap@2.5%": {"rate": 0.025}}
    found = plan(config={**SMALL, "eval": {"attacks": attacks}}, seeds=[0])
    for cell in found.cells:
        attacked = {"word-swap@2.5%": {"error": 7.5, "rate": 0.025}}
        finish(cell, found.out, 0, metric="error", valid={"error": 5.0}, attacked=attacked)
    results = gather(found)
    assert [metric.key for metric in results.metrics] == [
        "valid.error",
        "attacked.word-swap@2.5%.error",
        "serving.max_vio",
        "train.max_vio",
        "train.ms_per_step",
    ]
    assert results.entries["", "vanilla", "attacked.word-swap@2.5%.error"].values == {0: 7.5}


def test_metrics_can_be_chosen(plan: Planner) -> None:
    found = plan(seeds=[0], metrics=["serving.entropy", "parameters.active"])
    for cell in found.cells:
        finish(cell, found.out, 3, serving={"entropy": 0.9, "load": []})
    results = gather(found)
    assert results.headline == Metric("serving.entropy", "serving entropy", 3, lower_is_better=False)
    assert results.entries["", "ssr-l", "parameters.active"].values == {0: 2000.0}


def test_a_dotted_key_finds_names_with_dots() -> None:
    result = {"a": {"b.c": {"d": 1}, "b": {"x": 2}}}
    assert dig(result, "a.b.c.d") == 1
    assert dig(result, "a.b.x") == 2
    assert dig(result, "a.b.y") is None


def test_other_ways_of_serving_are_paired_with_the_plain_one_of_the_same_model(plan: Planner) -> None:
    found = plan(config={**SMALL, "eval": {"inference": ["noise"], "attacks": {}}}, seeds=[0, 1, 2])
    worse = [0.1, 0.2, 0.3]
    for cell in found.cells:
        mode = {"valid": {"bits_per_byte": 3 + worse[cell.seed]}, "serving": {"max_vio": 2.0, "load": [[1]]}}
        finish(cell, found.out, 3.0, inference={"noise": mode})
    results = gather(found)
    assert [(each.method, each.mode) for each in results.modes] == [(name, "noise") for name in found.methods]
    each = results.modes[0]
    assert each.against.paired.difference.mean == pytest.approx(0.2)
    assert each.against.p_corrected == pytest.approx(2 * stats.ttest_1samp(worse, 0).pvalue)
    assert each.value.mean == pytest.approx(3.2)
    assert each.max_vio.mean == 2.0


def test_the_trend_is_of_gains_over_the_active_parameters(plan: Planner) -> None:
    sizes = {name: {"model": {"d_model": 16 * 2**k}} for k, name in enumerate("stu")}
    found = plan(sizes=sizes, seeds=[0, 1], reference="vanilla")
    for cell in found.cells:
        k = "stu".index(cell.size)
        gain = 0.0 if cell.method == "vanilla" else 0.1 + 0.05 * k
        finish(cell, found.out, 3.0 - gain, parameters={"total": 9, "active": 1024 * 2**k})
    (each,) = gather(found).trends
    assert each.method == "ssr-l"
    assert each.line.slope.mean == pytest.approx(0.05)  # a doubling a step
    assert each.line.at(12)[0] == pytest.approx(0.2)  # log2 of 4096
    assert (each.points[0], len(each.points)) == ((1024, 0, pytest.approx(0.1)), 6)


def test_runs_of_several_versions_and_machines_are_told(plan: Planner) -> None:
    found = plan(seeds=[0, 1])
    fill(found, {"vanilla": [3, 3], "ssr-l": [3, 3]})
    path = found.out / found.cells[0].name / "cell.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"commit": "abc", "cpu": "other", "jobs": 2, "threads": 1}))
    notes = " ".join(gather(found).notes)
    assert "different versions of the code: 0 None, 0 abc" in notes
    assert "different machines" in notes
    assert "Times per step" in notes


def test_everything_is_in_the_json(plan: Planner) -> None:
    found = plan(methods=METHODS, seeds=[0, 1, 2, 3], reference="vanilla")
    fill(found)
    content = json.loads(json.dumps(gather(found).json()))
    assert len(content["cells"]) == 12
    cell = content["cells"][0]
    assert cell["hash"] == found.cells[0].hash
    assert cell["config"]["train"]["steps"] == 4
    assert "load" not in cell["result"]["serving"]
    assert content["seconds"] == 12 * 7.0
    entry = next(each for each in content["statistics"] if each["method"] == "ssr-l")
    assert entry["seeds"] == {"0": 2.9, "1": 3.05, "2": 3.0, "3": 3.25}
    assert entry["against"]["paired"]["p_flip"] == 0.125
    assert content["correction"]["method"] == "Holm"
    assert content["machine"]["torch"]
