"""How far a run is, and that nothing is read that belongs to another configuration."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sinkroute.lab.config import write_yaml
from sinkroute.lab.files import write_json
from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.lock import hold
from sinkroute.lab.study.state import (
    check_data,
    check_folders,
    read_record,
    read_result,
    read_state,
    record_begin,
    record_end,
    record_failure,
)

from .conftest import SMALL, finish

Planner = Callable[..., Plan]


def test_a_run_waits_then_is_unfinished_then_done(plan: Planner) -> None:
    found = plan(seeds=[0])
    cell, folder = found.cells[0], found.out / found.cells[0].name
    assert read_state(cell, found.out).kind == "waiting"
    folder.mkdir(parents=True)
    write_yaml(cell.config, folder / "config.yaml")
    assert read_state(cell, found.out).kind == "waiting"  # nothing was trained yet
    (folder / "log.jsonl").write_text('{"kind": "train", "step": 2}\n{"kind": "tr')
    state = read_state(cell, found.out)
    assert (state.kind, state.step, state.note) == ("unfinished", 2, "")
    (folder / "log.jsonl").write_text('{"kind": "train", "step": 4}\n')
    assert read_state(cell, found.out).note == "to be evaluated"
    finish(cell, found.out, 2.0)
    assert read_state(cell, found.out).kind == "done"
    assert read_result(cell, found.out)["valid"] == {"bits_per_byte": 2.0}


def test_a_result_without_its_record_is_not_done(plan: Planner) -> None:
    """The process died between the two; the next call reads it and writes the record."""
    found = plan(seeds=[0])
    finish(found.cells[0], found.out, 2.0)
    (found.out / found.cells[0].name / "cell.json").unlink()
    assert read_state(found.cells[0], found.out).kind == "unfinished"


def test_who_has_a_run_is_told(plan: Planner) -> None:
    found = plan(seeds=[0])
    with hold(found.out / found.cells[0].name):
        state = read_state(found.cells[0], found.out)
    assert state.kind == "running"
    assert state.note.startswith("process ")


def test_a_failure_counts_under_its_own_hash_only(plan: Planner) -> None:
    found = plan(seeds=[0])
    cell = found.cells[0]
    record_failure(found.out / cell.name, cell.hash, "Diverged: at step 3")
    assert (read_state(cell, found.out).kind, read_state(cell, found.out).note) == ("failed", "Diverged: at step 3")
    record_failure(found.out / cell.name, "another", "")
    assert read_state(cell, found.out).kind == "waiting"


def test_results_of_other_configurations_are_refused_with_folders_differences_and_cure(plan: Planner) -> None:
    before = plan(seeds=[0, 1])
    for cell in before.cells[:3]:
        finish(cell, before.out, 2.0)
    after = plan(config={**SMALL, "train": {**SMALL["train"], "steps": 5}}, seeds=[0, 1])
    with pytest.raises(ValueError, match="must not be mixed") as error:
        check_folders(after.cells, after.out)
    words = str(error.value)
    assert all(cell.name in words for cell in before.cells[:3])
    assert before.cells[3].name not in words
    assert "train.steps: 4 → 5" in words
    assert before.cells[0].hash[:12] in words
    assert after.cells[0].hash[:12] in words
    assert "another --out, or --fresh" in words
    assert read_state(after.cells[0], after.out).kind == "waiting"  # not even a report takes it for the other


def test_a_folder_that_was_copied_over_another_is_refused(plan: Planner) -> None:
    found = plan(seeds=[0])
    finish(found.cells[0], found.out, 2.0)
    (found.out / found.cells[0].name).rename(found.out / found.cells[1].name)
    with pytest.raises(ValueError, match=r"router.name: 'softmax' → 'ssr-l'|router.name: 'ssr-l' → 'softmax'"):
        check_folders(found.cells, found.out)


def test_what_does_not_decide_the_numbers_may_change(plan: Planner) -> None:
    before = plan(seeds=[0])
    finish(before.cells[0], before.out, 2.0)
    after = plan(config={**SMALL, "train": {**SMALL["train"], "log_every": 1}}, seeds=[0])
    check_folders(after.cells, after.out)
    assert read_state(after.cells[0], after.out).kind == "done"


def test_a_changed_evaluation_is_to_be_done_again(plan: Planner) -> None:
    before = plan(seeds=[0])
    finish(before.cells[0], before.out, 2.0)
    after = plan(config={**SMALL, "eval": {"batch": 64, "attacks": {}}}, seeds=[0])
    check_folders(after.cells, after.out)
    state = read_state(after.cells[0], after.out)
    assert state.kind == "unfinished"
    assert "to be evaluated again (eval.attacks" in state.note


def test_a_result_that_is_not_what_the_run_wrote_is_refused(plan: Planner) -> None:
    found = plan(seeds=[0])
    finish(found.cells[0], found.out, 2.0)
    path = found.out / found.cells[0].name / "result.json"
    path.write_text(path.read_text().replace("2.0", "1.0"))
    with pytest.raises(ValueError, match=r"result.json is not what this run wrote; delete it"):
        read_result(found.cells[0], found.out)


def test_runs_of_other_data_are_refused(plan: Planner) -> None:
    found = plan(seeds=[0])
    for cell in found.cells:
        finish(cell, found.out, 2.0)
    check_data(found.cells, found.out)
    write_json({"sha256": "1"}, found.out / found.cells[1].name / "corpus.json")
    with pytest.raises(ValueError, match=r"trained on different data.*must not be mixed"):
        check_data(found.cells, found.out)


def test_a_folder_of_something_else_is_left_alone(plan: Planner) -> None:
    found = plan(seeds=[0])
    folder = found.out / found.cells[0].name
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="holds something else than a run of this comparison"):
        check_folders(found.cells, found.out)


def test_the_time_of_all_sessions_is_added_up(plan: Planner) -> None:
    found = plan(seeds=[0])
    cell, folder = found.cells[0], found.out / found.cells[0].name
    folder.mkdir(parents=True)
    for seconds, fresh in ((1.5, False), (2.0, False)):
        record_begin(folder, cell.hash, {"commit": "abc"}, fresh)
        record_end(folder, seconds, done=False)
    assert read_record(cell, found.out) == {"hash": cell.hash, "commit": "abc", "seconds": 3.5}
    record_begin(folder, cell.hash, {}, fresh=True)
    assert json.loads((folder / "cell.json").read_text())["seconds"] == 0
