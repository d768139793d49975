"""The log of a run, cut back to its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sinkroute.lab.log import RunLog, read_log


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, numbers: range, last_step: int) -> None:
    log = RunLog(path, last_step)
    for number in numbers:
        log.write({"step": number})
    log.close()


def test_lines_after_the_checkpoint_are_removed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 8), last_step=0)
    write(path, range(6, 9), last_step=5)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_torn_line_is_removed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(1, 4), last_step=0)
    path.write_text(path.read_text() + '{"step": 3, "lo')
    write(path, range(4, 5), last_step=3)
    assert steps(path) == [1, 2, 3, 4]


def test_a_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0)
    log.write({"step": 1})
    assert steps(tmp_path / "log.jsonl") == [1]
    log.close()


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0, enabled=False)
    log.write({"step": 1})
    log.close()
    assert not (tmp_path / "log.jsonl").exists()


def test_a_full_disk_is_an_error_and_earlier_lines_stay(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    path = tmp_path / "log.jsonl"
    write(path, range(1, 3), last_step=0)
    log = RunLog(path, 2)
    log.file.close()
    log.file = full.open("w")
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 3})
    assert steps(path) == [1, 2]


def test_a_log_is_read_by_kind_in_the_order_of_steps_and_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [("train", 2, 1), ("train", 1, 1), ("eval", 2, 1), ("train", 2, 2)]
    path.write_text("".join(json.dumps({"kind": kind, "step": at, "n": n}) + "\n" for kind, at, n in lines) + '{"to')
    train, evals = read_log(path)
    assert [(line["step"], line["n"]) for line in train] == [(1, 1), (2, 2)]
    assert [line["step"] for line in evals] == [2]


@pytest.mark.parametrize(
    ("first", "words"),
    [("torn {", "line 1: not a JSON object"), ("[1]", "an object, received list"), ('{"a": 1}', "'step' must be")],
)
def test_a_line_that_is_not_the_last_must_be_whole_and_have_a_step(tmp_path: Path, first: str, words: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{first}\n{{"kind": "train", "step": 1}}\n')
    with pytest.raises(ValueError, match=words):
        read_log(path)
