"""The command as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinkroute.cli import main
from sinkroute.lab.study import run as run_module
from sinkroute.lab.study.cells import Plan
from sinkroute.lab.study.state import read_state, record_failure

from .conftest import SMALL, finish

Write = Callable[..., Path]
ANYTHING = {"name": "text", "path": __file__, "length": 32}
METHODS = {"vanilla": {"router": {"name": "softmax"}}, "ssr-l": {"router": {"name": "ssr-l"}}}


def compare(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, output, errors; each joined to one line."""
    try:
        code = main(["compare", *map(str, words)])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), " ".join(err.split())


def test_a_comparison_is_run_in_parallel_told_and_not_run_again(
    capsys: pytest.CaptureFixture[str], write: Write, text: Path, tmp_path: Path
) -> None:
    config = {**SMALL, "data": {**SMALL["data"], "path": str(text)}}
    path = write(title="Mine", config=config, methods=METHODS, seeds=[0])
    pasted = tmp_path / "pasted.md"
    options = ("--set", "train.steps=2", "--set", "train.lr=1e-2", "train.clip=2", "--jobs", "2", "--markdown", pasted)
    code, out, err = compare(capsys, path, *options)
    assert (code, err) == (0, "")
    assert "Mine: 2 methods × 1 sizes × 1 seeds" in out
    assert "2 waiting; 2 at a time with" in out
    assert "2/2 " in out
    folder = tmp_path / "out"
    content = json.loads((folder / "results.json").read_text())
    assert [cell["state"] for cell in content["cells"]] == ["done", "done"]
    train = content["cells"][0]["config"]["train"]
    assert (train["steps"], train["lr"], train["clip"]) == (2, 0.01, 2)
    assert content["cells"][0]["record"]["jobs"] == 2
    assert pasted.read_text() == (folder / "table.md").read_text()
    assert "| vanilla | " in pasted.read_text()
    assert "<svg" in (folder / "report.html").read_text()
    before = (folder / "vanilla-seed0" / "log.jsonl").stat().st_mtime_ns
    code, out, _ = compare(capsys, path, *options)
    assert (code, "2 done" in out) == (0, True)
    assert (folder / "vanilla-seed0" / "log.jsonl").stat().st_mtime_ns == before
    code, out, err = compare(capsys, path)
    assert code == 1
    assert "holds results of other configurations" in err
    assert "train.steps: 2 → 4" in err


def test_the_list_says_how_far_each_run_is(capsys: pytest.CaptureFixture[str], plan: Callable[..., Plan]) -> None:
    found = plan(seeds=[0, 1], methods=METHODS)
    finish(found.cells[0], found.out, 3.0)
    record_failure(found.out / found.cells[1].name, found.cells[1].hash, "Diverged: at step 2")
    code, out, _ = compare(capsys, found.path, "--list", "--seeds", "0", "1", "--only", "vanilla", "ssr-l")
    assert code == 0
    assert "4 runs" in out
    for words in ("done", "failed: Diverged: at step 2", "waiting"):
        assert words in out
    assert not (found.out / "results.json").exists()


def test_a_report_runs_nothing_and_a_failure_shows_in_the_exit_code(
    capsys: pytest.CaptureFixture[str], plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*words: Any, **more: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(run_module, "run_cells", never)
    monkeypatch.setattr(run_module, "check_cells", lambda cells: None)
    found = plan(seeds=[0, 1], methods=METHODS)
    for cell in found.cells[:3]:
        finish(cell, found.out, 3.0)
    code, out, _ = compare(capsys, found.path, "--report")
    assert code == 0
    assert "1 of 4 runs are not done yet" in out
    record_failure(found.out / found.cells[3].name, found.cells[3].hash, "no")
    code, out, _ = compare(capsys, found.path)  # nothing to run: the failed one waits for --retry
    assert code == 1
    assert "3 done, 1 failed" in out
    with pytest.raises(AssertionError):
        compare(capsys, found.path, "--retry")


def test_a_report_of_nothing_says_so(capsys: pytest.CaptureFixture[str], write: Write, tmp_path: Path) -> None:
    code, out, _ = compare(capsys, write(methods=METHODS), "--report")
    assert code == 0
    assert "No run is done yet" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--jobs", "0"), "--jobs must be 1 or more, got 0"),
        (("--fresh", "--report"), "--fresh runs everything anew"),
        (("--seeds", "1", "1"), "--seeds must differ from each other, got [1, 1]"),
        (("--only", "vanila"), "did you mean 'vanilla'"),
        (("--set", "train.stepps=3"), "did you mean 'steps'"),
        (("--submit", "gpu", "--submit-options", "timeout"), "must be NAME=VALUE"),
    ],
)
def test_a_wrong_command_is_refused_with_the_cure(
    capsys: pytest.CaptureFixture[str], write: Write, words: tuple[str, ...], message: str
) -> None:
    code, _, err = compare(capsys, write(methods=METHODS), *words)
    assert code == 1
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"methods": {"a": {"router": {"name": "sofmax"}}}}, "a: unknown router 'sofmax'; did you mean 'softmax'?"),
        ({"methods": {"a": {"router": {"name": "ssr-l", "options": {"noize": 1}}}}}, "'noize'; did you mean 'noise'"),
        ({"methods": METHODS, "config": {"data": {"name": "text", "path": "/none"}}}, "found nothing at '/none'"),
        ({"methods": METHODS, "config": {"data": {"name": "wikitext-103"}, "model": {"vocab": 9}}}, "--set data.path="),
        ({"methods": METHODS, "config": {"eval": {"attacks": {"word-swop": {}}}}}, "word-swop"),
        (
            {"methods": METHODS, "config": {"eval": {"inference": ["noise"]}}},
            "vanilla: eval.inference=['noise'] is for",
        ),
    ],
)
def test_what_would_fail_in_every_run_is_told_once_before_the_first(
    capsys: pytest.CaptureFixture[str], write: Write, text: Path, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    config = {**SMALL, "data": {**SMALL["data"], "path": str(text)}}
    path = write(seeds=[0, 1], **{**content, "config": {**config, **content.get("config", {})}})
    code, out, err = compare(capsys, path, "--jobs", "2")
    assert code == 1
    assert (out + err).count(message) == 1
    assert not (tmp_path / "out").exists()


def test_a_study_that_there_is_not_is_answered_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = compare(capsys, "nosuch")
    assert code == 1
    assert all(name in err for name in ("demo", "paper-lm", "study/dual"))


def test_gpus_are_called_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert run_module._gpus() == ["4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert run_module._gpus() == ["0", "1"]


def test_before_jobs_are_submitted_each_router_and_option_is_looked_at(
    capsys: pytest.CaptureFixture[str], write: Write
) -> None:
    wrong = {**METHODS, "wrong": {"router": {"name": "sofmax"}}}
    code, _, err = compare(capsys, write(methods=wrong), "--submit", "gpu")
    assert code == 1
    assert "sofmax" in err and "softmax" in err and "submitit" not in err


def test_without_submitit_a_cluster_is_refused_with_the_cure(
    capsys: pytest.CaptureFixture[str], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = compare(capsys, write(methods=METHODS), "--submit", "gpu")
    assert code == 1
    assert 'pip install "sinkroute[sweep]"' in err


def test_after_a_fresh_start_that_was_stopped_earlier_numbers_are_not_told(
    capsys: pytest.CaptureFixture[str], plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--fresh with another configuration, stopped before it came to the second run."""
    before = plan(seeds=[0], methods=METHODS)
    for cell in before.cells:
        finish(cell, before.out, 3.0)
    after = plan(seeds=[0], methods=METHODS, config={**SMALL, "train": {**SMALL["train"], "steps": 9}})

    def run_one(cells: Any, out: Path, **more: Any) -> None:
        assert more["fresh"]
        finish(cells[0], out, 2.0)

    monkeypatch.setattr(run_module, "run_cells", run_one)
    monkeypatch.setattr(run_module, "check_cells", lambda cells: None)
    compare(capsys, after.path, "--fresh")
    content = json.loads((after.out / "results.json").read_text())
    assert [cell["state"] for cell in content["cells"]] == ["done", "waiting"]
    assert read_state(after.cells[1], after.out).note == "an earlier run with another configuration is there"
