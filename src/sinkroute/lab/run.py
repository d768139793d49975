"""One run from configuration to result: train, evaluate, attack, and write down what came out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from sinkroute._errors import NonFiniteScores
from sinkroute.lab.attacks import attack_text
from sinkroute.lab.config import Config
from sinkroute.lab.data import Corpus
from sinkroute.lab.evaluation import Evaluation, evaluate_text
from sinkroute.lab.files import write_json
from sinkroute.lab.interrupt import Interrupted, StopRequest
from sinkroute.lab.memory import peak_memory_mb, reset_peak_memory
from sinkroute.lab.model import Decoder
from sinkroute.lab.training import Diverged, Progress, prepare_folder, train

__all__ = ["evaluate_split", "execute"]


def execute(
    config: Config,
    corpus: Corpus,
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
        As `prepare_folder` and `train`.
    """
    for name, attack in config.eval.attacks.items():
        # On any text, now: a misspelt attack must not wait for the end of training.
        attack_text(name, b"a word", seed=config.seed, **attack)
    processes = PartialState(cpu=not torch.accelerator.is_available())
    if processes.is_main_process:
        prepare_folder(config, corpus, folder, fresh)
    processes.wait_for_everyone()
    result_file = folder / "result.json"
    if result_file.exists():
        try:
            return json.loads(result_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{result_file} is damaged ({error}); delete it and run the same command: training need not be repeated"
            ) from None
    reset_peak_memory()
    model = train(config, corpus, folder, stop=stop, on_progress=on_progress)
    if not processes.is_main_process:
        return {}
    training = _training_summary(config, folder)
    probability = getattr(model.moe_layers[0].router, "probability", None)
    result = {
        "method": config.router.name,
        "label": config.label or config.router.name,
        "seed": config.seed,
        "steps": config.train.steps,
        "probability": probability if isinstance(probability, (int, float)) else None,  # a schedule is no number
        "sinkhorn_steps": training.pop("sinkhorn_steps"),
        "parameters": model.count_parameters()._asdict(),
        "train": {**training, "peak_memory_mb": peak_memory_mb()},
        **evaluate_split(model, config, corpus, "valid", stop=stop, on_status=on_status),
    }
    write_json(result, result_file)
    return result


def evaluate_split(
    model: Decoder,
    config: Config,
    corpus: Corpus,
    split: str,
    *,
    stop: StopRequest | None = None,
    on_status: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Clean and attacked quality on every byte of a split (`"valid"` or `"test"`), and the load when serving.

    Raises:
        Interrupted: `stop` turned true; nothing is kept of an evaluation.
    """
    text = getattr(corpus, split)
    before = int((corpus.train if split == "valid" else corpus.valid)[-1])

    def evaluate(name: str, data: np.ndarray) -> Evaluation:
        def watch(done: int, windows: int) -> None:
            if stop:
                raise Interrupted("stopped while it was evaluated; the same command continues")
            if on_status is not None:
                on_status(f"evaluating {name} text: {done / windows:.0%}")

        return evaluate_text(
            model, data, length=config.data.length, batch=config.eval.batch, before=before, on_batch=watch
        )

    try:
        clean = evaluate("clean", text)
    except NonFiniteScores as error:
        raise Diverged(f"the trained model is broken: {error}") from error
    attacked = {}
    for name, options in config.eval.attacks.items():
        found = evaluate(name, attack_text(name, text, seed=config.seed, **options))
        attacked[name] = {**_quality(found), **options}
    return {split: _quality(clean), "attacked": attacked, "serving": clean.serving()}


def _quality(found: Evaluation) -> dict[str, float]:
    return {"bytes": found.bytes, "bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}


def _training_summary(config: Config, folder: Path) -> dict[str, Any]:
    """Figures of the whole training from its log, so that they are right after a resume too."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    starts = [0, *(line["step"] for line in lines[:-1])]
    weights = {line["step"]: line["step"] - start for start, line in zip(starts, lines, strict=True)}
    late = [line for line in lines if line["step"] > 0.75 * config.train.steps]

    def late_mean(value: Callable[[dict[str, Any]], float]) -> float:
        """Over the steps of the last quarter: a line weighs as many steps as it covers."""
        return sum(weights[line["step"]] * value(line) for line in late) / sum(weights[line["step"]] for line in late)

    tokens = config.train.batch * config.data.length
    # The median line: the first pays for what happens once, and a machine that others use stalls now and then.
    seconds_per_token = statistics.median(1 / line["tokens_per_second"] for line in lines)
    return {
        "seconds": lines[-1]["seconds"],
        "ms_per_step": 1e3 * tokens * seconds_per_token,
        "tokens_per_second": 1 / seconds_per_token,
        "max_vio": late_mean(lambda line: sum(line["max_vio"]) / len(line["max_vio"])),
        "bits_per_byte": late_mean(lambda line: line["loss"]) / math.log(2),
        "sinkhorn_steps": sum(line["sinkhorn_steps"] for line in lines),
    }
