"""The training loop: learns, accumulates, continues where it was, on one process and on two."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sinkroute.lab.checkpoint import CheckpointError
from sinkroute.lab.config import Config, TrainConfig, from_mapping, read_yaml, write_yaml
from sinkroute.lab.data import Corpus, load_corpus
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.models import make_model
from sinkroute.lab.run_folder import prepare_folder
from sinkroute.lab.trained import load_run
from sinkroute.lab.training import (
    Diverged,
    Progress,
    _key_dropout,
    _parameter_groups,
    learning_rate,
    train,
)
from sinkroute.routing.registry import router_options


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 kB of words, drawn with a seed."""
    words = np.random.default_rng(0).choice(["balanced", "experts", "route", "tokens", "to", "the", "and", "few"], 8000)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="module")
def corpus(text: Path) -> Corpus:
    return load_corpus("text", text)


def config(router: str = "ssr-s", options: dict | None = None, **training: object) -> Config:
    options = {"probability": 0.3} if options is None and "probability" in router_options(router) else options or {}
    return from_mapping(
        Config,
        {
            "data": {"name": "text", "length": 32},
            "model": {"layers": 2, "d_model": 32, "heads": 2, "d_hidden": 16, "experts": 4, "top_k": 2},
            "router": {"name": router, "options": options},
            "train": {"steps": 12, "batch": 8, "warmup": 3, "log_every": 1, "checkpoint_every": 5, **training},
        },
    )


def run(settings: Config, corpus: Corpus, folder: Path, **options: object) -> torch.nn.Module:
    prepare_folder(settings, corpus, folder)
    return train(settings, corpus, folder, **options)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return load_file(last / "model.safetensors")


# -- learning --


@pytest.mark.parametrize("router", ["softmax", "load-balance", "z-loss", "sinkhorn", "ssr-l", "ssr-s"])
def test_every_method_learns(corpus: Corpus, tmp_path: Path, router: str) -> None:
    run(config(router, steps=80, lr=1e-2, log_every=20, checkpoint_every=80), corpus, tmp_path)
    seen = losses(tmp_path)
    assert all(map(math.isfinite, seen))
    assert seen[-1] < 0.6 * math.log(256)
    assert seen[-1] < seen[0] - 1


def test_the_log_counts_loads_branches_and_sinkhorn_steps(corpus: Corpus, tmp_path: Path) -> None:
    run(config(log_every=3, accumulation=2), corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Every third step, and the two checkpoints of steps 5 and 10 in between.
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10, 12]
    tokens = 8 * 32
    for line, steps in zip(lines, [3, 2, 1, 3, 1, 2], strict=True):
        assert [sum(layer) for layer in line["load"]] == [2 * tokens * steps] * 2
        assert sum(line["branches"].values()) == steps * 2 * 2  # layers · micro-batches
        assert line["branches"].get("sinkhorn", 0) == 4 * line["sinkhorn_steps"]
        assert line["lr"] == learning_rate(line["step"] - 1, config().train)
    assert 0 < sum(line["sinkhorn_steps"] for line in lines) < 12


def test_progress_is_told_with_each_line(corpus: Corpus, tmp_path: Path) -> None:
    told: list[Progress] = []
    run(config(log_every=6), corpus, tmp_path, on_progress=told.append)
    assert [(progress.step, progress.steps) for progress in told] == [(5, 12), (6, 12), (10, 12), (12, 12)]
    assert [progress.loss for progress in told] == losses(tmp_path)


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = TrainConfig(steps=20, warmup=5, lr=1.0, final_lr=0.1)
    rates = [learning_rate(step, settings) for step in range(20)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(0, TrainConfig(steps=1, warmup=0, lr=2.0)) == 2.0


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(corpus: Corpus, tmp_path: Path) -> None:
    run(config("softmax", steps=4), corpus, tmp_path / "whole")
    run(config("softmax", steps=4, accumulation=4), corpus, tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, atol=2e-4, rtol=1e-3)


def test_all_methods_see_the_same_first_batch_and_weights(corpus: Corpus, tmp_path: Path) -> None:
    first = set()
    for router in ("softmax", "load-balance", "z-loss"):
        run(config(router, steps=1), corpus, tmp_path / router)
        first.add(losses(tmp_path / router)[0])
    assert len(first) == 1


def test_initial_weights_depend_on_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = make_model(config()), make_model(config()), make_model(replace(config(), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert other.moe_layers[0].router.seed == 1


def test_autocast_trains(corpus: Corpus, tmp_path: Path) -> None:
    run(config(steps=3, precision="bf16"), corpus, tmp_path)
    assert all(map(math.isfinite, losses(tmp_path)))


def test_tensorboard_gets_the_scalars(corpus: Corpus, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config(steps=3, trackers=["tensorboard"]), corpus, tmp_path)
    (events,) = tmp_path.rglob("events.out.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    scalars = [event.value for event in reader.Scalars("train/loss")]
    assert scalars == pytest.approx(losses(tmp_path))
    assert "max_vio/layer-1" in reader.Tags()["scalars"]


def test_a_constant_schedule_stays_at_the_peak_after_warm_up() -> None:
    settings = TrainConfig(steps=20, warmup=4, lr=2.0, schedule="constant", final_lr=0.1)
    assert [learning_rate(step, settings) for step in range(20)] == [0.5, 1.0, 1.5] + [2.0] * 17


def test_without_a_clip_gradients_are_as_they_come(corpus: Corpus, tmp_path: Path) -> None:
    for name, clip in (("none", None), ("huge", 1e30), ("tiny", 1e-9)):  # Adam's epsilon feels the last one
        run(config("softmax", steps=3, clip=clip), corpus, tmp_path / name)
    assert losses(tmp_path / "none") == losses(tmp_path / "huge") != losses(tmp_path / "tiny")


def test_biases_of_experts_and_what_places_begin_with_have_no_weight_decay() -> None:
    sizes = {"layers": 2, "d_model": 16, "heads": 2, "d_hidden": 8, "experts": 4}
    found = {}
    for name, more in (("stream", {"span": 4}), ("vit", {"image_size": 8, "patch": 4, "moe_from": 1, "classes": 4})):
        model = make_model(from_mapping(Config, {"model": {"name": name, **sizes, **more}}))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, others = _parameter_groups(model, 0.1)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        found[name] = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, others)]
        assert found[name][0] | found[name][1] == set(names.values())
    for decayed, others in found.values():
        assert {name.rpartition(".")[2] for name in others} >= {"bias", "weight", "b_in", "b_out"}
        assert not any("norm" in name or name.endswith(("bias", "b_in", "b_out")) for name in decayed)
        assert {name.rpartition(".")[2] for name in decayed} >= {"w_in", "w_out", "weight"}
    assert {"class_D", "positions_ND"} <= found["vit"][1]


# -- what is drawn --


def test_dropout_draws_depend_on_seed_step_part_and_rank_alone() -> None:
    def drawn(*key: int) -> float:
        _key_dropout(*key)
        return torch.rand(()).item()

    with torch.random.fork_rng():
        keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 2**20, 7, 0)]
        first = [drawn(*key) for key in keys]
        assert len(set(first)) == len(keys)
        assert [drawn(*key) for key in reversed(keys)] == first[::-1]


def test_training_leaves_the_generator_as_it_was_also_when_it_fails(corpus: Corpus, tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError("of the display")

    torch.manual_seed(7)
    before = torch.get_rng_state()
    run(config(steps=2), corpus, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="of the display"):
        run(config(steps=2), corpus, tmp_path / "b", on_progress=fail)
    assert torch.equal(torch.get_rng_state(), before)


# -- the average of the weights --


def _every_step(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(path / f"{name}.safetensors") for path in sorted((folder / "checkpoints").glob("step-*"))]


def test_the_average_is_that_of_the_weights_of_every_step(corpus: Corpus, tmp_path: Path) -> None:
    settings = config("loss-free", steps=6, average=0.8, checkpoint_every=1, keep_checkpoints=9)
    model = run(settings, corpus, tmp_path)
    weights, averages = _every_step(tmp_path, "model"), _every_step(tmp_path, "average")
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters < weights[0].keys() == averages[0].keys()
    for name in weights[0]:
        if ".saved_" in name:
            continue  # the counts of a step that has not ended: nothing is left of them
        expected = weights[0][name].double()
        for step in range(6):
            if name in parameters:
                expected = expected if step == 0 else 0.8 * expected + 0.2 * weights[step][name].double()
            else:  # what a router remembers is no weight: as the step left it
                expected = weights[step][name].double()
            torch.testing.assert_close(averages[step][name].double(), expected, atol=1e-6, rtol=1e-5)
    assert any(weights[-1][name].any() for name in weights[0] if name.endswith("bias_E"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, averages[-1][name])
    loaded = load_run(tmp_path).model
    assert all(torch.equal(tensor, averages[-1][name]) for name, tensor in loaded.state_dict().items())


def test_an_averaged_run_continues_with_the_same_bits_and_trains_as_without(corpus: Corpus, tmp_path: Path) -> None:
    settings = config(steps=6, average=0.8, checkpoint_every=2)
    run(settings, corpus, tmp_path / "whole")
    run(config(steps=6, checkpoint_every=2), corpus, tmp_path / "without")
    stop = StopRequest()

    def at_three(progress: Progress) -> None:
        stop.asked = progress.step == 2

    with pytest.raises(Interrupted):
        run(settings, corpus, tmp_path / "parts", stop=stop, on_progress=at_three)
    run(settings, corpus, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") == losses(tmp_path / "without")
    for name in ("model", "average"):
        one, two = _every_step(tmp_path / "whole", name)[-1], _every_step(tmp_path / "parts", name)[-1]
        assert all(torch.equal(one[key], two[key]) for key in one)


# -- stopping and continuing --


def test_a_stopped_run_continues_with_the_same_bits(corpus: Corpus, tmp_path: Path) -> None:
    settings = config(accumulation=2)
    run(settings, corpus, tmp_path / "whole")
    stop = StopRequest()

    def at_seven(progress: Progress) -> None:
        stop.asked = progress.step == 7

    with pytest.raises(Interrupted, match="step 8 of 12; the same command continues"):
        run(settings, corpus, tmp_path / "parts", stop=stop, on_progress=at_seven)
    run(settings, corpus, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], tensor)


def test_another_configuration_in_the_same_folder_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    run(config(steps=1), corpus, tmp_path)
    with pytest.raises(ValueError, match=r"another configuration \(train\.steps: 1 → 2\).*--out.*--fresh"):
        prepare_folder(config(steps=2), corpus, tmp_path)
    prepare_folder(config(steps=2), corpus, tmp_path, fresh=True)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_folder_in_which_nothing_was_trained_is_taken_over(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'probability'"):
        run(config(options={"probabilty": 0.5}, steps=1), corpus, tmp_path)
    run(config(options={"probability": 0.5}, steps=1), corpus, tmp_path)
    assert len(losses(tmp_path)) == 1


def test_fresh_deletes_what_runs_write_and_nothing_else(corpus: Corpus, tmp_path: Path) -> None:
    run(config(steps=1), corpus, tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    prepare_folder(config(steps=2), corpus, tmp_path, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "corpus.json", "thesis"]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_configuration_of_something_else_is_never_touched(corpus: Corpus, tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "config.yaml").write_text("unrelated: 1  # mine")
    with pytest.raises(ValueError, match="something else than a run"):
        prepare_folder(config(), corpus, tmp_path, fresh=fresh)
    assert (tmp_path / "config.yaml").read_text() == "unrelated: 1  # mine"


def test_a_run_of_another_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    run(config(steps=1), corpus, tmp_path)
    with pytest.raises(ValueError, match=r"was trained on other data: SHA-256 .* now 0{12}…"):
        prepare_folder(config(steps=1), replace(corpus, sha256="0" * 64), tmp_path)


def test_what_does_not_change_the_model_may_change_between_calls(corpus: Corpus, tmp_path: Path) -> None:
    run(config(steps=4, checkpoint_every=2), corpus, tmp_path)
    settings = config(steps=4, checkpoint_every=3)
    settings.eval.attacks = {}
    prepare_folder(settings, corpus, tmp_path)
    assert read_yaml(Config, tmp_path / "config.yaml") == settings


def test_a_tracker_that_is_missing_stops_the_run_before_it_trains(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Accelerate would say so in its debug log, and train.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ValueError, match=r"train\.trackers has 'wandb'.* missing: pip install wandb .*leave it out"):
        run(config(trackers=["wandb"]), corpus, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_gradient_that_is_not_finite_is_never_saved(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(Diverged, match="grad_norm is nan"):
        run(config(steps=5, log_every=5), corpus, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_damaged_checkpoint_stops_the_resume(corpus: Corpus, tmp_path: Path) -> None:
    run(config(), corpus, tmp_path)
    model = tmp_path / "checkpoints" / "step-000012" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="step-000010"):
        run(config(), corpus, tmp_path)


def test_divergence_is_told_with_its_step_and_a_cure(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"diverged at step \d+.*Lower train\.lr"):
        run(config("softmax", steps=60, lr=1e30, warmup=0, clip=1e30), corpus, tmp_path)


def test_a_text_that_is_too_short_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    settings = config()
    settings.data.length = 30_000
    with pytest.raises(ValueError, match=r"length"):
        run(settings, corpus, tmp_path)


COMMAND = [sys.executable, "-m", "sinkroute.cli", "train"]


@pytest.fixture(scope="module")
def uninterrupted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration file, and the folder of a run of it that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    settings = config(steps=120, checkpoint_every=17, accumulation=2)
    settings.data.path = str(text)
    write_yaml(settings, folder / "config.yaml")
    subprocess.run([*COMMAND, str(folder / "config.yaml"), "--out", str(folder / "whole")], check=True)
    return folder / "config.yaml", folder / "whole"


@pytest.mark.parametrize("kill_at", [3, 45, 80])
def test_kill_9_and_the_same_command_give_the_same_losses_to_the_last_bit(
    uninterrupted: tuple[Path, Path], tmp_path: Path, kill_at: int
) -> None:
    file, whole = uninterrupted
    log = tmp_path / "run" / "log.jsonl"
    command = [*COMMAND, str(file), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < kill_at):
            pass  # no sleep: steps take milliseconds
        process.kill()
    killed_at = log.read_text().count("\n")
    assert process.returncode == -9, "the run ended before it could be killed"
    assert kill_at <= killed_at < 120
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert losses(tmp_path / "run") == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(tmp_path / "run")[name], tensor)
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "run", whole)]
    assert results[0]["valid"] == results[1]["valid"]
    assert results[0]["serving"] == results[1]["serving"]
    assert results[0]["sinkhorn_steps"] == results[1]["sinkhorn_steps"] > 0


def test_two_processes_give_the_run_of_one(text: Path, tmp_path: Path) -> None:
    """Data-parallel over gloo: the same batch, cut in two, so the same losses up to the order of sums."""
    settings = config("softmax", steps=6)
    settings.data.path = str(text)
    write_yaml(settings, tmp_path / "config.yaml")
    for processes in (1, 2):
        _torchrun(processes, "train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / str(processes)))
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("1", "2")]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert sum(map(sum, two["load"])) == sum(map(sum, one["load"]))


def _torchrun(processes: int, *words: str) -> None:
    """Run the command line in several processes; again if another program took the port that torchrun had chosen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SINKROUTE_TRACEBACK": "1"}
    for _ in range(3):
        command = [*launcher, "-m", "sinkroute.cli", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return
        if not re.search("EADDRINUSE|address already in use|rendezvous|connect", done.stderr, flags=re.IGNORECASE):
            break
    pytest.fail(done.stdout[-2000:] + done.stderr[-6000:])
