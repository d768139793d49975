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
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from sinkroute._errors import NonFiniteLogits, SinkrouteError
from sinkroute.lab.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_carried,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from sinkroute.lab.config import Config, TrainConfig, differences, read_yaml, write_yaml
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.log import RunLog
from sinkroute.lab.models import SparseModel, make_model
from sinkroute.lab.tasks import make_task
from sinkroute.routing import end_step, set_step
from sinkroute.routing.metrics import max_violation

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
FREE_KEYS = ("label", "eval.", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.trackers")


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
        ValueError: a configuration that does not fit the machine or the data.
    """
    settings = config.train
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=settings.precision,
        # Several micro-batches, one synchronisation: also across the end of the loader, which is the end of training.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulation, sync_with_dataloader=False
        ),
        # `batch` counts over all processes: the same run on one GPU or eight.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=list(settings.trackers) or None,
        project_dir=str(folder),
    )
    micro_batch = settings.batch // settings.accumulation
    if micro_batch % accelerator.num_processes:
        raise ValueError(
            f"train.batch / train.accumulation = {micro_batch} sequences cannot be shared by "
            f"{accelerator.num_processes} processes; make it a multiple"
        )
    model = make_model(config)
    # Fused: one pass over memory for all parameters, on a CPU too.
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, settings.weight_decay), lr=settings.lr, betas=(0.9, settings.beta2), fused=True
    )
    wrapped, prepared = accelerator.prepare(model, optimizer)
    task = make_task(config, data)
    average = None
    if settings.average is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
    state = _State()
    checkpoints = folder / "checkpoints"
    if (latest := latest_checkpoint(checkpoints)) is not None:
        state = _State(**load_checkpoint(latest, model, optimizer))
        task.carry_on(_own_rows(load_carried(latest), accelerator))
        if average is not None:
            load_model(latest, average.module, averaged=True)
            average.n_averaged.fill_(state.step)
    remaining = Subset(task.items, range(state.step * settings.batch, settings.steps * settings.batch))
    loader = accelerator.prepare(
        DataLoader(remaining, batch_size=micro_batch, drop_last=True, num_workers=settings.workers)
    )
    step_size = settings.batch * task.items_each
    if settings.trackers:
        accelerator.init_trackers("sinkroute")
    tally = _Tally()
    log = RunLog(folder / "log.jsonl", last_step=state.step, enabled=accelerator.is_main_process)
    wrapped.train()
    started = time.perf_counter() - state.seconds

    def evaluate() -> None:
        quality = task.quality(task.evaluate(model, "valid"))
        log.write({"kind": "eval", "step": state.step, "split": "valid", task.metric: quality[task.metric]})

    def save() -> None:
        carried = {name: accelerator.gather(tensor.contiguous()) for name, tensor in task.carried().items()}
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_checkpoint(
                checkpoints,
                state.step,
                model,
                optimizer,
                asdict(state),
                settings.keep_checkpoints,
                carried=carried,
                average=None if average is None else average.module,
            )

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
                raise Diverged(_diverged(state.step, f"{name} is {line[name]}", checkpoints))
        state.seconds = seconds
        if on_progress is not None:
            mean_vio = sum(line["max_vio"]) / len(line["max_vio"])
            on_progress(Progress(state.step, settings.steps, line["loss"], line["tokens_per_second"], mean_vio))

    batches = iter(loader)
    own_generator = torch.random.fork_rng()
    own_generator.__enter__()
    try:
        while state.step < settings.steps:
            for group in prepared.param_groups:
                group["lr"] = learning_rate(state.step, settings)
            for part in range(settings.accumulation):
                set_step(model, state.step, part, total_steps=settings.steps)
                batch = next(batches)
                _key_dropout(config.seed, state.step, part, accelerator.process_index)
                with accelerator.accumulate(wrapped):
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
                average.update_parameters(model)
            state.step += 1
            tally.end_step(accelerator)
            asked = _agreed(stop, accelerator)
            due = asked or state.step % settings.checkpoint_every == 0 or state.step == settings.steps
            if due or state.step % settings.log_every == 0:
                write_line()
            paused = time.perf_counter()
            if config.eval.every and state.step % config.eval.every == 0 and accelerator.is_main_process:
                evaluate()
            if due:
                save()
            # Neither evaluation nor a checkpoint is training time.
            pause = time.perf_counter() - paused
            started, tally.since = started + pause, tally.since + pause
            if asked and state.step < settings.steps:
                raise Interrupted(
                    f"stopped at step {state.step} of {settings.steps}; the same command continues from there"
                )
    except NonFiniteLogits as error:
        raise Diverged(_diverged(state.step, str(error), checkpoints)) from error
    finally:
        own_generator.__exit__(None, None, None)
        log.close()
        if settings.trackers:
            accelerator.end_training()
    if average is not None:
        model.load_state_dict(average.module.state_dict())
    return model


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


@dataclass
class _State:
    """What a resumed run must know beside weights and optimiser."""

    step: int = 0
    seconds: float = 0.0


@dataclass
class _Tally:
    """Sums since the last line of the log. Tensors stay on their device until a line is written."""

    steps: int = 0
    loss: Tensor | float = 0.0
    auxiliary: Tensor | None = None
    load_LE: Tensor | int = 0
    dropped: Tensor | None = None
    max_vio_L: Tensor | float = 0.0
    step_loss: Tensor | float = 0.0
    step_load_LE: Tensor | int = 0
    step_sinkhorn: bool = False
    loss_of_steps: list[Tensor] = field(default_factory=list)
    max_vio_of_steps: list[Tensor] = field(default_factory=list)
    branches: Counter[str] = field(default_factory=Counter)
    sinkhorn_steps: int = 0
    plan_passes: int | Tensor = 0
    grad_norm: Tensor | float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add_micro_batch(self, model: SparseModel, loss: Tensor, auxiliary: Tensor | None, accumulation: int) -> None:
        self.loss = self.loss + loss.detach() / accumulation
        self.step_loss = self.step_loss + loss.detach() / accumulation
        if auxiliary is not None:
            self.auxiliary = (0.0 if self.auxiliary is None else self.auxiliary) + auxiliary.detach() / accumulation
        routes = [layer.routes for layer in model.moe_layers if layer.routes is not None]
        self.step_load_LE = self.step_load_LE + torch.stack([route.load for route in routes])
        if left_out := [layer.dropped for layer in model.moe_layers if layer.dropped is not None]:
            self.dropped = torch.stack(left_out).sum() + (0 if self.dropped is None else self.dropped)
        self.branches.update(route.branch for route in routes)
        self.step_sinkhorn = self.step_sinkhorn or any(route.branch == "sinkhorn" for route in routes)
        self.plan_passes += sum(route.plan_passes or 0 for route in routes)

    def end_step(self, accelerator: Accelerator) -> None:
        """The load of a step is that of its whole batch: over micro-batches and processes."""
        load_LE = accelerator.reduce(self.step_load_LE, "sum")
        self.load_LE = self.load_LE + load_LE
        max_vio_L = max_violation(load_LE)
        self.max_vio_L = self.max_vio_L + max_vio_L
        self.max_vio_of_steps.append(max_vio_L.mean())
        self.loss_of_steps.append(torch.as_tensor(self.step_loss))
        self.sinkhorn_steps += self.step_sinkhorn
        self.step_loss, self.step_load_LE, self.step_sinkhorn = 0.0, 0, False
        self.steps += 1

    def line(
        self,
        accelerator: Accelerator,
        state: _State,
        seconds: float,
        lr: float,
        tokens_per_step: int,
        *,
        each_step: bool,
    ) -> dict[str, Any]:
        """Means over the steps since the last line; `each_step`: and loss and MaxVio of each of them."""
        assert isinstance(self.load_LE, Tensor) and isinstance(self.max_vio_L, Tensor)
        loss = accelerator.reduce(self.loss, "mean")
        auxiliary = None if self.auxiliary is None else accelerator.reduce(self.auxiliary, "mean")
        line = {
            "kind": "train",
            "step": state.step,
            "loss": loss.item() / self.steps,
            "aux_loss": None if auxiliary is None else auxiliary.item() / self.steps,
            "lr": lr,
            "grad_norm": float(self.grad_norm),
            "tokens_per_second": self.steps * tokens_per_step / (time.perf_counter() - self.since),
            "seconds": seconds,
            "max_vio": (self.max_vio_L / self.steps).tolist(),
            "load": self.load_LE.tolist(),
            "branches": dict(self.branches),
            "sinkhorn_steps": self.sinkhorn_steps,
            "plan_passes": int(self.plan_passes),
        }
        if self.dropped is not None:  # of the choices, which are counted in the load
            line["dropped"] = (accelerator.reduce(self.dropped, "sum") / self.load_LE.sum()).item()
        if each_step:
            losses = accelerator.reduce(torch.stack(self.loss_of_steps), "mean")
            line["each_step"] = {"loss": losses.tolist(), "max_vio": torch.stack(self.max_vio_of_steps).tolist()}
        return line

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


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
