"""Logs that grow, tear, are cut back, replaced or not there yet, and what is told of them."""

import json
import os
import threading
import time

import pytest
import torch
import yaml

import sinkroute
from sinkroute.lab.log import Lines, RunLog, last_step
from sinkroute.lab.watch.chart import BUCKETS, chart
from sinkroute.lab.watch.follow import DEAD, Followed, Follower
from sinkroute.routing import metrics

from .logs import make_run, train_line


def steps(run):
    return [point.step for point in run.sorted]


# -- lines ---------------------------------------------------------------------------------------------------------


def test_each_line_comes_once_and_a_torn_one_when_it_is_whole(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = Lines(log)
    assert lines.new() == (False, [])
    log.write_text('{"step": 1}\n{"st')
    assert lines.new() == (False, [{"step": 1}])
    assert lines.new() == (False, [])
    with log.open("a") as file:
        file.write('ep": 2}\n\nnonsense\n[3]\n')
    assert lines.new() == (False, [{"step": 2}])


@pytest.mark.parametrize("content", ['{"step": 9}\n', '{"step": 9}\n' * 30], ids=["shorter", "longer"])
def test_a_file_that_is_another_one_is_read_from_its_beginning(tmp_path, content):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')
    lines = Lines(log)
    lines.new()
    log.write_text(content)
    void, found = lines.new()
    assert void and len(found) == content.count("\n") and found[0] == {"step": 9}


def test_a_file_that_is_deleted_makes_void_what_it_held(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n')
    lines = Lines(log)
    lines.new()
    log.unlink()
    assert lines.new() == (True, [])
    log.write_text('{"step": 1}\n')
    assert lines.new() == (False, [{"step": 1}])


# -- a run ---------------------------------------------------------------------------------------------------------


def test_dead_is_what_it_is_elsewhere():
    assert DEAD == metrics.DEAD


def test_a_line_tells_loss_balance_load_plans_and_speed(tmp_path):
    run = Followed(make_run(tmp_path / "run", lines=[train_line(10), train_line(20)]), "run")
    assert [point.step for point in run.poll()] == [10, 20]
    point = run.last
    assert (point.loss, point.max_vio, point.worst, point.tokens_per_second) == (4.8, 1.0, 2.0, 1000.0)
    assert point.planned == run.planned == 0.25
    assert point.dead == 2
    assert run.load == {"0": [6, 2, 0, 0], "1": [2, 2, 2, 2]}
    # 80 steps are left, and 10 took a second.
    assert (run.method, run.steps, run.state, run.left) == ("ssr-l", 100, "running", pytest.approx(8.0))


def test_what_a_resumed_run_cuts_back_is_gone_and_the_later_line_of_a_step_counts(tmp_path):
    folder = make_run(tmp_path / "run", lines=[train_line(step) for step in (10, 20, 30)])
    run = Followed(folder, "run")
    run.poll()
    log = RunLog(folder / "log.jsonl", last_step=10)  # as a run that continues from step 10 does
    log.write(json.loads(train_line(20, loss=1.0)))
    log.close()
    run.poll()
    assert steps(run) == [10, 20] and run.points[20].loss == 1.0
    # Another trainer's log may just go on.
    with (folder / "log.jsonl").open("a") as file:
        file.write(train_line(10, loss=0.5))
    run.poll()
    assert steps(run) == [10, 20] and run.points[10].loss == 0.5 and run.last.step == 10


def test_the_state_of_a_run_is_that_of_its_files(tmp_path):
    run = Followed(make_run(tmp_path / "run"), "run")
    log = tmp_path / "run" / "log.jsonl"
    run.poll()
    assert run.state == "waiting"
    log.write_text(train_line(10))
    run.poll()
    assert run.state == "running"
    os.utime(log, (time.time() - 600,) * 2)  # killed with -9, nothing more is written
    run.poll()
    assert run.state == "silent" and run.silence >= 600 and run.left is None
    with log.open("a") as file:
        file.write(train_line(20, loss=float("nan")))
    run.poll()
    assert run.state == "diverged"
    (tmp_path / "run" / "failed.json").write_text('{"message": "no memory"}')
    run.poll()
    assert (run.state, run.failure) == ("failed", "no memory")
    (tmp_path / "run" / "result.json").write_text('{"valid": {"bytes": 9, "bits_per_byte": 2.5}}')
    run.poll()
    assert (run.state, run.result) == ("finished", ("bits_per_byte", 2.5))


def test_damaged_files_stop_nobody(tmp_path):
    folder = make_run(tmp_path / "run", lines=['{"step": true}\n', '{"kind": "train", "step": 5, "load": [[], 3]}\n'])
    (folder / "config.yaml").write_text("a: [")
    (folder / "result.json").write_text("{")
    run = Followed(folder, "run")
    run.poll()
    assert steps(run) == [5] and run.steps is None and run.last.loss is None and run.load == {}


def test_a_log_of_a_load_monitor_is_followed(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(sinkroute.MoE(d_model=8, d_hidden=8, num_experts=4, top_k=1, router=name)
                                  for name in ("softmax", "sinkhorn")))  # fmt: skip
    log = tmp_path / "load.jsonl"
    with sinkroute.LoadMonitor(model) as monitor:
        for step in range(3):
            sinkroute.set_step(model, step)
            model(torch.randn(2, 16, 8))
            told = monitor.metrics()
            monitor.write(log, step, reset=True)
    follower = Follower([log])
    follower.poll()
    (run,) = follower.runs.values()
    assert run.name == "load.jsonl" and steps(run) == [0, 1, 2] and run.steps is None
    assert run.load == {name: part["load"] for name, part in told.items()}
    assert run.last.max_vio == pytest.approx((told["0"]["max_vio"] + told["1"]["max_vio"]) / 2)
    assert run.planned == 0.5  # every pass of one layer of two


# -- several -------------------------------------------------------------------------------------------------------


def test_runs_that_begin_later_are_found_also_two_floors_up(tmp_path):
    follower = Follower([tmp_path / "study"])
    assert follower.poll() == [] and follower.missing == [tmp_path / "study"]
    make_run(tmp_path / "study" / "a", lines=[train_line(1)])
    assert [run.name for run, _ in follower.poll(every=0)] == ["a"]
    make_run(tmp_path / "study" / "small" / "b", lines=[train_line(2)])
    assert [(run.name, point.step) for run, point in follower.poll(every=0)] == [("small/b", 2)]
    assert follower.missing == [] and not follower.over


def test_the_watch_is_over_when_all_runs_that_were_named_have_finished(tmp_path):
    folders = [make_run(tmp_path / name, lines=[train_line(1)]) for name in "ab"]
    follower = Follower(folders)
    for folder in folders:
        assert not follower.over
        (folder / "result.json").write_text('{"valid": {"bytes": 9, "bits_per_byte": 2.5}}')
        follower.poll()
    assert follower.over


def test_of_a_comparison_the_runs_that_are_still_to_come_are_counted(tmp_path):
    (tmp_path / "compare.json").write_text('{"cells": {"a": {}, "b": {}}}')
    follower = Follower([tmp_path])
    for name, left in (("a", 1), ("b", 0)):
        assert not follower.over
        make_run(tmp_path / name, lines=[train_line(1)])
        (tmp_path / name / "result.json").write_text('{"valid": {"bytes": 9, "bits_per_byte": 2.5}}')
        follower.poll(every=0)
        assert follower.to_come == {tmp_path: left}
    assert follower.over


def test_what_can_never_be_followed_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nor is the folder in which it would be made"):
        Follower([tmp_path / "no" / "such"])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes.txt is no log: pass .* a .jsonl file"):
        Follower([tmp_path / "notes.txt"])


def test_a_run_is_followed_while_it_trains(tmp_path):
    from sinkroute.cli import main

    config, text, folder = tmp_path / "small.yaml", tmp_path / "text.txt", tmp_path / "run"
    text.write_text("balanced experts route tokens to the few " * 600)
    settings = {
        "data": {"name": "text", "path": str(text), "length": 16},
        "model": {"layers": 1, "d_model": 16, "heads": 2, "d_hidden": 8, "experts": 4, "top_k": 2},
        "train": {"steps": 30, "batch": 2, "warmup": 2, "log_every": 3, "checkpoint_every": 30},
        "eval": {"limit": 200},
    }
    config.write_text(yaml.safe_dump(settings))
    follower, seen = Follower([folder]), []
    training = threading.Thread(target=main, args=(["train", str(config), "--out", str(folder)],))
    training.start()
    end = time.monotonic() + 120
    while not follower.over and time.monotonic() < end:
        seen += [point.step for _, point in follower.poll(every=0)]
        time.sleep(0.01)
    training.join()
    assert seen == list(range(3, 31, 3))
    (run,) = follower.runs.values()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [point.loss for point in run.sorted] == [line["loss"] for line in lines]
    result = json.loads((folder / "result.json").read_text())
    assert run.result == ("bits_per_byte", result["valid"]["bits_per_byte"])


# -- pictures ------------------------------------------------------------------------------------------------------


def test_of_thousands_of_lines_few_points_are_drawn_and_a_spike_is_seen():
    pairs = [(step, 100.0 if step == 7777 else 1.0) for step in range(20_000)]
    drawn = chart("Loss", {(0, "run"): pairs})
    ((_, _, curve, band),) = drawn.curves
    assert len(curve.split()) <= BUCKETS and drawn.lines == -(-20_000 // BUCKETS)
    heights = {float(point.split(",")[1]) for point in band.split()}
    assert min(heights) == pytest.approx(12, abs=1)  # where 100 stands: at the top
    assert [words for _, words in drawn.upwards] == ["0", "20", "40", "60", "80", "100"]


def test_what_is_not_finite_is_not_drawn():
    assert chart("Loss", {(0, "run"): [(1, float("nan"))]}) is None
    assert chart("Loss", {(0, "run"): [(1, 2.0), (2, float("inf"))]}).curves[0][2].count(",") == 1


def test_loads_that_are_no_numbers_count_as_none_and_can_be_drawn(tmp_path):
    log = tmp_path / "load.jsonl"
    log.write_text('{"step": 1, "load": [[NaN, Infinity, 2, null]], "loss": 1.0}\n')
    run = Followed(log, "a")
    run.poll()
    assert run.load == {"0": [0.0, 0.0, 2.0, 0.0]}


def test_whole_numbers_too_long_for_a_float_are_infinite_and_end_nothing(tmp_path):
    long, log = "1" + "0" * 400, tmp_path / "log.jsonl"
    log.write_text(
        f'{{"step": 1, "loss": {long}, "max_vio": [{long}], "load": [[{long}, 1]], "seconds": {long}}}\n'
        f'{{"step": {long}, "loss": 1.0}}\n'
        f'{{"kind": "eval", "step": 1, "perplexity": {long}}}\n'
    )
    run = Followed(log, "a")
    (point,) = run.poll()  # a step that cannot be drawn is no step
    assert (point.step, point.loss, run.state, run.load) == (1, float("inf"), "diverged", {"0": [0.0, 1.0]})
    assert run.evals == {1: ("perplexity", float("inf"))}
    assert last_step(log) == 1
