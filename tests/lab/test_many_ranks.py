"""Runs on several processes: they agree on where they continue, and what one of them finds wrong ends all of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from sinkroute.lab.trained import load_run

from .processes import Left, Processes, lines

ranks = pytest.mark.ranks
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def words(small: Path, *out: Path) -> list[list[str]]:
    return [["train", str(small), "--out", str(folder)] for folder in out]


def said(left: Left) -> list[str]:
    """What each process wrote, without its line breaks."""
    return [" ".join(text.split()) for text in left.texts]


# -- agreement --


def test_without_a_shared_disk_all_continue_from_the_checkpoint_of_rank_0(
    processes: Processes, small: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    hook = ("kill", {"rank": 1, "at": "step", "step": 9})
    left = processes.run(words(small, here, there), tmp_path / "logs", hook)
    assert left.codes == [1, -9], left.texts
    assert not there.exists()
    # What rank 1 has there is of another time.
    shutil.copytree(here / "checkpoints" / "step-000008", there / "checkpoints" / "step-000099")
    left = processes.run(words(small, here, there), tmp_path / "logs")
    assert left.codes == [0, 0], left.texts
    assert lines(here) == lines(undisturbed[2])
    assert [path.name for path in there.rglob("step-*")] == ["step-000099"]


def test_ranks_that_were_started_with_something_else_are_named_on_all(
    processes: Processes, small: Path, tmp_path: Path
) -> None:
    out = words(small, tmp_path / "run", tmp_path / "run")
    left = processes.run([out[0], [*out[1], "--train.lr", "0.01"]], tmp_path / "logs")
    assert left.codes == [1, 1]
    for text in said(left):
        assert re.search(r"rank 1 \(.*\) was started with something else than rank 0", text)
        assert "config.train.lr: 0.01 → 0.003" in text
    other = tmp_path / "other.txt"
    other.write_text(small.with_name("words.txt").read_text().replace("few", "all"))
    left = processes.run([out[0], [*out[1], "--data.path", str(other)]], tmp_path / "logs")
    assert left.codes == [1, 1]
    for text in said(left):
        assert re.search(r"rank 1 \(.*data: 'text, SHA-256 \w+' → 'text, SHA-256 \w+'", text)
    assert not (tmp_path / "run" / "log.jsonl").exists()


@ranks
def test_data_that_one_rank_does_not_have_end_all_with_its_words(
    processes: Processes, small: Path, tmp_path: Path
) -> None:
    out = words(small, tmp_path / "run", tmp_path / "run")
    left = processes.run([out[0], [*out[1], "--data.path", "/nowhere.txt"]], tmp_path / "logs", launcher=False)
    assert left.codes == [1, 1]
    assert "/nowhere.txt" in said(left)[1]
    assert re.search(r"rank 1 \(.*/nowhere\.txt", said(left)[0])


# -- what one rank finds wrong --


def test_scores_that_are_not_finite_on_one_rank_end_all_with_its_words(
    processes: Processes, small: Path, tmp_path: Path
) -> None:
    hook = ("poison", {"rank": 1, "step": 6})
    left = processes.run(words(small, *[tmp_path / "run"] * 2), tmp_path / "logs", hook)
    assert left.codes == [1, 1]
    assert "training diverged at step 6: logits of token 0 are not finite" in said(left)[1]
    assert re.search(r"rank 1 \(.*\): training diverged at step 6: logits of token 0", said(left)[0])
    assert "The same command continues from step 4" in said(left)[0]
    assert not any("Traceback" in text for text in left.texts)


@ranks
def test_a_disk_that_is_full_on_rank_0_ends_all_and_the_same_command_continues(
    processes: Processes, small: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    out = words(small, *[tmp_path / "run"] * 2)
    left = processes.run(out, tmp_path / "logs", ("fill", {"step": 8}), launcher=False)
    assert left.codes == [1, 1]
    for text in said(left):
        assert re.search("cannot write the checkpoint .*The disk is full.*Nothing is lost up to step-000004", text)
    left = processes.run(out, tmp_path / "logs")
    assert left.codes == [0, 0], left.texts
    assert lines(tmp_path / "run") == lines(undisturbed[2])


@ranks
def test_a_rank_that_is_stuck_beyond_python_ends_when_another_fails(
    processes: Processes, small: Path, tmp_path: Path
) -> None:
    hook = ("poison", {"rank": 1, "step": 6, "patience": 2})
    left = processes.run(words(small, *[tmp_path / "run"] * 2), tmp_path / "logs", hook, launcher=False)
    assert left.codes == [1, 1]
    assert re.search(r"error: rank 1 \(.*diverged at step 6.*Rank 0 was waiting for the others", said(left)[0])


@ranks
def test_a_rank_that_falls_silent_with_its_connections_open_is_named(
    processes: Processes, small: Path, tmp_path: Path
) -> None:
    hook = ("freeze", {"rank": 1, "step": 6, "patience": 4})
    started = processes.start(words(small, *[tmp_path / "run"] * 2), tmp_path / "logs", hook)
    left = started.wait(ranks=[0])
    assert left.codes[0] == 1
    assert re.search(r"error: rank 1 \(.*\) did not answer for 4 s. Rank 0 was waiting", said(left)[0])


# -- time limits --


@ranks
def test_a_rank_that_is_late_is_told_by_its_place(processes: Processes, small: Path, tmp_path: Path) -> None:
    out = [[*line, "--train.timeout-minutes", "0.2"] for line in words(small, *[tmp_path / "run"] * 2)]
    left = processes.run(out, tmp_path / "logs", ("tarry", {"rank": 1, "step": 6, "seconds": 30}))
    assert left.codes == [1, 1]
    assert "the processes lost touch, and all still answer" in said(left)[0]
    assert "rank 1 at: training step 7" in said(left)[0] and "train.timeout_minutes=0.2" in said(left)[0]


@ranks
def test_a_rank_that_never_comes_is_told(processes: Processes, small: Path, tmp_path: Path) -> None:
    out = [[*words(small, tmp_path / "run")[0], "--train.timeout-minutes", "0.05"]]
    left = processes.run(out, tmp_path / "logs", WORLD_SIZE="2")
    assert left.codes == [1]
    assert "not all 2 processes came to 127.0.0.1:" in said(left)[0]
    assert "within train.timeout_minutes=0.05; start all of them with the same command" in said(left)[0]


@ranks
def test_an_evaluation_may_outlast_the_time_limit(
    processes: Processes, small: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    out = [[*line, "--train.timeout-minutes", "0.2"] for line in words(small, *[tmp_path / "run"] * 2)]
    left = processes.run(out, tmp_path / "logs", ("ponder", {"seconds": 14}))
    assert left.codes == [0, 0], left.texts
    assert lines(tmp_path / "run") == lines(undisturbed[2])


# -- being asked to stop --


def test_sigterm_to_one_rank_stops_all_at_the_same_step_with_a_checkpoint(
    processes: Processes, small: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    out = words(small, *[tmp_path / "run"] * 2)
    log = tmp_path / "run" / "log.jsonl"
    started = processes.start(out, tmp_path / "logs")
    until = time.monotonic() + 120
    while (not log.exists() or log.read_text().count("\n") < 2) and time.monotonic() < until:
        time.sleep(0.01)
    started.send(signal.SIGTERM, ranks=[1])
    left = started.wait()
    assert left.codes == [130, 130], left.texts
    assert re.search(r"stopped at step \d of 10; the same command continues", said(left)[0])
    done = len(lines(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:06d}").is_dir()
    left = processes.run(out, tmp_path / "logs")
    assert left.codes == [0, 0], left.texts
    assert lines(tmp_path / "run") == lines(undisturbed[2])


# -- FSDP2 --


def test_fsdp_on_a_cpu_is_refused_instead_of_ignored(processes: Processes, small: Path, tmp_path: Path) -> None:
    left = processes.run(words(small, *[tmp_path / "run"] * 2), tmp_path / "logs", **FSDP2)
    assert left.codes == [1, 1]
    for text in said(left):
        assert "ACCELERATE_USE_FSDP=true asks for FSDP, which Accelerate does not give on cpu" in text


@ranks
@pytest.mark.parametrize("average", [None, 0.9])
def test_fsdp2_trains_like_ddp_and_continues_with_the_same_bits(
    processes: Processes, small: Path, tmp_path: Path, average: float | None
) -> None:
    more = [] if average is None else ["--train.average", str(average)]

    def run(name: str, *hooks: Any, **environment: str) -> Left:
        out = [[*line, *more] for line in words(small, *[tmp_path / name] * 2)]
        return processes.run(out, tmp_path / "logs", *hooks, **environment)

    for name, hook, environment in (("ddp", None, {}), ("whole", ("shard", {}), FSDP2)):
        left = run(name, hook, **environment)
        assert left.codes == [0, 0], left.texts
    both = [[loss for loss, _ in lines(tmp_path / name)] for name in ("ddp", "whole")]
    assert both[1] == pytest.approx(both[0], rel=1e-5)
    left = run("parts", ("shard", {"rank": 1, "at": "step", "step": 6}), **FSDP2)
    assert left.codes == [1, -9], left.texts
    assert "gone, killed or out of reach: rank 1 (" in said(left)[0]
    left = run("parts", ("shard", {}), **FSDP2)
    assert left.codes == [0, 0], left.texts
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for name in ["model", "optimizer", *(["average"] if average else [])]:
        file = f"checkpoints/step-000010/{name}.safetensors"
        one, two, plain = (load_file(tmp_path / folder / file) for folder in ("whole", "parts", "ddp"))
        assert one.keys() == two.keys() == plain.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert all(torch.allclose(one[key], plain[key], atol=2e-3) for key in one)


@ranks
def test_a_checkpoint_in_parts_is_continued_by_other_numbers_of_processes_and_evaluated_by_one(
    processes: Processes, small: Path, tmp_path: Path
) -> None:
    def run(number: int, hook: Any, *more: str, **environment: str) -> Left:
        out = [[*line, "--train.average", "0.9", *more] for line in words(small, *[tmp_path / "run"] * number)]
        return processes.run(out, tmp_path / "logs", hook, **environment)

    left = run(2, ("shard", {"rank": 1, "at": "step", "step": 6}), "--train.sharded-checkpoints", **FSDP2)
    assert left.codes == [1, -9], left.texts
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["shards", "state.json"]
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    left = run(2, ("shard", {}), "--train.sharded-checkpoints", **FSDP2)
    assert left.codes == [0, 0], left.texts
    assert load_run(tmp_path / "run").step == 10
    shutil.move(tmp_path / "run", tmp_path / "whole")
    # Without FSDP2, which writes safetensors again. On one process a plan is of other tokens than on two.
    for number, close in ((1, 1e-2), (2, 1e-4)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(copy, tmp_path / "run")
        left = run(number, None)
        assert left.codes == [0] * number, left.texts
        both = [[loss for loss, _ in lines(tmp_path / name)] for name in ("run", "whole")]
        assert both[0] == pytest.approx(both[1], rel=close)
    in_parts = load_run(tmp_path / "whole").model.state_dict()
    plain = load_file(tmp_path / "run" / "checkpoints" / "step-000010" / "average.safetensors")
    assert in_parts.keys() == plain.keys()
    assert all(torch.allclose(in_parts[key], plain[key], atol=2e-3) for key in plain)


@ranks
def test_parts_need_a_disk_that_all_see(processes: Processes, small: Path, tmp_path: Path) -> None:
    here = [*words(small, *[tmp_path / "here"] * 2)]
    here = [[*line, "--train.sharded-checkpoints"] for line in here]
    hook = ("shard", {"rank": 1, "at": "step", "step": 6})
    assert processes.run(here, tmp_path / "logs", hook, **FSDP2).codes == [1, -9]
    there = [here[0], [*words(small, tmp_path / "there")[0], "--train.sharded-checkpoints"]]
    left = processes.run(there, tmp_path / "logs", ("shard", {}), **FSDP2)
    assert left.codes == [1, 1]
    assert re.search(r"rank 1 \(.*has no checkpoint; let --out be a folder that all processes see", said(left)[0])


# -- a real launcher --


@ranks
def test_under_torchrun_the_survivor_says_who_is_gone(small: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "sinkroute.cli", *words(small, tmp_path / "run")[0], "--train.steps", "500"]
    with open(tmp_path / "text", "w") as text:
        started = subprocess.Popen(command, env=environment, stdout=text, stderr=text)
    log = tmp_path / "run" / "log.jsonl"
    until = time.monotonic() + 120
    while (not log.exists() or log.read_text().count("\n") < 5) and time.monotonic() < until:
        time.sleep(0.1)
    (victim,) = [p for p in psutil.Process(started.pid).children() if p.environ().get("RANK") == "1"]
    victim.kill()
    assert started.wait(timeout=120) == 1
    written = " ".join((tmp_path / "text").read_text().split())
    assert re.search(r"gone, killed or out of reach: rank 1 \(.*The same command continues from step \d", written)
