"""One run from configuration to result: train, evaluate, attack, and write down what came out."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import sinkroute
from sinkroute._errors import NonFiniteLogits
from sinkroute.lab.config import Config, differences, to_mapping
from sinkroute.lab.engine import holds_a_part
from sinkroute.lab.evaluation import Evaluation
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.log import read_log
from sinkroute.lab.machine import machine
from sinkroute.lab.memory import keep_freed_memory, peak_memory_mb, reset_peak_memory
from sinkroute.lab.models import SparseModel, make_model
from sinkroute.lab.peers import Peers, join
from sinkroute.lab.run_folder import prepare_folder
from sinkroute.lab.tasks import Task, make_task
from sinkroute.lab.training import Diverged, Progress, train
from sinkroute.routing import Router, set_inference

__all__ = ["evaluate_split", "execute", "kind_of", "require_modes"]


def execute(
    config: Config,
    data: Any,
    folder: Path,
    *,
    fresh: bool = False,
    stop: StopRequest | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_status: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and evaluate into `folder`; a finished run is read, an unfinished one continued.

    `stop` is looked at after every step and every batch of the evaluation; `on_progress` is told of every line of the
    log, `on_status` how far the evaluation is.

    Returns:
        What `result.json` holds; on other than the main process nothing.

    Raises:
        ValueError: attacks or ways of serving that there are not; or as `prepare_folder` and `train`, which tell the
            rest.
    """
    peers = join(config.train.timeout_minutes, stop)
    with peers.guard():
        return _execute(config, data, folder, peers, fresh, stop, on_progress, on_status)


def _execute(
    config: Config,
    data: Any,
    folder: Path,
    peers: Peers,
    fresh: bool,
    stop: StopRequest | None,
    on_progress: Callable[[Progress], None] | None,
    on_status: Callable[[str], None] | None,
) -> dict[str, Any]:
    def make() -> Task:
        task = make_task(config, data)
        for name, attack in config.eval.attacks.items():
            task.check_attack(kind_of(name), attack)
        if config.eval.inference:
            with torch.device("meta"):
                require_modes(config, make_model(config).moe_layers[0].router)
        return task

    task = peers.each("preparing the run", make)
    _require_same(peers, config, data)
    result_file = folder / "result.json"

    def finished() -> dict[str, Any] | None:
        prepare_folder(config, data, folder, fresh)
        if not result_file.exists():
            return None
        try:
            return json.loads(result_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{result_file} is damaged ({error}); delete it and run the same command: training need not be repeated"
            ) from None

    if (result := peers.on_main("looking into the folder", finished)) is not None:
        return result
    keep_freed_memory()
    reset_peak_memory()
    load = os.getloadavg()[0]
    model = train(config, data, folder, stop=stop, on_progress=on_progress)
    if holds_a_part(model):
        evaluated = _evaluate_all(config, task, model, stop, on_status)
    elif peers.is_main:
        with peers.alone("evaluating"):
            evaluated = _evaluate_all(config, task, model, stop, on_status)
    if not peers.is_main:
        return {}
    # What wall times have to be read with: how many processes wanted a core when it began and ended.
    about = {"machine": {**machine(), "load_average": [load, os.getloadavg()[0]]}}
    result = {**_training_result(config, folder, task, model), **evaluated, **about}
    write_json(result, result_file)
    return result


def _require_same(peers: Peers, config: Config, data: Any) -> None:
    """Check that all processes were started alike: on another one's data or rates they would train in silence."""
    asked = to_mapping(config)
    del asked["data"]["path"]  # where the data lie is each machine's affair, but for what they are
    own = {"version": sinkroute.__version__, "data": f"{data.name}, SHA-256 {data.sha256}", "config": asked}
    found = peers.gather("comparing what was asked for", own)

    def compare() -> None:
        for rank, other in enumerate(found):
            if lines := differences(other, own):
                raise ValueError(
                    f"{peers.where(rank)} was started with something else than rank 0 (of it → of rank 0: "
                    f"{'; '.join(lines)}); start all processes with the same command, data and version"
                )

    peers.on_main("comparing what was asked for", compare)


def _evaluate_all(
    config: Config,
    task: Task,
    model: SparseModel,
    stop: StopRequest | None,
    on_status: Callable[[str], None] | None,
) -> dict[str, Any]:
    """What is measured when training is over; of a model in parts, by all processes together."""
    found = evaluate_split(model, task, "valid", stop=stop, on_status=on_status)
    others = {}
    for mode in config.eval.inference:
        set_inference(model, mode)
        others[mode] = evaluate_split(model, task, "valid", stop=stop, on_status=on_status)
    return {**found, "inference": others} if others else found


def _training_result(config: Config, folder: Path, task: Task, model: SparseModel) -> dict[str, Any]:
    """What was trained, and what the log says of it."""
    training = _training_summary(config, folder, config.train.batch * task.items_each)
    probability = getattr(model.moe_layers[0].router, "probability", None)
    return {
        "task": task.name,
        "metric": task.metric,
        "method": config.router.name,
        "label": config.label or config.router.name,
        "seed": config.seed,
        "steps": config.train.steps,
        "probability": probability if isinstance(probability, (int, float)) else None,  # a schedule is no number
        "sinkhorn_steps": training.pop("sinkhorn_steps"),
        "parameters": model.count_parameters()._asdict(),
        "train": {**training, "peak_memory_mb": peak_memory_mb()},
        **({} if config.data.switch_to is None else {"switch": _switch_summary(config, folder)}),
    }


def require_modes(config: Config, router: Router) -> None:
    """Ways of serving are for one family of routers: any other must not fail when it is trained.

    Raises:
        ValueError: the router serves in one way only, and others are asked for.
    """
    if not set(config.eval.inference) <= set(router.inference_modes):
        raise ValueError(
            f"eval.inference={list(config.eval.inference)} is for routers of the SSR family, and "
            f"{config.router.name!r} serves in one way only; leave eval.inference empty for it"
        )


def evaluate_split(
    model: SparseModel,
    task: Task,
    split: str,
    *,
    stop: StopRequest | None = None,
    on_status: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Clean and attacked quality on all of a split (`"valid"` or `"test"`), and the load when serving.

    Raises:
        Interrupted: `stop` turned true; nothing is kept of an evaluation.
    """

    def evaluate(name: str, attack: tuple[str, dict[str, Any]] | None) -> Evaluation:
        def watch(done: int, whole: int) -> None:
            if stop:
                raise Interrupted("stopped while it was evaluated; the same command continues")
            if on_status is not None:
                on_status(f"evaluating, {name}: {done / whole:.0%}")

        return task.evaluate(model, split, attack, watch)

    try:
        clean = evaluate("clean", None)
    except NonFiniteLogits as error:
        raise Diverged(f"the trained model is broken: {error}") from error
    attacked = {}
    for name, options in task.config.eval.attacks.items():
        attacked[name] = {**task.quality(evaluate(name, (kind_of(name), dict(options)))), **options}
    return {split: task.quality(clean), "attacked": attacked, "serving": clean.serving()}


def kind_of(attack: str) -> str:
    """The attack behind a key of `eval.attacks`.

    >>> kind_of("word-swap@5%"), kind_of("word-swap")
    ('word-swap', 'word-swap')
    """
    return attack.partition("@")[0]


def _training_summary(config: Config, folder: Path, tokens: int) -> dict[str, Any]:
    """Figures of the whole training from its log, so that they are right after a resume too."""
    lines, _ = read_log(folder / "log.jsonl")
    starts = [0, *(line["step"] for line in lines[:-1])]
    weights = {line["step"]: line["step"] - start for start, line in zip(starts, lines, strict=True)}
    late = [line for line in lines if line["step"] > 0.75 * config.train.steps]

    def late_mean(value: Callable[[dict[str, Any]], float]) -> float:
        """Over the steps of the last quarter: a line weighs as many steps as it covers."""
        return sum(weights[line["step"]] * value(line) for line in late) / sum(weights[line["step"]] for line in late)

    # The median line: the first pays for what happens once, and a machine that others use stalls now and then.
    seconds_per_token = statistics.median(1 / line["tokens_per_second"] for line in lines)
    dropped = sum(weights[line["step"]] * line.get("dropped", 0.0) for line in lines) / lines[-1]["step"]
    return {
        "seconds": lines[-1]["seconds"],
        "ms_per_step": 1e3 * tokens * seconds_per_token,
        "tokens_per_second": 1 / seconds_per_token,
        "max_vio": late_mean(lambda line: sum(line["max_vio"]) / len(line["max_vio"])),
        "loss": late_mean(lambda line: line["loss"]),
        "sinkhorn_steps": sum(line["sinkhorn_steps"] for line in lines),
        # Of all choices of the training; only a capacity drops any.
        **({"dropped": dropped} if "dropped" in lines[-1] else {}),
    }


# Balanced: MaxVio below this, on so many steps in a row. Where 512 tokens choose 2 of 16 experts evenly by chance,
# MaxVio is 0.22 on average.
BALANCED, IN_A_ROW = 0.5, 3
# The first steps on the other text.
EARLY = 100


def _switch_summary(config: Config, folder: Path) -> dict[str, Any]:
    """What the change of the text did, from the log: how long balance took, and how the first steps were.

    MaxVio of a step is of its whole batch, the mean over layers. `steps_to_balance` is the first step on the other
    text, counted from 1, that begins `IN_A_ROW` balanced ones; the number of all its steps, and `censored` 1, where
    there is no such step. `loss` (nats) and `max_vio` are means over the first `EARLY` steps.
    """
    steps = [line["each_step"] for line in read_log(folder / "log.jsonl")[0]]
    max_vio, loss = ([value for step in steps for value in step[name]] for name in ("max_vio", "loss"))
    max_vio, loss = max_vio[config.data.switch_at :], loss[config.data.switch_at :]
    found = steps_to_balance(max_vio)
    return {
        "steps_to_balance": len(max_vio) if found is None else found,
        "censored": int(found is None),  # a number, so that its mean over seeds is a share
        "loss": statistics.fmean(loss[:EARLY]),
        "max_vio": statistics.fmean(max_vio[:EARLY]),
    }


def steps_to_balance(max_vio: Sequence[float]) -> int | None:
    """The first step, counted from 1, that begins `IN_A_ROW` balanced ones; None: there is none.

    >>> steps_to_balance([1.4, 0.4, 0.6, 0.4, 0.3, 0.4, 0.9]), steps_to_balance([0.6, 0.4, 0.4])
    (4, None)
    """
    starts = range(len(max_vio) - IN_A_ROW + 1)
    return next((at + 1 for at in starts if max(max_vio[at : at + IN_A_ROW]) < BALANCED), None)
