"""What finished cells left goes into one file and comes back as it was, and never under another configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkroute.lab.study.cells import Plan, expand
from sinkroute.lab.study.config import read_study
from sinkroute.lab.study.keep import LOAD_LINES, LOG_LINES, keep, restore
from sinkroute.lab.study.results import gather
from sinkroute.lab.study.state import read_state

from .conftest import SMALL, finish

Planner = Callable[..., Plan]


def elsewhere(plan: Plan, folder: Path) -> Plan:
    return expand(plan.path, read_study(plan.path), out=str(folder))


@pytest.fixture
def half(plan: Planner) -> Plan:
    """Two of four cells are finished, one has begun."""
    found = plan(seeds=[0, 1])
    finish(found.cells[0], found.out, 2.125)
    finish(found.cells[2], found.out, 2.1 + 0.2)  # no short decimal number
    begun = found.out / found.cells[1].name
    begun.mkdir()
    (begun / "log.jsonl").write_text('{"kind": "train", "step": 2}\n')
    (begun / "config.yaml").write_text((found.out / found.cells[0].name / "config.yaml").read_text())
    return found


@pytest.fixture
def kept(half: Plan, tmp_path: Path) -> Path:
    (half.out / half.cells[1].name / "log.jsonl").unlink()
    path = tmp_path / "kept" / "mine.jsonl"
    assert keep(half, path) == (2, 2)
    return path


def test_restored_cells_are_done_with_the_same_files_and_the_rest_waits(half: Plan, kept: Path, tmp_path: Path) -> None:
    again = elsewhere(half, tmp_path / "other machine")
    laid, left = restore(again, kept)
    assert (laid, left) == ([half.cells[0].name, half.cells[2].name], [])
    assert [read_state(cell, again.out).kind for cell in again.cells] == ["done", "waiting", "done", "waiting"]
    for name in laid:
        for file in ("config.yaml", "corpus.json", "cell.json", "result.json"):
            assert (again.out / name / file).read_bytes() == (half.out / name / file).read_bytes()
    assert gather(again).json()["statistics"] == gather(half).json()["statistics"]


def test_a_later_keep_adds_lines_and_changes_none(half: Plan, kept: Path, tmp_path: Path) -> None:
    before = kept.read_text()
    again = elsewhere(half, tmp_path / "other machine")
    finish(again.cells[3], again.out, 2.5)  # nothing was restored there: what the file has stays in it
    assert keep(again, kept) == (3, 1)
    assert set(before.splitlines()) < set(kept.read_text().splitlines())
    restore(again, kept)
    once = kept.read_text()
    assert keep(again, kept) == (3, 0)
    assert kept.read_text() == once
    names = [json.loads(line)["name"] for line in once.splitlines()]
    assert names == sorted(names)


def test_a_run_that_is_there_is_left_alone(half: Plan, kept: Path) -> None:
    result = half.out / half.cells[0].name / "result.json"
    result.write_text("touched")
    assert restore(half, kept) == ([], [half.cells[0].name, half.cells[2].name])
    assert result.read_text() == "touched"


def test_what_another_configuration_left_is_refused_by_name(
    plan: Planner, half: Plan, kept: Path, tmp_path: Path
) -> None:
    wanted = half.cells[0].hash[:12]
    changed = plan(config={**SMALL, "train": {**SMALL["train"], "steps": 5}}, seeds=[0, 1], out=str(tmp_path / "new"))
    for act in (restore, keep):
        with pytest.raises(ValueError, match=f"holds {half.cells[0].name} made under {wanted}.*asks for"):
            act(changed, kept)
    assert not changed.out.exists()


def test_a_record_of_another_hash_than_its_configuration_is_refused(half: Plan, kept: Path) -> None:
    kept.write_text(kept.read_text().replace(half.cells[0].hash, "0" * 64))
    with pytest.raises(ValueError, match=half.cells[0].name):
        restore(half, kept)


def test_a_cell_that_the_study_does_not_have_is_refused(half: Plan, kept: Path) -> None:
    kept.write_text(kept.read_text().replace("vanilla-seed0", "vanila-seed0"))
    with pytest.raises(ValueError, match=r"unknown cell.*vanila-seed0.*did you mean 'vanilla-seed0'"):
        restore(half, kept)


def test_a_torn_line_is_refused_with_its_number(half: Plan, kept: Path) -> None:
    kept.write_text(kept.read_text()[:-40])
    with pytest.raises(ValueError, match="line 2, is not what `keep` writes"):
        restore(half, kept)


def test_a_changed_result_is_not_kept(half: Plan, tmp_path: Path) -> None:
    (half.out / half.cells[1].name / "log.jsonl").unlink()
    (half.out / half.cells[0].name / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what this run wrote"):
        keep(half, tmp_path / "mine.jsonl")


def test_a_result_whose_text_is_not_what_json_writes_keeps_its_digest(plan: Planner, tmp_path: Path) -> None:
    import hashlib

    found = plan(seeds=[0])
    finish(found.cells[0], found.out, 2.0)
    folder = found.out / found.cells[0].name
    text = '{"valid":   {"bits_per_byte": 2.00}}'
    (folder / "result.json").write_text(text)
    record = json.loads((folder / "cell.json").read_text())
    (folder / "cell.json").write_text(json.dumps(record | {"result": hashlib.sha256(text.encode()).hexdigest()}))
    keep(found, tmp_path / "mine.jsonl")
    again = elsewhere(found, tmp_path / "again")
    restore(again, tmp_path / "mine.jsonl")
    assert (again.out / folder.name / "result.json").read_text() == text


def test_of_a_long_log_lines_in_equal_distances_are_kept_and_numbers_in_five_digits(
    plan: Planner, tmp_path: Path
) -> None:
    found = plan(seeds=[0])
    finish(found.cells[0], found.out, 2.0)
    log = found.out / found.cells[0].name / "log.jsonl"
    line = {"kind": "train", "loss": 1 / 3, "aux_loss": None, "grad_norm": 0.1, "load": [[123456, 0]], "max_vio": [0.5]}
    log.write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in range(1, 101)))
    keep(found, tmp_path / "mine.jsonl")
    lines = json.loads((tmp_path / "mine.jsonl").read_text())["log"]
    assert [each["step"] for each in lines] == list(range(1, 101, 9))
    assert len(lines) <= LOG_LINES
    assert lines[0] == {"kind": "train", "step": 1, "loss": 0.33333, "max_vio": [0.5]}
    loaded = [each["step"] for each in lines if "load" in each]
    assert loaded == [19, 46, 73, 100] and len(loaded) <= LOAD_LINES
    assert lines[-1]["load"] == [[123456, 0]]
