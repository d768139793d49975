"""The benchmark of routers: it sees what is slow and what is large, keeps what it has, and refuses to mix."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sinkroute.lab.bench import GRID, Bench, Size, run_bench, size_table
from sinkroute.lab.bench import run as bench_run
from sinkroute.lab.bench.memory import extra_memory_mb
from sinkroute.lab.bench.timing import compare
from sinkroute.lab.bench.variants import AGAIN, pass_of, training_pass, variants_of, with_mixtures
from sinkroute.routing import create_router, list_routers
from sinkroute.routing.routers.softmax import SoftmaxRouter

CPU = torch.device("cpu")


def tiny(out: Path, **options: object) -> Bench:
    return Bench(
        **{"sizes": ("64x4x2",), "routers": ("load-balance", "ssr-l"), "seconds": 0.1, "out": str(out)} | options
    )


def content_of(bench: Bench) -> dict:
    return json.loads(Path(bench.out).read_text())


# -- sizes and variants --------------------------------------------------------------------------------------------


def test_the_grid_is_that_of_4k_32k_128k_tokens_16_64_256_experts_top_1_2_8() -> None:
    assert len(set(GRID)) == 27
    assert {size.tokens for size in GRID} == {4096, 32768, 131072}
    assert {size.experts for size in GRID} == {16, 64, 256}
    assert {size.top_k for size in GRID} == {1, 2, 8}


@pytest.mark.parametrize("text", ["4096x16", "4096x16x0", "axbxc", "4096x16x17"])
def test_a_size_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Size.parse(text)


def test_a_gate_that_gives_more_than_the_logits_gives_the_same_logits_first() -> None:
    size = Size(50, 4, 2)
    assert torch.equal(size.logits(8, 3, CPU)[:, :4], size.logits(4, 3, CPU))


def test_some_experts_are_liked_better_as_with_real_gates() -> None:
    logits_TE = Size(20_000, 64, 2).logits(64, 0, CPU)
    # Means differ between experts as their offsets do, by about 1; within a column the variance is 1. Each mean is off
    # by 1/√20000 = 0.007, so that all of their spread is that of 64 offsets: 1 ± 1/√128 = 0.09, five of them.
    assert abs(logits_TE.mean(0).std() - 1) < 0.45
    assert (logits_TE.std(0) - 1).abs().max() < 0.03


def test_every_router_is_among_what_is_timed() -> None:
    assert {variant.router for variant in variants_of(list_routers()).values()} == set(list_routers())


def test_without_noise_the_papers_two_are_timed_as_well() -> None:
    options = {name: variant.options for name, variant in variants_of(["ssr-l", "ssr-b"]).items()}
    assert options["ssr-l, softmax step"] == options["ssr-b, softmax step"] == {"probability": 0.0}
    assert options["ssr-l, Sinkhorn step, no noise"] == {"probability": 1.0, "noise": 0.0}
    assert "ssr-b, softmax step, no noise" not in options


def test_the_time_at_p_is_the_weighted_mean_of_the_branches() -> None:
    variants = variants_of(["ssr-s"])
    ratios = {name: [1.0, 2.0] for name in variants} | {"ssr-s, Sinkhorn step": [11.0, 22.0]}
    found = with_mixtures(ratios, variants)
    # 0.99 · 1 + 0.01 · 11 and 0.99 · 2 + 0.01 · 22
    assert found["ssr-s, p = 0.01"] == pytest.approx([1.1, 2.2])
    assert found["ssr-s, no noise, p = 0.001"] == pytest.approx([1.0, 2.0])
    assert list(found)[:4] == ["softmax", AGAIN, "ssr-s, softmax step", "ssr-s, Sinkhorn step"]
    assert list(found)[4] == "ssr-s, p = 0.001"


# -- one pass ------------------------------------------------------------------------------------------------------


def test_a_pass_goes_back_to_the_logits_and_leaves_no_gradient() -> None:
    logits_TE = torch.randn(32, 4)
    gradients = []
    router = create_router("load-balance", num_experts=4, top_k=2)
    call = pass_of(router, logits_TE)
    logits_TE.register_hook(gradients.append)
    call()
    assert gradients[0].shape == (32, 4) and gradients[0].abs().sum() > 0
    assert logits_TE.grad is None


def test_a_loss_is_backpropagated_with_the_weights() -> None:
    gradients = {}
    for name in ("softmax", "load-balance"):
        logits_TE = Size(32, 4, 2).logits(4, 0, CPU)
        call = pass_of(create_router(name, num_experts=4, top_k=2), logits_TE)
        logits_TE.register_hook(lambda gradient_TE, name=name: gradients.update({name: gradient_TE}))
        call()
    same_TE = logits_TE.detach().requires_grad_()
    (of_the_loss_TE,) = torch.autograd.grad(
        create_router("load-balance", num_experts=4, top_k=2)(same_TE).aux_loss, same_TE
    )
    torch.testing.assert_close(gradients["load-balance"] - gradients["softmax"], of_the_loss_TE, rtol=1e-4, atol=1e-7)


def test_each_pass_is_another_training_step() -> None:
    router = create_router("ssr-l", num_experts=4, top_k=2)
    call = pass_of(router, torch.randn(8, 4))
    steps = []
    for _ in range(3):
        call()
        steps.append(router.step)
    assert router.training and steps == [0, 1, 2]


@pytest.mark.parametrize("name", list_routers())
def test_every_router_can_be_passed_through(name: str) -> None:
    for variant in variants_of([name]).values():
        training_pass(variant, Size(32, 8, 2), lambda width: torch.randn(32, width))()


# -- time ----------------------------------------------------------------------------------------------------------


class Clock:
    """A time that passes only where it is told to, on a machine that becomes slower: 1 % each tenth of a second."""

    def __init__(self) -> None:
        self.now, self.called = 0.0, []

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.called.append(name)
            self.now += seconds * 1.01 ** (self.now / 0.1)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sinkroute.lab.bench.timing.time", SimpleNamespace(process_time=lambda: clock.now))
    return clock


def test_ratios_survive_a_machine_that_becomes_slower(clock: Clock) -> None:
    calls = {name: clock.work(name, seconds) for name, seconds in (("one", 0.005), ("two", 0.010), ("again", 0.005))}
    found = compare(calls, "one", CPU, repeats=3, seconds=4, seed=0)
    assert clock.now > 3 and found.turns > 20
    assert found.ratios["one"] == [1.0, 1.0, 1.0]
    # Within a turn of 20 ms times drift by 0.2 %, over all by a third.
    assert found.ratios["two"] == pytest.approx([2.0, 2.0, 2.0], rel=0.01)
    assert found.ratios["again"] == pytest.approx([1.0, 1.0, 1.0], rel=0.01)
    assert 5 < found.milliseconds < 8


def test_every_turn_has_each_call_once_in_changing_order(clock: Clock) -> None:
    found = compare({name: clock.work(name, 0.01) for name in "abc"}, "a", CPU, repeats=2, seconds=1, seed=0)
    turns = [clock.called[at : at + 3] for at in range(0, len(clock.called), 3)]
    assert len(turns) == 2 * found.turns + 2
    assert all(set(turn) == set("abc") for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 3


def test_what_is_far_slower_takes_one_turn_of_each_repeat(clock: Clock) -> None:
    calls = {"a": clock.work("a", 0.01), "b": clock.work("b", 0.01), "slow": clock.work("slow", 0.1)}
    found = compare(calls, "a", CPU, repeats=4, seconds=4, seed=0)
    assert clock.called.count("slow") == 2 + 4  # the two turns that measure what a turn takes, and the repeats
    assert clock.called.count("a") == clock.called.count("b") == 2 + 4 * found.turns and found.turns > 20
    assert found.ratios["slow"] == pytest.approx([10.0] * 4, rel=0.02)


def test_the_time_that_is_given_is_kept(clock: Clock) -> None:
    calls = {name: clock.work(name, 0.001 * (1 + at)) for at, name in enumerate("abcdef")}
    compare(calls, "a", CPU, repeats=5, seconds=3, seed=0)
    assert 2 < clock.now < 3.6


def test_long_turns_are_repeated_three_times_and_measured_once_before(clock: Clock) -> None:
    found = compare({name: clock.work(name, 0.02) for name in "ab"}, "a", CPU, repeats=5, seconds=0.01, seed=0)
    assert (found.turns, len(found.ratios["b"]), len(clock.called)) == (3, 3, 2 * (1 + 3 * 3))


def test_a_router_that_is_slowed_down_is_seen_as_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark can lose: here the router of the house does."""

    class Slow(SoftmaxRouter):
        def route(self, logits_TE, token_mask):
            until = time.process_time() + 0.01
            while time.process_time() < until:
                pass
            return super().route(logits_TE, token_mask)

    monkeypatch.setattr("sinkroute.routing.registry.ROUTERS", {"softmax": SoftmaxRouter, "ssr-l": Slow})
    monkeypatch.setattr("sinkroute.lab.bench.variants.ROUTERS", {"softmax": SoftmaxRouter, "ssr-l": Slow})
    bench = tiny(tmp_path / "b.json", routers=("ssr-l",), seconds=0.5)
    assert run_bench(bench, Console(quiet=True)) == 0
    figures = content_of(bench)["sizes"]["64x4x2"]
    # 10 ms beside the fraction of a millisecond that 64 tokens take.
    assert sorted(figures["ratios"]["ssr-l"])[-1] > 3
    assert sorted(figures["ratios"][AGAIN])[0] < 2


# -- memory --------------------------------------------------------------------------------------------------------


def test_extra_memory_is_the_peak_of_living_tensors() -> None:
    def call() -> None:
        first = torch.zeros(2**18)  # 1 MiB
        second = torch.zeros(2**19)  # 2 MiB more
        del first
        third = torch.zeros(2**17)  # 0.5 MiB where 2 are left
        assert second.sum() + third.sum() == 0

    assert extra_memory_mb(call, CPU) == pytest.approx(3.0, abs=0.01)


def test_memory_held_before_the_call_does_not_count() -> None:
    held = [torch.zeros(2**20)]

    def call() -> None:
        held.clear()
        held.append(torch.zeros(2**18))

    assert extra_memory_mb(call, CPU) == pytest.approx(1.0, abs=0.01)


# -- a whole run ---------------------------------------------------------------------------------------------------


def test_figures_hold_times_and_memory_of_all_variants_with_machine_and_settings(tmp_path: Path) -> None:
    bench = tiny(tmp_path / "folder" / "b.json", repeats=4)
    assert run_bench(bench, Console(quiet=True)) == 0
    content = content_of(bench)
    assert content["machine"]["torch"] == torch.__version__
    assert content["settings"]["seed"] == 0 and content["settings"]["threads"] == 1
    figures = content["sizes"]["64x4x2"]
    timed = set(variants_of(["load-balance", "ssr-l"]))
    assert set(figures["extra_mb"]) == timed
    assert set(figures["ratios"]) == timed | {
        f"ssr-l{noise}, p = {p}" for noise in ("", ", no noise") for p in ("0.001", "0.01", "0.1")
    }
    assert all(len(values) in (3, 4) and min(values) > 0 for values in figures["ratios"].values())
    assert set(figures["ratios"]["softmax"]) == {1.0}
    # The gradient of (64, 4) float32 logits alone is 1 KiB.
    assert all(value >= 1 / 1024 for value in figures["extra_mb"].values())
    assert figures["extra_mb"]["softmax"] == figures["extra_mb"][AGAIN] < figures["extra_mb"]["load-balance"]


def test_a_router_that_cannot_do_a_size_says_so_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(variant, size, logits):
        if variant.router == "load-balance":
            raise ValueError("top-1 only; set top_k=1")
        return training_pass(variant, size, logits)

    monkeypatch.setattr(bench_run, "training_pass", refuse)
    bench = tiny(tmp_path / "b.json")
    assert run_bench(bench, Console(quiet=True)) == 0
    figures = content_of(bench)["sizes"]["64x4x2"]
    assert figures["refused"] == {"load-balance": "top-1 only; set top_k=1"}
    assert "load-balance" not in figures["ratios"] and "ssr-l, softmax step" in figures["ratios"]
    assert "top-1 only" in shown(size_table(Size(64, 4, 2), content_of(bench)))


def shown(table: object) -> str:
    console = Console(record=True, width=120, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_shows_median_smallest_largest_and_memory_relative_to_softmax() -> None:
    figures = {
        "turns": 7,
        "softmax_ms": 1.5,
        "ratios": {"softmax": [1.0, 1.0, 1.0], "load-balance": [1.25, 1.5, 1.125]},
        "extra_mb": {"softmax": 2.0, "load-balance": 5.0},
        "refused": {},
    }
    machine = {"cpu": "abacus", "gpu": None, "torch": "2.13"}
    content = {"sizes": {"64x4x2": figures}, "machine": machine, "settings": {"threads": 1}}
    text = shown(size_table(Size(64, 4, 2), content))
    row = next(line for line in text.splitlines() if "load-balance" in line)
    assert [word for word in row.split() if word[0].isdigit()] == ["1.250", "1.125", "1.500", "2.50"]
    assert "1.5 ms" in text and "2 MiB" in text and "abacus" in text and "3 repeats of 7" in text


def test_a_size_that_is_in_the_file_is_not_measured_again(tmp_path: Path) -> None:
    bench = tiny(tmp_path / "b.json")
    run_bench(bench, Console(quiet=True))
    first = content_of(bench)["sizes"]["64x4x2"]
    more = tiny(tmp_path / "b.json", sizes=("64x4x2", "32x4x1"))
    run_bench(more, Console(quiet=True))
    assert content_of(more)["sizes"]["64x4x2"] == first
    assert "32x4x1" in content_of(more)["sizes"]
    run_bench(tiny(tmp_path / "b.json", fresh=True), Console(quiet=True))
    assert set(content_of(more)["sizes"]) == {"64x4x2"}
    assert content_of(more)["sizes"]["64x4x2"] != first


def test_routers_of_several_calls_come_together_in_one_file(tmp_path: Path) -> None:
    bench = tiny(tmp_path / "b.json", routers=("load-balance",))
    run_bench(bench, Console(quiet=True))
    first = content_of(bench)
    run_bench(tiny(tmp_path / "b.json", routers=("ssr-l", "load-balance"), repeats=3), Console(quiet=True))
    both = content_of(bench)
    assert both["settings"] == first["settings"] | {"routers": ["load-balance", "ssr-l"], "repeats": 3}
    before, after = first["sizes"]["64x4x2"], both["sizes"]["64x4x2"]
    assert set(after["extra_mb"]) == set(variants_of(["load-balance", "ssr-l"]))
    for name in ("load-balance", AGAIN):  # nothing is measured twice
        assert after["ratios"][name] == before["ratios"][name]
    assert after["softmax_ms"] == before["softmax_ms"]
    assert "ssr-l, p = 0.01" in after["ratios"]
    text = shown(size_table(Size(64, 4, 2), both))
    assert "load-balance" in text and "ssr-l, Sinkhorn step" in text


def test_a_folder_is_no_place_for_the_figures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .* is a folder; give a file, such as .*routing.json"):
        run_bench(tiny(tmp_path), Console(quiet=True))


def test_figures_of_other_settings_or_another_machine_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    run_bench(tiny(path), Console(quiet=True))
    with pytest.raises(ValueError, match=r"seed=0, now it is 5; .*--fresh"):
        run_bench(tiny(path, seed=5), Console(quiet=True))
    content = json.loads(path.read_text())
    content["machine"]["cpu"] = "abacus"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cpu='abacus'"):
        run_bench(tiny(path), Console(quiet=True))


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="no file of this benchmark"):
        run_bench(tiny(path), Console(quiet=True))
    assert path.read_text() == '{"mine": 1}'


def test_what_other_parts_added_to_the_file_stays(tmp_path: Path) -> None:
    bench = tiny(tmp_path / "b.json")
    run_bench(bench, Console(quiet=True))
    content = content_of(bench)
    content["peers"] = {"somebody": 1}
    Path(bench.out).write_text(json.dumps(content))
    run_bench(tiny(tmp_path / "b.json", sizes=("32x4x1",)), Console(quiet=True))
    assert content_of(bench)["peers"] == {"somebody": 1}


def test_an_unknown_router_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'ssr-l'"):
        run_bench(tiny(tmp_path / "b.json", routers=("srr-l",)), Console(quiet=True))


def test_ctrl_c_keeps_the_sizes_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, asked = bench_run.measure, []

    def interrupted(size, variants, settings, stop):
        if size.experts == 8:
            asked.append(size)
            signal.raise_signal(signal.SIGINT)
        return measure(size, variants, settings, stop)

    monkeypatch.setattr(bench_run, "measure", interrupted)
    assert threading.current_thread() is threading.main_thread()
    bench = tiny(tmp_path / "b.json", sizes=("64x4x2", "64x8x2", "64x16x2"))
    assert run_bench(bench, Console(quiet=True)) == 130
    assert asked == [Size(64, 8, 2)]
    assert set(content_of(bench)["sizes"]) == {"64x4x2"}
    monkeypatch.setattr(bench_run, "measure", measure)
    assert run_bench(bench, Console(quiet=True)) == 0
    assert set(content_of(bench)["sizes"]) == {"64x4x2", "64x8x2", "64x16x2"}
