"""Simulated steps against numbers worked by hand, and traces from all that leaves loads behind."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

import sinkroute
from sinkroute.lab.bench.options import Bench, Mixture
from sinkroute.lab.bench.simulate import Machine, balanced, layer_time, quality, step_time
from sinkroute.lab.bench.simulate_table import run_simulation
from sinkroute.lab.bench.trace import Line, Trace, read_traces

# 1000 operations, 1 byte a second: bound by operations unless a test says otherwise. Links 10 bytes a second.
SLOW = Machine("slow", flops=1000.0, memory=1e12, link=10.0, link_latency=1.0, network=5.0, network_latency=3.0, node=2)
TINY = Mixture(layers=1, d_model=2, d_hidden=5, matrices=2, tokens=8, length=1, vocab=1, bytes=1)


def trace(load: Any, name: str = "a", router: str = "softmax", steps: int = 1, **over: Any) -> Trace:
    load_LE = np.atleast_2d(np.asarray(load, dtype=float))
    return Trace(name, router, 1, [Line(10, steps, load_LE, **over)], 10)


def test_products_are_those_of_the_slowest_rank() -> None:
    # 2 ranks, 8 choices each: 16. Loads 1:3:2:2 of them are 2, 6, 4, 4, so ranks have 8 and 8.
    even = layer_time(np.array([1.0, 3, 2, 2]), 1, TINY, SLOW, 2)
    # 2 operations x 2 matrices x 2 x 5 x 8 choices = 320; forward and backward three times that.
    assert even.experts == pytest.approx(0.96)
    assert even.slowest == 1
    skewed = layer_time(np.array([3.0, 3, 1, 1]), 1, TINY, SLOW, 2)  # 12 and 4
    assert skewed.experts == pytest.approx(0.96 * 1.5)
    assert skewed.slowest == 1.5


def test_an_expert_with_few_tokens_costs_the_reading_of_its_weights() -> None:
    thin = Machine("thin", 1e12, 10.0, 10.0, 0.0, 10.0, 0.0, 2)
    # 20 weights and 2 x 2 + 2 x 5 numbers of each of 8 choices: one byte each, at 10 a second, three times.
    alone = layer_time(np.array([1.0]), 1, TINY, thin, 1)
    assert alone.experts == pytest.approx(3 * (20 + 8 * 14) / 10)
    idle = layer_time(np.array([1.0, 0.0]), 1, TINY, thin, 1)  # an expert that nobody chose is not read
    assert idle.experts == alone.experts


def test_an_exchange_takes_what_the_busiest_rank_receives_and_its_rounds() -> None:
    # Two ranks: half of 8 choices come from the other, 2 bytes each: 8 bytes at 10 a second, and one round of 1 s.
    assert layer_time(np.ones(4), 1, TINY, SLOW, 2).exchange == pytest.approx(4 * 1.8)
    assert layer_time(np.array([3.0, 3, 1, 1]), 1, TINY, SLOW, 2).exchange == pytest.approx(4 * 2.2)
    # Four ranks on nodes of two: 3/4 of 16 bytes, two thirds of it between nodes at 5 a second, after 2 rounds of 3 s.
    assert layer_time(np.ones(4), 1, TINY, SLOW, 4).exchange == pytest.approx(4 * (6 + 2 / 3 * 12 / 5))
    assert layer_time(np.ones(4), 1, TINY, SLOW, 1).exchange == 0


def test_more_ranks_than_experts_are_groups_that_hold_the_same_experts() -> None:
    load = np.array([3.0, 1, 1, 1])
    few, many = (layer_time(load, 1, TINY, SLOW, ranks) for ranks in (4, 64))
    assert few == many
    assert few.slowest == pytest.approx(2)


def test_ranks_that_hold_the_same_experts_add_up_gradients_over_the_network_where_they_lie_in_several_nodes() -> None:
    # Two experts, nodes of two: ranks 0 and 2 have the same one. 20 weights of a rank and 16 of attention over 4 ranks,
    # a byte each, at 5 a second: 2 (2 - 1) / 2 x 20 / 5 after 2 rounds of 3 s, and 2 (4 - 1) / 4 x 16 / 5 after 4. The
    # backward pass's two exchanges of 1.8 s hide a part.
    machine = replace(SLOW, flops=1e12)
    assert step_time(trace([1, 1]), TINY, machine, 4).rest == pytest.approx(4 + 6 + 4.8 + 12 - 3.6)


def test_a_capacity_cuts_the_busiest_and_what_it_cuts_is_dropped() -> None:
    # 4 ranks, 32 choices, 8 an expert; loads 16, 8, 8, 0 cut at 10.
    cut = layer_time(np.array([2.0, 1, 1, 0]), 1, replace(TINY, capacity=1.25), SLOW, 4)
    assert cut.dropped == pytest.approx(6 / 32)
    assert cut.slowest == pytest.approx(1.25)
    assert cut.experts == pytest.approx(3 * 40 * 10 / 1000)


def test_a_router_pays_for_its_sums_and_its_plan() -> None:
    machine = Machine("m", 1e12, 100.0, 10.0, 1.0, 10.0, 1.0, 2)
    own = trace([1, 1], router="ssr-dual", plan_passes=6.0, steps=2)
    time = step_time(own, TINY, machine, 2)
    # 6 passes in 2 steps of one layer: 3 reads of 8 x 2 float32 at 100 bytes a second.
    assert time.router == pytest.approx(3 * 64 / 100)
    # 2 x 2 + 2 float64 over two ranks: 2 (2 - 1) / 2 x 48 bytes at 10 a second, and 2 rounds.
    assert time.update == pytest.approx(48 / 10 + 2)
    plain = step_time(trace([1, 1]), TINY, machine, 2)
    assert (plain.router, plain.update) == (0, 0)
    assert plain.seconds == pytest.approx(plain.experts + plain.exchange + plain.rest)
    assert step_time(balanced(own), TINY, machine, 2).seconds == plain.seconds


def test_single_steps_of_a_sum_are_known_by_max_vio_where_each_rank_has_one_expert() -> None:
    # The busiest expert changes from step to step: the sum is even, each step has twice the mean on one.
    moving = trace([4, 4, 4, 4], steps=4, max_vio_L=np.array([1.0]))
    assert step_time(moving, TINY, SLOW, 4).slowest == 1
    assert step_time(moving, TINY, SLOW, 4, single_steps=True).slowest == pytest.approx(2)
    with pytest.raises(ValueError, match="one of the 4 experts, got 2; log every step"):
        step_time(moving, TINY, SLOW, 2, single_steps=True)
    with pytest.raises(ValueError, match="ranks must be 1 or more, got 0"):
        step_time(moving, TINY, SLOW, 0)


def test_at_equal_time_the_quicker_method_has_come_further() -> None:
    def run(name: str, losses: list[float]) -> Trace:
        lines = [Line(10 * (i + 1), 1, np.ones((1, 2)), None, loss) for i, loss in enumerate(losses)]
        return Trace(name, "softmax", 1, lines, 10 * len(losses))

    runs = {"quick": [run("quick", [5.0, 4.0, 3.0])], "slow": [run("slow", [5.0, 3.5, 3.25])]}
    found = quality(runs, {"quick": 1.0, "slow": 2.0})
    assert found["quick"] == {"final": 3.0, "time": 30.0, "equal": 3.0, "reach": 30.0}
    # After 30 s the slow one is half way from step 10 (20 s) to step 20 (40 s).
    assert found["slow"] == {"final": 3.25, "time": 60.0, "equal": 4.25, "reach": 60.0}
    # Over seeds the mean loss is what is looked at: no run alone has to be there.
    found = quality(
        {"quick": runs["quick"], "slow": [run("slow", [5, 4, 4.0]), run("slow", [5, 3, 2.5])]},
        {"quick": 1.0, "slow": 2.0},
    )
    assert (found["slow"]["final"], found["slow"]["reach"], found["quick"]["reach"]) == (3.25, 60.0, 30.0)
    with pytest.raises(
        ValueError, match="the runs of slow must have a loss in each line and be logged at the same steps"
    ):
        quality({"slow": [run("slow", [5, 4]), run("slow", [5])]}, {"slow": 1.0})


def run_folder(folder: Path, label: str, loads: list[Any], every: int = 5, **router: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "label": label,
        "model": {"top_k": 2},
        "router": router or {"name": "softmax"},
        "train": {"log_every": every, "steps": every * len(loads)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"kind": "train", "step": every * (i + 1), "loss": 4.0 - i, "load": load, "max_vio": [1.0] * len(load)}
        for i, load in enumerate(loads)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    return folder


def test_traces_come_from_runs_folders_of_runs_and_kept_studies(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "runs" / "a", "A", [[[3, 1]], [[2, 2]]])
    run_folder(tmp_path / "runs" / "b", "B", [[[1, 1]]])
    (tmp_path / "runs" / "logs").mkdir()
    assert [found.name for found in read_traces([tmp_path / "runs"])] == ["A", "B"]
    (found,) = read_traces([one])
    assert (found.router, found.top_k, found.experts, found.steps_a_line, found.total_steps) == ("softmax", 2, 2, 5, 10)
    assert [line.loss for line in found.lines] == [4.0, 3.0]
    kept = tmp_path / "mine.jsonl"
    log = [json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()[:2]]
    kept.write_text(json.dumps({"name": "a", "config": yaml.safe_load((one / "config.yaml").read_text()), "log": log}))
    (again,) = read_traces([kept])
    assert again.name == "A"
    assert np.array_equal(again.lines[0].load_LE, found.lines[0].load_LE)


def test_a_monitors_log_is_a_trace_of_its_windows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = sinkroute.MoE(d_model=8, d_hidden=8, num_experts=4, top_k=2, router="softmax")
    with sinkroute.LoadMonitor(layer) as monitor:
        for step in range(6):
            sinkroute.set_step(layer, step)
            layer(torch.randn(50, 8)).sum().backward()
            if step % 3 == 2:
                monitor.write(tmp_path / "load.jsonl", step, reset=True)
    (found,) = read_traces([tmp_path / "load.jsonl"])
    assert (found.top_k, found.experts, [line.steps for line in found.lines]) == (2, 4, [3, 3])
    assert found.lines[0].load_LE.sum() == 300


def test_passes_of_plans_in_a_monitors_log_are_those_of_the_passes_that_had_a_plan(tmp_path: Path) -> None:
    layer = {"load": [2, 2], "max_vio": 0.0, "tokens": 4, "passes": 20, "plans": 2, "plan_passes": 5.0}
    rows = [{"step": 20, "mode": "train", "layers": {"ffn": layer}}]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_traces([tmp_path / "load.jsonl"])
    assert found.lines[0].plan_passes == 10


def test_of_a_step_that_a_resumed_trainer_repeats_the_later_line_counts(tmp_path: Path) -> None:
    rows = [
        {"step": step, "mode": "train", "layers": {"ffn": {"load": load, "max_vio": 0.0, "tokens": 4, "passes": 10}}}
        for step, load in ((10, [4, 0]), (20, [4, 0]), (20, [2, 2]))
    ]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = read_traces([tmp_path / "load.jsonl"])
    assert [(line.step, line.steps, line.load_LE.tolist()) for line in found.lines] == [
        (10, 10, [[4, 0]]),
        (20, 10, [[2, 2]]),
    ]


def test_a_line_covers_the_steps_since_the_one_before_also_where_a_checkpoint_was_written(tmp_path: Path) -> None:
    def covered(steps: list[int]) -> list[int]:
        log = [{"kind": "train", "step": step, "load": [[1, 1]], "max_vio": [0.0], "loss": 1.0} for step in steps]
        config = {"train": {"log_every": 5, "checkpoint_every": 7, "steps": 12}}
        (tmp_path / "kept.jsonl").write_text(json.dumps({"name": "a", "config": config, "log": log}))
        return [line.steps for line in read_traces([tmp_path / "kept.jsonl"])[0].lines]

    assert covered([5, 7, 10, 12]) == [5, 2, 3, 2]
    assert covered([7, 12]) == [2, 2]  # of a log that was thinned


def test_what_holds_no_loads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no loads"):
        read_traces([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        read_traces([tmp_path / "nosuch"])


def test_the_command_shows_steps_parts_and_loss_at_equal_time_and_says_what_a_sum_hides(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs" / "a", "even", [[[2, 2, 2, 2]]] * 2)
    run_folder(tmp_path / "runs" / "b", "skewed", [[[5, 1, 1, 1]]] * 2)
    out = io.StringIO()
    bench = Bench(simulate=(str(tmp_path / "runs"),), ranks=(4, 8), out=str(tmp_path / "sim.json"))
    assert run_simulation(bench, Console(file=out, width=120)) == 0
    words = out.getvalue()
    for method, tables in {"perfect balance, free": 2, "even": 3, "skewed": 3}.items():
        assert words.count(f"\n{method} ") == tables
    assert "…" not in words
    assert "the sum of 5 steps" in words
    assert "single steps" in words
    steps = json.loads((tmp_path / "sim.json").read_text())["steps"]["4"]
    assert steps["skewed"][0]["slowest"] == pytest.approx(2.5)
    assert steps["even"][0]["seconds"] == steps["perfect balance, free"][0]["seconds"] < steps["skewed"][0]["seconds"]
    with pytest.raises(ValueError, match="unknown machine 'h10-node'; did you mean 'h100-node'"):
        run_simulation(Bench(simulate=(str(tmp_path / "runs"),), machine="h10-node"), Console(file=out))


def test_runs_that_are_not_finished_are_left_out_where_some_are(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs" / "a", "one", [[[2, 2]], [[2, 2]]])
    half = run_folder(tmp_path / "runs" / "b", "half", [[[2, 2]], [[2, 2]]])
    lines = (half / "log.jsonl").read_text().splitlines()
    (half / "log.jsonl").write_text(lines[0] + "\n")
    out = io.StringIO()
    bench = Bench(simulate=(str(tmp_path / "runs"),), ranks=(2,), out=str(tmp_path / "sim.json"))
    run_simulation(bench, Console(file=out, width=120))
    assert "1 runs that are not finished are left out" in out.getvalue()
    assert "half" not in out.getvalue()


def test_trainings_of_different_experts_are_not_put_beside_each_other(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs" / "a", "two", [[[2, 2]]])
    run_folder(tmp_path / "runs" / "b", "four", [[[2, 2, 2, 2]]])
    with pytest.raises(ValueError, match=r"different trainings .2 experts top-2, 5 steps; 4 experts"):
        run_simulation(Bench(simulate=(str(tmp_path / "runs"),)), Console(file=io.StringIO()))
