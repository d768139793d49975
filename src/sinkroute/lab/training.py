"""The training loop, on Accelerate: one process or several, with accumulation, checkpoints and an exact resume.

Everything random is a function of the seed and of a position (`Windows` of its index, a router's draws of the step),
the learning rate of the step: a run that was killed and resumed continues with the same numbers, and no state of a
generator is saved.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from sinkroute._errors import NonFiniteLogits, SinkrouteError
from sinkroute.lab.average import RunningAverage
from sinkroute.lab.checkpoint import gather, latest_checkpoint, list_checkpoints
from sinkroute.lab.config import Config, TrainConfig, differences, read_yaml, write_yaml
from sinkroute.lab.engine import holds_a_part, make_accelerator, shard_like
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.log import RunLog
from sinkroute.lab.models import SparseModel, make_model
from sinkroute.lab.peers import Peers, join, shared
from sinkroute.lab.resume import restore
from sinkroute.lab.shards import write_shards
from sinkroute.lab.tally import State, Tally
from sinkroute.lab.tasks import make_task
from sinkroute.routing import end_step, set_step

__all__ = ["Data", "Diverged", "Progress", "check_data", "learning_rate", "prepare_folder", "train"]


class Data(Protocol):
    """What identifies a text or a set of images."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def sha256(self) -> str: ...


class Diverged(SinkrouteError):
    """The loss or the scores of a router are no longer finite."""


@dataclass(frozen=True)
class Progress:
    """What a display wants to know after each line of the log."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    max_vio: float


def learning_rate(step: int, config: TrainConfig) -> float:
    """Of optimiser step `step` (from 0): linear warm-up, then the peak, or a cosine down to `final_lr` times the peak.

    >>> config = TrainConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    >>> learning_rate(0, config), learning_rate(9, config), round(learning_rate(99, config), 3)
    (0.1, 1.0, 0.1)
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    span = max(config.steps - config.warmup - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min((step - config.warmup) / span, 1.0)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


# What a run writes; --fresh deletes these and nothing else.
_OWN_FILES = ("config.yaml", "corpus.json", "log.jsonl", "result.json", "evaluation-*.json", "checkpoints", "sinkroute")

# What may change between two calls of a run: it decides what is shown and kept, not which numbers come out of training.
FREE_KEYS = (
    "label", "eval.", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.trackers",
    "train.timeout_minutes", "train.sharded_checkpoints",
)  # fmt: skip


def prepare_folder(config: Config, data: Data, folder: Path, fresh: bool = False) -> None:
    """Make a run's folder, or check that the one there belongs to this configuration and these data.

    A folder in which nothing was trained yet (the run failed at once, say of a misspelt option) is taken over; what
    does not change the trained model, such as `eval`, may differ and is written anew.

    Raises:
        ValueError: the folder holds a run with another configuration or of other data, or something else.
    """
    written = folder / "config.yaml"
    if written.exists():
        try:
            earlier = read_yaml(Config, written)
        except ValueError as error:
            raise ValueError(f"{folder} holds something else than a run ({error}); choose another --out") from None
        if fresh:
            for pattern in _OWN_FILES:
                for path in folder.glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif _begun(folder):
            lines = differences(earlier, config)
            changed = [line for line in lines if not line.startswith(FREE_KEYS)]
            if changed:
                raise ValueError(
                    f"{folder} holds a run with another configuration ({'; '.join(changed)}); "
                    "choose another --out, or --fresh to delete it and start anew"
                )
            check_data(data, folder)
            if any(line.startswith("eval.") for line in lines):
                (folder / "result.json").unlink(missing_ok=True)  # it answers other questions; training is not repeated
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(config, written)
    about = {"name": data.name, "source": data.source, "sha256": data.sha256}
    write_json(about, folder / "corpus.json")


def _begun(folder: Path) -> bool:
    log = folder / "log.jsonl"
    logged = log.exists() and log.stat().st_size > 0
    return logged or (folder / "result.json").exists() or latest_checkpoint(folder / "checkpoints") is not None


def check_data(data: Data, folder: Path) -> None:
    """Check that a run was trained on this very data: others would be split elsewhere, training examples in the test.

    Raises:
        ValueError: the data have changed since.
    """
    try:
        known = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'corpus.json'} cannot be read ({error!r}); --fresh starts the run anew") from None
    if known != data.sha256:
        raise ValueError(
            f"{folder} was trained on other data: SHA-256 {known[:12]}…, now {data.sha256[:12]}… "
            f"({data.source}); restore it, or --fresh to start anew"
        )


def train(
    config: Config,
    data: Any,
    folder: Path,
    *,
    stop: StopRequest | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SparseModel:
    """Train a model, from its latest checkpoint if there is one, and leave the last checkpoint in `folder/checkpoints`.

    Args:
        config: of the run; `prepare_folder` has checked that `folder` belongs to it.
        data: the text or the images, as `load_data` gives them.
        folder: for `log.jsonl` and `checkpoints/`.
        stop: when it turns true, a checkpoint is written and `Interrupted` raised.
        on_progress: called at each line of the log.

    Returns:
        The trained model, unwrapped; with `train.average`, the average of its weights over the steps.

    Raises:
        Interrupted: as asked; the same call continues.
        Diverged: loss or scores are not finite any more.
        CheckpointError: a checkpoint is damaged or cannot be written.
        PeerFailed, RankLost: another process of the run failed, or is gone; the same call continues.
        ValueError: a configuration that does not fit the machine or the data.
    """
    peers = join(config.train.timeout_minutes, stop)
    with peers.guard():
        return _train(config, data, folder, peers, stop, on_progress)


def _train(
    config: Config,
    data: Any,
    folder: Path,
    peers: Peers,
    stop: StopRequest | None,
    on_progress: Callable[[Progress], None] | None,
) -> SparseModel:
    settings = config.train
    accelerator = make_accelerator(settings, folder)
    model = make_model(config)
    # Fused: one pass over memory for all parameters, on a CPU too.
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, settings.weight_decay), lr=settings.lr, betas=(0.9, settings.beta2), fused=True
    )
    wrapped, prepared = accelerator.prepare(model, optimizer)
    in_parts = holds_a_part(model)
    task = make_task(config, data)
    average = None
    if settings.average is not None and in_parts:
        average = RunningAverage(settings.average, shard_like(model, make_model(config), accelerator))
    elif settings.average is not None:
        average = RunningAverage.of(model, settings.average)
    averaged = None if average is None else average.module
    state = State()
    checkpoints = folder / "checkpoints"
    peers.cure = "Nothing is saved yet: the same command starts anew."
    if (found := restore(peers, checkpoints, model, optimizer, averaged, accelerator.device)) is not None:
        state = State(**found[0])
        task.carry_on(_own_rows(found[1], accelerator))
        if average is not None:
            average.count = state.step
        peers.cure = _cure(state.step)
    remaining = Subset(task.items, range(state.step * settings.batch, settings.steps * settings.batch))
    loader = accelerator.prepare(
        DataLoader(
            remaining, batch_size=settings.batch // settings.accumulation, drop_last=True, num_workers=settings.workers
        )
    )
    step_size = settings.batch * task.items_each
    if settings.trackers:
        accelerator.init_trackers("sinkroute")
    tally = Tally()
    log = RunLog(folder / "log.jsonl", last_step=state.step, enabled=accelerator.is_main_process)
    wrapped.train()
    started = time.perf_counter() - state.seconds

    def evaluate() -> None:
        quality = task.quality(task.evaluate(model, "valid"))
        log.write({"kind": "eval", "step": state.step, "split": "valid", task.metric: quality[task.metric]})

    def save() -> None:
        carried = {name: accelerator.gather(tensor.contiguous()) for name, tensor in task.carried().items()}
        peers.at(f"saving step {state.step}")
        if settings.sharded_checkpoints:
            steps, keep = state.step, settings.keep_checkpoints
            more: Any = {"carried": carried, "average": averaged}
            write_shards(peers, checkpoints, steps, model, optimizer, asdict(state), keep, **more)
            peers.cure = _cure(state.step)
            return
        snapshot = gather(model, optimizer, carried=carried, average=averaged)

        def write() -> None:
            snapshot.write(checkpoints, state.step, asdict(state), settings.keep_checkpoints)

        peers.on_main(f"writing the checkpoint of step {state.step}", write)
        peers.cure = _cure(state.step)

    def write_line() -> None:
        if not tally.steps:
            return
        seconds = time.perf_counter() - started
        rate = learning_rate(state.step - 1, settings)
        line = tally.line(accelerator, state, seconds, rate, step_size, each_step=config.data.switch_to is not None)
        tally.clear()
        log.write(line)
        if settings.trackers:
            accelerator.log(_flat(line), step=state.step)
        for name in ("loss", "grad_norm"):
            # The gradient too: with it the weights are lost, a step before the loss shows it, and would be saved.
            if not math.isfinite(line[name]):
                raise shared(Diverged(_diverged(state.step, f"{name} is {line[name]}", checkpoints)))
        state.seconds = seconds
        if on_progress is not None:
            mean_vio = sum(line["max_vio"]) / len(line["max_vio"])
            on_progress(Progress(state.step, settings.steps, line["loss"], line["tokens_per_second"], mean_vio))

    batches = iter(loader)
    own_generator = torch.random.fork_rng()
    own_generator.__enter__()
    try:
        while state.step < settings.steps:
            peers.at(f"training step {state.step + 1}")
            for group in prepared.param_groups:
                group["lr"] = learning_rate(state.step, settings)
            for part in range(settings.accumulation):
                set_step(model, state.step, part, total_steps=settings.steps)
                batch = next(batches)
                _key_dropout(config.seed, state.step, part, accelerator.process_index)
                with accelerator.accumulate(wrapped):
                    # Accelerate puts autocast into the model, but not into one that FSDP2 holds in parts.
                    with accelerator.autocast() if in_parts else nullcontext():
                        loss = task.loss(wrapped, batch, state.step, part)
                    auxiliary = model.auxiliary_loss()
                    accelerator.backward(loss if auxiliary is None else loss + auxiliary)
                    tally.add_micro_batch(model, loss, auxiliary, settings.accumulation)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip or math.inf)
                        assert norm is not None  # it is None with DeepSpeed's own clipping only
                        tally.grad_norm = norm
                    prepared.step()
                    prepared.zero_grad()
            end_step(model)  # now, not when the next begins: what is evaluated or saved below has learnt from this step
            if average is not None:
                average.update(model)
            state.step += 1
            tally.end_step(accelerator)
            asked = _agreed(stop, accelerator)
            due = asked or state.step % settings.checkpoint_every == 0 or state.step == settings.steps
            if due or state.step % settings.log_every == 0:
                write_line()
            paused = time.perf_counter()
            if config.eval.every and state.step % config.eval.every == 0:
                if in_parts:
                    evaluate()
                else:
                    peers.on_main(f"evaluating at step {state.step}", evaluate)
            if due:
                save()
            # Neither evaluation nor a checkpoint is training time.
            pause = time.perf_counter() - paused
            started, tally.since = started + pause, tally.since + pause
            if asked and state.step < settings.steps:
                words = f"stopped at step {state.step} of {settings.steps}; the same command continues from there"
                raise shared(Interrupted(words))
    except NonFiniteLogits as error:
        raise Diverged(_diverged(state.step, str(error), checkpoints)) from error
    finally:
        own_generator.__exit__(None, None, None)
        log.close()
        if settings.trackers:
            accelerator.end_training()
    if averaged is not None:
        model.load_state_dict(averaged.state_dict())
    return model


def _cure(step: int) -> str:
    return f"The same command continues from step {step}."


def _key_dropout(seed: int, step: int, part: int, rank: int) -> None:
    """Dropout draws from torch's generator: what it draws in a micro-batch is the same after a resume."""
    words = np.random.SeedSequence([seed, step, part, rank]).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))


def _own_rows(carried: dict[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Of what all processes carried, the rows of this one, as the loader shares them out."""
    number, index = accelerator.num_processes, accelerator.process_index
    return {name: tensor.chunk(number)[index].to(accelerator.device) for name, tensor in carried.items()}


def _agreed(stop: StopRequest | None, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop: all of them must leave at the same step."""
    asked = stop is not None and bool(stop)
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum").item())


# Experts' biases, and what places in a picture begin with: matrices in shape alone.
_NO_DECAY = (".b_in", ".b_out", "positions_ND")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (vectors if parameter.ndim < 2 or name.endswith(_NO_DECAY) else matrices).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """The scalars of a line, for trackers."""
    scalars = {
        f"train/{name}": value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"
    }
    return scalars | {f"max_vio/layer-{i}": value for i, value in enumerate(line["max_vio"])}


def _diverged(step: int, what: str, checkpoints: Path) -> str:
    kept = [path.name for path in list_checkpoints(checkpoints)]
    return (
        f"training diverged at step {step}: {what}. Lower train.lr or train.clip and start anew"
        + (f"; {checkpoints} still holds {', '.join(kept)}" if kept else "")
        + "."
    )
