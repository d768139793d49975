"""Exported models under EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The harness is given the model and the tokenizer as objects and looks nothing up. A newline stands before each text, as
in the lab's own evaluation, and its windows are those that the model was trained on: for a text of whole windows
`bits_per_byte` is that of `evaluate_text`. (The last window of another text it fills with what stands before, where the
lab's is short.)
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkroute._errors import SinkrouteError
from sinkroute.lab.export import export_run
from sinkroute.lab.export.tokenizer import NEWLINE
from sinkroute.lab.files import write_json
from sinkroute.lab.trained import TrainedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TaskError", "evaluate_run", "evaluate_tasks", "require_lm_eval"]

_RESAMPLES = 1000  # for the errors of metrics that are no means; the harness's 100,000 take minutes


class TaskError(SinkrouteError):
    """A task that lm-evaluation-harness does not know, cannot read or cannot run; the message says why."""


def require_lm_eval() -> None:
    """Check that the harness is installed, before anything long is done for it.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            '--lm-eval needs the lm-evaluation-harness, which is not installed; pip install "sinkroute[eval]"'
        )


def evaluate_run(run: TrainedRun, tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run tasks with a run's model as it is exported, and write `evaluation-lm-eval-TASK.json` into its folder.

    Returns:
        As `evaluate_tasks`, with the run's checkpoint.

    Raises:
        As `export_run` and `evaluate_tasks`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="sinkroute-") as folder:
        export_run(run, Path(folder, "model"))
        model = AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder, "model"))
    found = {
        task: {"checkpoint": run.checkpoint.name, **result}
        for task, result in evaluate_tasks(model, tokenizer, tasks, batch=run.config.eval.batch).items()
    }
    for task, result in found.items():
        name = re.sub(r"[^\w.-]", "-", task)
        write_json({"task": task, **result}, run.folder / f"evaluation-lm-eval-{name}.json")
    return found


def evaluate_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, batch: int
) -> dict[str, dict[str, Any]]:
    """Run tasks of the harness.

    Args:
        model: an exported model; `config.max_position_embeddings` is the length of its windows.
        tokenizer: that was exported with it.
        tasks: names that the harness knows, or paths of YAML files; groups and tags give several results. Nothing is
            downloaded unless a task says so.
        batch: texts in a forward pass.

    Returns:
        task → `{"metrics": {name: {"value": x, "stderr": x or None}}, "samples": n, "version": of the task,
        "lm_eval": ..., "transformers": ...}`.

    Raises:
        ModuleNotFoundError: the harness is not installed.
        FileNotFoundError: a path where nothing is.
        TaskError: an unknown name, a file that is no task, data that cannot be loaded, a task that does not run.
    """
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        # To find names takes seconds: all files of the harness are read.
        manager = TaskManager(include_defaults=not all(_is_path(task) for task in tasks))
        loaded = [part for task in tasks for part in _load(manager, task)]
        # What ends a generation is a text to the harness, and the model has none.
        tokenizer.eos_token = tokenizer.pad_token
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch,
            max_length=model.config.max_position_embeddings,
            prefix_token_id=NEWLINE,
        )
        try:
            found = simple_evaluate(
                wrapped,
                tasks=loaded,
                task_manager=manager,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                # The generators of this process are nobody else's to seed; few-shot examples have their own.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except Exception as error:
            # What a task's functions and metrics raise can be anything.
            raise TaskError(f"lm-eval cannot run {', '.join(tasks)}: {_words(error)}") from error
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers")}
    return {
        task: {
            "metrics": _metrics(values),
            "samples": found["n-samples"].get(task, {}).get("effective"),
            "version": found["versions"].get(task),
            **versions,
        }
        for task, values in found["results"].items()
    }


def _is_path(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) or os.sep in task


def _load(manager: Any, task: str) -> list[Any]:
    """The tasks or groups of one name or file."""
    if _is_path(task) and not Path(task).is_file():
        raise FileNotFoundError(f"no task file at {task}; pass a YAML file, or a name that lm-eval knows")
    if not _is_path(task) and task not in manager.task_index:
        near = difflib.get_close_matches(task, manager.all_tasks, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise TaskError(f"unknown task {task!r}{hint} `lm-eval ls tasks` lists all; a file ends in .yaml")
    try:
        found = manager.load([task])
    except Exception as error:
        raise TaskError(f"{task} is no task that lm-eval can load: {_words(error)}") from error
    inside = {child for children in found.get("group_map", {}).values() for child in children}
    both = {**found.get("groups", {}), **found["tasks"]}
    return [part for name, part in both.items() if name not in inside]


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's keys are "acc,none" and "acc_stderr,none"; what stands behind the comma is kept where it is a name.

    >>> _metrics({"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 2, "ppl_stderr,none": "N/A"})
    {'acc': {'value': 0.5, 'stderr': 0.1}, 'ppl': {'value': 2.0, 'stderr': None}}
    """
    metrics = {}
    for key, value in values.items():
        name, comma, which = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = values.get(f"{name}_stderr,{which}")
        shown = name if which == "none" else f"{name} ({which})"
        metrics[shown] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return metrics


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells a lot of itself; errors it raises."""
    names = ("lm_eval", "transformers.tokenization_utils_base", "datasets")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
