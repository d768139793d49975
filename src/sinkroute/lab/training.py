"""The training loop, on Accelerate: one process or several, with accumulation, checkpoints and an exact resume.

Everything random is a function of the seed and of a position (`Windows` of its index, a router's draws of the step),
the learning rate of the step: a run that was killed and resumed continues with the same numbers, and no state of a
generator is saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from sinkroute._errors import NonFiniteLogits, SinkrouteError
from sinkroute.lab.average import RunningAverage
from sinkroute.lab.checkpoint import gather, list_checkpoints
from sinkroute.lab.config import Config, TrainConfig
from sinkroute.lab.engine import holds_a_part, make_accelerator, shard_like
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.log import RunLog
from sinkroute.lab.models import SparseModel, make_model
from sinkroute.lab.peers import join, shared
from sinkroute.lab.resume import restore
from sinkroute.lab.shards import write_shards
from sinkroute.lab.tally import State, Tally
from sinkroute.lab.tasks import make_task
from sinkroute.routing import end_step, set_step

__all__ = ["Diverged", "Progress", "Trainer", "learning_rate", "train"]


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


def train(
    config: Config,
    data: Any,
    folder: Path,
    *,
    stop: StopRequest | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SparseModel:
    """Train, or continue, the run of a folder: see `Trainer`, which tells what it takes, returns and raises."""
    return Trainer(config, data, folder, stop=stop, on_progress=on_progress).run()


class Trainer:
    """One training run: it prepares, restores what an earlier call left, and takes steps until all are done.

    Args:
        config: with as many sequences or images in `train.batch` as processes can share.
        data: a `Corpus` or `ImageData`, as `load_data` gives it.
        folder: of the run, with `prepare_folder` behind it.
        stop: looked at after every step; once true, a checkpoint is written and `Interrupted` raised.
        on_progress: called at each line of the log.
    """

    def __init__(
        self,
        config: Config,
        data: Any,
        folder: Path,
        *,
        stop: StopRequest | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.config, self.settings, self.data, self.folder = config, config.train, data, folder
        self.stop, self.on_progress = stop, on_progress
        self.peers = join(config.train.timeout_minutes, stop)
        self.checkpoints = folder / "checkpoints"
        self.state = State()

    def run(self) -> SparseModel:
        """Train to the last step.

        Returns:
            The trained model, unwrapped; with `train.average`, the average of its weights over the steps.

        Raises:
            Interrupted: as asked; the same call continues.
            Diverged: loss or scores are not finite any more.
            CheckpointError: a checkpoint is damaged or cannot be written.
            PeerFailed, RankLost: another process of the run failed, or is gone; the same call continues.
            ValueError: a configuration that does not fit the machine or the data.
        """
        with self.peers.guard():
            self.prepare()
            self.restore()
            self.open()
            try:
                self.take_steps()
            except NonFiniteLogits as error:
                raise self._diverged(str(error)) from error
            finally:
                self.close()
            if self.average is not None:
                self.model.load_state_dict(self.average.module.state_dict())
            return self.model

    def prepare(self) -> None:
        """Model, optimiser and task, laid out over the processes."""
        settings = self.settings
        self.accelerator = make_accelerator(settings, self.folder)
        self.model = make_model(self.config)
        # Fused: one pass over memory for all parameters, on a CPU too.
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, settings.weight_decay),
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            fused=True,
        )
        self.wrapped, self.prepared = self.accelerator.prepare(self.model, self.optimizer)
        self.in_parts = holds_a_part(self.model)
        self.task = make_task(self.config, self.data)
        self.average: RunningAverage | None = None
        if settings.average is not None and self.in_parts:
            twin = shard_like(self.model, make_model(self.config), self.accelerator)
            self.average = RunningAverage(settings.average, twin)
        elif settings.average is not None:
            self.average = RunningAverage.of(self.model, settings.average)

    def restore(self) -> None:
        """Continue from the latest checkpoint, if there is one."""
        self.peers.cure = "Nothing is saved yet: the same command starts anew."
        averaged = None if self.average is None else self.average.module
        found = restore(self.peers, self.checkpoints, self.model, self.optimizer, averaged, self.accelerator.device)
        if found is None:
            return
        self.state = State(**found[0])
        self.task.carry_on(_own_rows(found[1], self.accelerator))
        if self.average is not None:
            self.average.count = self.state.step
        self.peers.cure = _cure(self.state.step)

    def open(self) -> None:
        """The data that are left, the log and the trackers."""
        settings, state = self.settings, self.state
        left = Subset(self.task.items, range(state.step * settings.batch, settings.steps * settings.batch))
        micro_batch = settings.batch // settings.accumulation
        self.loader = self.accelerator.prepare(
            DataLoader(left, batch_size=micro_batch, drop_last=True, num_workers=settings.workers)
        )
        if settings.trackers:
            self.accelerator.init_trackers("sinkroute")
        self.tally = Tally(self.model, each_step=self.config.data.switch_to is not None)
        self.lines = RunLog(self.folder / "log.jsonl", state.step, enabled=self.accelerator.is_main_process)
        self.wrapped.train()
        self.started = time.perf_counter() - state.seconds

    def close(self) -> None:
        self.tally.close()
        self.lines.close()
        if self.settings.trackers:
            self.accelerator.end_training()

    def take_steps(self) -> None:
        """All that are left, with what is due between them."""
        settings, state, every = self.settings, self.state, self.config.eval.every
        batches = iter(self.loader)
        with torch.random.fork_rng():
            while state.step < settings.steps:
                self.step(batches)
                asked = _agreed(self.stop, self.accelerator)
                due = asked or state.step % settings.checkpoint_every == 0 or state.step == settings.steps
                if due or state.step % settings.log_every == 0:
                    self.log()
                paused = time.perf_counter()
                if every and state.step % every == 0:
                    self.evaluate()
                if due:
                    self.save()
                # Neither evaluation nor a checkpoint is training time.
                pause = time.perf_counter() - paused
                self.started, self.tally.since = self.started + pause, self.tally.since + pause
                if asked and state.step < settings.steps:
                    words = f"stopped at step {state.step} of {settings.steps}; the same command continues from there"
                    raise shared(Interrupted(words))

    def step(self, batches: Iterator[Any]) -> None:
        """One optimiser step."""
        state, settings = self.state, self.settings
        self.peers.at(f"training step {state.step + 1}")
        for group in self.prepared.param_groups:
            group["lr"] = learning_rate(state.step, settings)
        for part in range(settings.accumulation):
            set_step(self.model, state.step, part, total_steps=settings.steps)
            batch = next(batches)
            _key_dropout(self.config.seed, state.step, part, self.accelerator.process_index)
            with self.accelerator.accumulate(self.wrapped):
                self._micro_batch(batch, part)
        end_step(self.model)  # now, not when the next begins: what is evaluated or saved next has learnt from this step
        if self.average is not None:
            self.average.update(self.model)
        state.step += 1
        self.tally.end_step()

    def _micro_batch(self, batch: Any, part: int) -> None:
        accelerator, settings = self.accelerator, self.settings
        # Accelerate puts autocast into the model, but not into one that FSDP2 holds in parts.
        with accelerator.autocast() if self.in_parts else nullcontext():
            loss = self.task.loss(self.wrapped, batch, self.state.step, part)
        auxiliary = self.model.auxiliary_loss()
        accelerator.backward(loss if auxiliary is None else loss + auxiliary)
        self.tally.add_micro_batch(loss, auxiliary, settings.accumulation)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), settings.clip or math.inf)
            assert norm is not None  # it is None with DeepSpeed's own clipping only
            self.tally.grad_norm = norm
        self.prepared.step()
        self.prepared.zero_grad()

    def log(self) -> None:
        """A line of what happened since the last one."""
        state, settings = self.state, self.settings
        seconds = time.perf_counter() - self.started
        rate = learning_rate(state.step - 1, settings)
        line = self.tally.line(self.accelerator, state, seconds, rate, settings.batch * self.task.items_each)
        self.tally.clear()
        self.lines.write(line)
        if settings.trackers:
            self.accelerator.log(_flat(line), step=state.step)
        for name in ("loss", "grad_norm"):
            # The gradient too: with it the weights are lost, a step before the loss shows it, and would be saved.
            if not math.isfinite(line[name]):
                raise shared(self._diverged(f"{name} is {line[name]}"))
        state.seconds = seconds
        if self.on_progress is not None:
            mean_vio = sum(line["max_vio"]) / len(line["max_vio"])
            self.on_progress(Progress(state.step, settings.steps, line["loss"], line["tokens_per_second"], mean_vio))

    def evaluate(self) -> None:
        """Quality on the validation split, as a line of the log; of a model in parts by all processes together."""

        def write() -> None:
            quality = self.task.quality(self.task.evaluate(self.model, "valid"))
            metric = self.task.metric
            self.lines.write({"kind": "eval", "step": self.state.step, "split": "valid", metric: quality[metric]})

        if self.in_parts:
            write()
        else:
            self.peers.on_main(f"evaluating at step {self.state.step}", write)

    def save(self) -> None:
        """A checkpoint."""
        step, settings, gathered = self.state.step, self.settings, self.accelerator.gather
        carried = {name: gathered(tensor.contiguous()) for name, tensor in self.task.carried().items()}
        more: Any = {"carried": carried, "average": None if self.average is None else self.average.module}
        state, keep = asdict(self.state), settings.keep_checkpoints
        self.peers.at(f"saving step {step}")
        if settings.sharded_checkpoints:
            write_shards(self.peers, self.checkpoints, step, self.model, self.optimizer, state, keep, **more)
        else:
            snapshot = gather(self.model, self.optimizer, **more)

            def write() -> None:
                snapshot.write(self.checkpoints, step, state, keep)

            self.peers.on_main(f"writing the checkpoint of step {step}", write)
        self.peers.cure = _cure(step)

    def _diverged(self, what: str) -> Diverged:
        kept = [path.name for path in list_checkpoints(self.checkpoints)]
        return Diverged(
            f"training diverged at step {self.state.step}: {what}. Lower train.lr or train.clip and start anew"
            + (f"; {self.checkpoints} still holds {', '.join(kept)}" if kept else "")
            + "."
        )


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
