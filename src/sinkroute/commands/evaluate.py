"""`sinkroute evaluate`: a run's last checkpoint on a split, on tasks, or on shifted images."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from sinkroute.commands import UsageError
from sinkroute.lab.folders import require_run

__all__ = ["run"]


@dataclass
class EvaluateCommand:
    """Evaluate the last checkpoint of a run on every byte of a split, clean and attacked, with the experts' load.

    With --lm-eval, on tasks of the lm-evaluation-harness instead, as the Hugging Face model that `export` writes; with
    --shifted, on ImageNet-A, -C, -O or -R.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder."""
    split: Literal["valid", "test"] = "valid"
    """Which part of the text."""
    inference: Literal["none", "noise", "sinkhorn", "both"] = "none"
    """What an SSR router does when serving: plain top-k, noisy top-k, the transport plan, or the plan with noise."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of the lm-evaluation-harness: names, or paths of YAML files."""
    shifted: tuple[str, str, str] | None = None
    """For a classifier of ImageNet: imagenet-a, -c, -o or -r; the folder of that set; and a list of the 1000 class ids,
    or ImageNet's own folder."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: list[str], console: Console) -> int:
    command = tyro.cli(EvaluateCommand, args=arguments, prog="sinkroute evaluate")
    if not command.lm_eval and any(word in ("--lm-eval", "--lm_eval") for word in arguments):
        raise UsageError("--lm-eval needs a TASK: sinkroute evaluate RUN --lm-eval TASK [TASK ...]")
    if command.lm_eval:
        return _evaluate_tasks(command, console)
    folder = Path(command.run)
    require_run(folder)

    from sinkroute.lab.files import write_json
    from sinkroute.lab.run import evaluate_split
    from sinkroute.lab.run_folder import check_data
    from sinkroute.lab.screen import Column, ScreenTable
    from sinkroute.lab.tasks import load_data, make_task
    from sinkroute.lab.trained import load_run
    from sinkroute.routing import set_inference

    run = load_run(folder)
    data = load_data(run.config)
    check_data(data, folder)
    set_inference(run.model, command.inference)
    if command.shifted:
        return _evaluate_shifted(command.shifted, run, data, command.json, console)
    evaluation = evaluate_split(run.model, make_task(run.config, data), command.split)
    found = {"checkpoint": run.checkpoint.name, "inference": command.inference, **evaluation}
    mode = "" if command.inference == "none" else f"-{command.inference}"
    write_json(found, folder / f"evaluation-{command.split}{mode}.json")
    if command.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    how = "" if command.inference == "none" else f", inference by {command.inference}"
    qualities = {"clean": found[command.split], **found["attacked"]}
    numbers = list(found[command.split])
    table = ScreenTable(
        [Column("evaluated", words=True), *(Column(number.replace("_", " ")) for number in numbers)],
        title=f"{folder} at {run.checkpoint.name}, {command.split} split{how}",
        elsewhere="--json",
    )
    for name, quality in qualities.items():
        # The first number is the count.
        shown = [f"{quality[key]:.4f}" for key in numbers[1:]]
        table.add(name, f"{quality[numbers[0]]:,}", *shown)
    console.print(table)
    load = found["serving"]
    console.print(
        f"Load when serving: MaxVio {load['max_vio']:.2f} (single batches {load['max_vio_batch']:.2f}), "
        f"entropy {load['entropy']:.3f}, CV {load['cv']:.2f}, dead experts {load['dead']} of {load['experts']}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _evaluate_shifted(shifted: tuple[str, str, str], run: Any, data: Any, as_json: bool, console: Console) -> int:
    from sinkroute.lab.config import VisionConfig
    from sinkroute.lab.screen import Column, ScreenTable
    from sinkroute.lab.tasks.shifted import evaluate_shifted

    name, path, wnids = shifted
    if not isinstance(run.config.model, VisionConfig) or run.config.model.classes != 1000:
        raise UsageError(f"--shifted is for classifiers of ImageNet-1K; {run.folder} is none")
    with console.status("") as status:
        found = evaluate_shifted(
            run.model,
            data,
            name,
            path,
            wnids,
            batch=run.config.eval.batch,
            workers=run.config.train.workers,
            on_status=lambda words: status.update(escape(words)),
        )
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    numbers = {key: value for key, value in found.items() if key != "errors"}
    numbers |= {corruption: sum(errors) / len(errors) for corruption, errors in found.get("errors", {}).items()}
    columns = [Column("measure", words=True), Column("value")]
    table = ScreenTable(columns, title=f"{run.folder} at {run.checkpoint.name}, {name}", elsewhere="--json")
    for key, value in numbers.items():
        table.add(key, f"{value:.3f}" if key == "aupr" else f"{value:.2f} %")
    console.print(table)
    return 0


def _evaluate_tasks(command: EvaluateCommand, console: Console) -> int:
    if command.split != "valid" or command.inference != "none":
        raise UsageError(
            "--lm-eval goes without --split and --inference: tasks bring their texts and are served plainly"
        )

    from sinkroute.commands.export import hide_progress_of_transformers
    from sinkroute.lab.lm_eval import evaluate_run, require_lm_eval
    from sinkroute.lab.screen import Column, ScreenTable
    from sinkroute.lab.trained import load_run

    require_lm_eval()
    require_run(Path(command.run))
    hide_progress_of_transformers()
    run = load_run(Path(command.run))
    found = evaluate_run(run, command.lm_eval)
    if command.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    columns = [Column("task", words=True), Column("metric", matters=2, words=True), Column("value", matters=2)]
    columns += [Column("± standard error", matters=1), Column("samples")]
    title = f"{run.folder} at {run.checkpoint.name}, lm-evaluation-harness"
    table = ScreenTable(columns, title=title, elsewhere="--json")
    for task, result in found.items():
        for name, metric in result["metrics"].items():
            error = "" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
            table.add(task, name, f"{metric['value']:.4f}", error, str(result["samples"] or ""))
    console.print(table)
    return 0
