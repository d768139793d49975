"""The command line: `sinkroute demo | train | evaluate | compare | export | inspect | models | report | bench`.

Exit codes: 0 done, 1 an error that the message explains, 2 a wrong command line, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import difflib
import errno
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sinkroute._errors import SinkrouteError

if TYPE_CHECKING:
    from sinkroute.lab.inspect import Audit

__all__ = ["main"]

# How long a thread of OpenMP spins for the others before it sleeps. The default is so long that training of a small
# model all but stops when another program wants a core; with this it only slows down, and on an idle machine nothing
# changes. It must be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Of several processes, each is told in words when another one is gone. torch would say it too, in frames of C++.
if int(os.environ.get("WORLD_SIZE") or 1) > 1:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Their runs keep checkpoints; the others start over. (bench, which keeps what it has measured, says so itself.)
CONTINUED = ("demo", "train", "compare")

# Errors that explain themselves. (What is heavy, Accelerate or matplotlib, is imported by the command that needs it.)
EXPECTED_ERRORS = (SinkrouteError, ValueError, TypeError, OSError, ModuleNotFoundError)


class UsageError(Exception):
    """A wrong command line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Of several processes (torchrun, accelerate launch) one speaks.
    console, errors = Console(quiet=os.environ.get("RANK", "0") != "0"), Console(stderr=True)
    if not words or words[0] in ("-h", "--help", "help"):
        _print_overview(console)
        return 0 if words else 2
    if words[0] == "--version":
        import sinkroute

        console.print(f"sinkroute {sinkroute.__version__}", highlight=False)
        return 0
    command, rest = words[0], words[1:]
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            raise UsageError(f"unknown command {command!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return COMMANDS[command][0](rest, console)
    except UsageError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}\nTry: sinkroute --help", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        cure = " The same command continues from the last checkpoint." if command in CONTINUED else ""
        errors.print(f"[yellow]Interrupted.[/]{cure}", soft_wrap=True)
        return 130
    except EXPECTED_ERRORS as error:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            # torchrun asks the rest to stop as soon as one has ended: they are about to, and say why first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ.get("SINKROUTE_TRACEBACK"):
            raise
        errors.print(f"[red]error:[/] {escape(_words(error, command))}", highlight=False, soft_wrap=True)
        errors.print("[dim](SINKROUTE_TRACEBACK=1 shows where)[/]", highlight=False)
        return 1


def _words(error: BaseException, command: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("sinkroute"):
        return f'the package {error.name!r} is missing; install what the lab needs: pip install "sinkroute[lab]"'
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        cure = ", and the same command continues from the last checkpoint" if command in CONTINUED else ""
        return f"the disk is full ({error}); free some space{cure}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _print_overview(console: Console) -> None:
    console.print(
        "[bold]sinkroute[/]: balanced mixture-of-experts routing, without auxiliary losses\n", highlight=False
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, (_, usage, purpose) in COMMANDS.items():
        table.add_row(f"[bold]sinkroute {name}[/] {escape(usage)}", purpose)
    console.print(table)
    console.print("\nsinkroute COMMAND --help tells all options. sinkroute --version", highlight=False)


# -- demo ----------------------------------------------------------------------------------------------------------


def _demo(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.config import find_preset, read_yaml
    from sinkroute.lab.study.demo import DemoConfig, run_demo

    # Another comparison of the same kind may stand first: a preset or a YAML file with `methods`.
    named = bool(arguments) and not arguments[0].startswith("-")
    preset = read_yaml(DemoConfig, find_preset(arguments[0] if named else "demo"))
    options = arguments[1:] if named else arguments
    return run_demo(tyro.cli(DemoConfig, default=preset, args=options, prog="sinkroute demo"), console)


# -- train ---------------------------------------------------------------------------------------------------------


def _train(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.config import Config, find_preset, read_yaml
    from sinkroute.lab.display import Display
    from sinkroute.lab.interrupt import Interrupted, stop_on_signal
    from sinkroute.lab.peers import join
    from sinkroute.lab.run import execute
    from sinkroute.lab.study import read_runs, result_table
    from sinkroute.lab.tasks import load_data

    @dataclass
    class TrainCommand(Config):
        """Train one model, evaluate and attack it. CONFIG is a YAML file or a preset; every value can be overridden.

        An interrupted or killed run is continued by the same command, with the same numbers.
        """

        out: str | None = None
        """The run's folder; by default runs/ and the name of CONFIG."""
        fresh: bool = False
        """Delete an earlier run in that folder."""

    asks_help = bool(arguments) and arguments[0] in ("-h", "--help")
    if not arguments or (arguments[0].startswith("-") and not asks_help):
        raise UsageError("train needs a CONFIG: sinkroute train CONFIG [--train.lr 1e-3 ...]")
    path = find_preset(arguments[0])
    preset = Config() if asks_help else read_yaml(Config, path)
    options, rest = _router_options(arguments if asks_help else arguments[1:])
    default = TrainCommand(**vars(preset))
    command = tyro.cli(TrainCommand, default=default, args=rest, prog="sinkroute train CONFIG")
    if command.router.name == preset.router.name:
        command.router.options = {**preset.router.options, **options}
    else:  # options and label of the preset belong to its own router
        command.router.options = options
        command.label = "" if command.label == preset.label else command.label
    config = Config(**{name: value for name, value in vars(command).items() if name not in ("out", "fresh")})
    folder = Path(command.out or Path("runs") / path.stem)
    try:
        with stop_on_signal() as stop, Display(console) as display:
            peers = join(config.train.timeout_minutes, stop)
            with peers.guard():
                data = peers.each("reading the data", lambda: load_data(config))
            display.begin(config.label or config.router.name, config.train.steps)
            execute(
                config,
                data,
                folder,
                fresh=command.fresh,
                stop=stop,
                on_progress=display.update,
                on_status=display.status,
            )
            display.note("done", done=True)
    except Interrupted as error:
        console.print(f"[yellow]Interrupted[/]: {escape(str(error))}.", highlight=False)
        return 130
    if console.quiet:
        return 0
    console.print(result_table(read_runs([folder])))
    shown = escape(str(folder))
    console.print(f"Run: [bold]{shown}[/]; a report of it: sinkroute report {shown}", highlight=False, soft_wrap=True)
    return 0


def _router_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Take `--router.options.NAME VALUE` out of a command line: which names there are depends on the router."""
    from sinkroute.lab.config import parse_scalar

    prefix, options, rest = "--router.options.", {}, []
    words = iter(arguments)
    for word in words:
        if not word.startswith(prefix):
            rest.append(word)
            continue
        name, equals, value = word.removeprefix(prefix).partition("=")
        if not equals:
            value = next(words, "")
        if not name or not value or value.startswith("--"):
            raise UsageError(f"{word} needs a value: {prefix}probability 0.01")
        options[name.replace("-", "_")] = parse_scalar(value)
    return options, rest


# -- evaluate ------------------------------------------------------------------------------------------------------


@dataclass
class EvaluateCommand:
    """Evaluate the last checkpoint of a run on every byte of a split, clean and attacked, with the experts' load.

    With --lm-eval, on tasks of the lm-evaluation-harness instead, as the Hugging Face model that `export` writes; with
    --shifted, on ImageNet-A, -C, -O or -R.
    """

    run: tyro.conf.Positional[str]
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


def _evaluate(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.files import write_json
    from sinkroute.lab.run import evaluate_split
    from sinkroute.lab.tasks import load_data, make_task
    from sinkroute.lab.trained import load_run
    from sinkroute.lab.training import check_data
    from sinkroute.routing import set_inference

    command = tyro.cli(EvaluateCommand, args=arguments, prog="sinkroute evaluate")
    if not command.lm_eval and any(word in ("--lm-eval", "--lm_eval") for word in arguments):
        raise UsageError("--lm-eval needs a TASK: sinkroute evaluate RUN --lm-eval TASK [TASK ...]")
    if command.lm_eval:
        return _evaluate_tasks(command, console)
    folder = Path(command.run)
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
    table = Table(title=f"{escape(str(folder))} at {run.checkpoint.name}, {command.split} split{how}")
    qualities = {"clean": found[command.split], **found["attacked"]}
    numbers = list(found[command.split])
    for column in ("evaluated", *numbers):
        table.add_column(column.replace("_", " "), justify="left" if column == "evaluated" else "right")
    for name, quality in qualities.items():
        # The first number is the count.
        shown = [f"{quality[key]:.4f}" for key in numbers[1:]]
        table.add_row(escape(name), f"{quality[numbers[0]]:,}", *shown)
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
    table = Table(title=f"{escape(str(run.folder))} at {run.checkpoint.name}, {escape(name)}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for key, value in numbers.items():
        table.add_row(escape(key), f"{value:.3f}" if key == "aupr" else f"{value:.2f} %")
    console.print(table)
    return 0


def _evaluate_tasks(command: EvaluateCommand, console: Console) -> int:
    from sinkroute.lab.lm_eval import evaluate_run, require_lm_eval
    from sinkroute.lab.trained import load_run

    if command.split != "valid" or command.inference != "none":
        raise UsageError(
            "--lm-eval goes without --split and --inference: tasks bring their texts and are served plainly"
        )
    require_lm_eval()
    _hide_progress_of_transformers()
    run = load_run(Path(command.run))
    found = evaluate_run(run, command.lm_eval)
    if command.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    table = Table(title=f"{escape(str(run.folder))} at {run.checkpoint.name}, lm-evaluation-harness")
    for column in ("task", "metric", "value", "± standard error", "samples"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", overflow="fold")
    for task, result in found.items():
        for name, metric in result["metrics"].items():
            error = "" if metric["stderr"] is None else f"{metric['stderr']:.4f}"
            table.add_row(escape(task), escape(name), f"{metric['value']:.4f}", error, str(result["samples"] or ""))
    console.print(table)
    return 0


# -- export --------------------------------------------------------------------------------------------------------


@dataclass
class ExportCommand:
    """Write the model of a run's last checkpoint as a Hugging Face checkpoint that transformers loads without our code.

    Models that no architecture of transformers computes are refused, with the reason.
    """

    run: tyro.conf.Positional[str]
    """The run's folder."""
    output: str
    """The folder to write: new, empty, or an earlier export, which is replaced."""


def _export(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.export import export_run
    from sinkroute.lab.trained import load_run

    command = tyro.cli(ExportCommand, args=arguments, prog="sinkroute export")
    _hide_progress_of_transformers()
    export = export_run(load_run(Path(command.run)), Path(command.output))
    agreement = export.agreement
    console.print(
        f"[bold]{escape(str(export.folder))}[/]: {export.architecture} of {export.checkpoint}. "
        f"Against the lab's model, on {agreement.symbols:,} random bytes: "
        f"logits differ by {agreement.logit_difference:.1e} at most (of {agreement.logit_size:.1f}), "
        f"the same experts are chosen at {agreement.same_experts:.2%}, "
        f"the same next byte is best at {agreement.same_best:.2%}.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _hide_progress_of_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files: over in a moment


# -- inspect -------------------------------------------------------------------------------------------------------


@dataclass
class InspectCommand:
    """Audit the expert load of a Hugging Face checkpoint on a text: who is overloaded, who is dead, what balance costs.

    Nothing is trained or changed. Weights are read from safetensors, and no code of the checkpoint's is run.
    """

    model: tyro.conf.Positional[str]
    """The checkpoint's folder, or its id on the Hugging Face hub, from where it is then downloaded."""
    text: str | None = None
    """A text in UTF-8; its head is used. A run of `sinkroute train` on images takes no text: its validation images."""
    tokens: int = 16384
    """At most so many tokens of the text, cut down to whole windows; of images, to whole images."""
    length: int | None = None
    """Tokens in a window; by default 512, or as many positions as the model has where they are fewer."""
    batch: int | None = None
    """Windows in a batch, over which the balanced alternatives are balanced; by default 8. Of images: as many as in the
    run's training."""
    by_layer: bool = False
    """For models that are larger than the memory: read one layer at a time. The hidden states of all windows are kept,
    tokens x width numbers; --tokens bounds them."""
    output: str | None = None
    """A folder for inspect.html, a self-contained page with a heat map, tokens.html, which shows every token with its
    experts, and inspect.json."""
    viewer_tokens: int = 4096
    """At most so many tokens on tokens.html; 0 for no such page."""
    against: str | None = None
    """Another checkpoint, which is then inspected on the same text and stands beside the first on tokens.html."""
    json: str | None = None
    """Write the JSON here."""


def _inspect(arguments: list[str], console: Console) -> int:
    # Compiled products that oneDNN remembers, one for each number of tokens that an expert may get: of 1024 some
    # hundred MB come together. To be set before torch is loaded.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    from sinkroute.lab.files import write_json
    from sinkroute.lab.inspect import is_run, write_page, write_viewer
    from sinkroute.lab.inspect.loading import load_config

    command = tyro.cli(InspectCommand, args=arguments, prog="sinkroute inspect")
    # What cannot be written should not be found out after an hour.
    targets = []
    if command.json:
        targets.append(Path(command.json))
        if targets[0].is_dir() or not os.access(targets[0].parent, os.W_OK):
            raise UsageError(f"--json {command.json} cannot be written: it needs a file in a folder that is there")
    if command.output:
        folder = Path(command.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output {folder} cannot be made a folder: {error.strerror}") from error
        targets.append(folder / "inspect.json")
    if command.against and not is_run(command.against):
        load_config(command.against)  # nor that it is not there
    audits = [_inspected(model, command, console) for model in (command.model, command.against) if model]
    first, *others = audits
    for path in targets:
        write_json(first.json() | ({"against": others[0].json()} if others else {}), path)
    if command.output:
        pages = ["inspect.html", "against.html"][: len(audits)]
        viewer = "tokens.html" if command.viewer_tokens else None
        for audit, page in zip(audits, pages, strict=True):
            write_page(audit, folder / page, viewer=viewer)
        if viewer:
            write_viewer(audits, folder / viewer)
            pages.append(viewer)
        told = ", ".join(str(folder / page) for page in pages)
        console.print(f"Page{'s' * (len(pages) > 1)}: {told}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _inspected(model: str, command: InspectCommand, console: Console) -> Audit:
    """Inspect one checkpoint and print what was found."""
    from rich.progress import Progress

    from sinkroute.lab.inspect import audit_table, facts, inspect_checkpoint, inspect_images, is_run, summary

    gc.collect()  # modules hold each other: without, the checkpoint before would still be in memory
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        shared: dict[str, Any] = {
            "tokens": command.tokens,
            "viewer_tokens": command.viewer_tokens if command.output else 0,
            "on_progress": lambda done, total: bars.update(task, completed=done, total=total),
        }
        if is_run(model):
            given = {"--text": command.text, "--length": command.length, "--by-layer": command.by_layer or None}
            for option, value in given.items():
                if value is not None:
                    raise UsageError(
                        f"{option} is of checkpoints and texts, and {model} is a run of the lab's, which is inspected "
                        f"on its images; leave {option} out (a run on text: sinkroute export it first)"
                    )
            audit = inspect_images(model, batch=command.batch, **shared)
        elif command.text is None:
            raise UsageError(f"--text is missing: inspect runs a text through {model}; --text FILE")
        else:
            audit = inspect_checkpoint(
                model,
                command.text,
                length=command.length,
                batch=8 if command.batch is None else command.batch,
                by_layer=command.by_layer,
                on_status=lambda words: bars.update(task, description=words),
                **shared,
            )
    console.print(audit_table(audit))
    for sentence in (*summary(audit), "", *facts(audit)):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return audit


# -- models --------------------------------------------------------------------------------------------------------


@dataclass
class ModelsCommand:
    """List the training presets: what each trains, on what and how long, with exact parameter counts.

    Nothing is trained: models are built on the meta device, without memory.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = field(default_factory=tuple)
    """Presets or YAML files; by default all presets."""
    json: bool = False
    """Print JSON instead of a table."""


def _models(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.models.listing import list_models, model_table

    command = tyro.cli(ModelsCommand, args=arguments, prog="sinkroute models")
    models = list_models(command.names)
    if command.json:
        sys.stdout.write(json.dumps([model.json() for model in models], indent=1) + "\n")
    else:
        console.print(model_table(models, console.width))
    return 0


# -- report --------------------------------------------------------------------------------------------------------


@dataclass
class ReportCommand:
    """Write one self-contained HTML page about runs, finished or not, and print their table."""

    runs: tyro.conf.Positional[tuple[str, ...]] = field(default_factory=tuple)
    """Folders of runs, or folders that hold such folders."""
    out: str | None = None
    """The page; by default report.html in the first folder."""
    picture: str | None = None
    """Also write the summary picture here (.png or .svg)."""
    title: Annotated[str, tyro.conf.arg(help="Heading of the page.")] = "sinkroute report"


def _report(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.study import read_runs, result_table, write_picture, write_report

    command = tyro.cli(ReportCommand, args=arguments, prog="sinkroute report")
    if not command.runs:
        raise UsageError("report needs a RUN: sinkroute report runs/demo")
    runs = read_runs(command.runs)
    console.print(result_table(runs))
    out = Path(command.out) if command.out else Path(command.runs[0]) / "report.html"
    write_report(runs, out, title=command.title)
    console.print(f"Report: [bold]{escape(str(out))}[/]", highlight=False, soft_wrap=True)
    if command.picture:
        write_picture(runs, Path(command.picture))
        console.print(f"Picture: [bold]{escape(command.picture)}[/]", highlight=False, soft_wrap=True)
    return 0


# -- bench ---------------------------------------------------------------------------------------------------------


def _bench(arguments: list[str], console: Console) -> int:
    # torch's count of memory warns of tensors that it did not see made. To be set before torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sinkroute.lab.bench import Bench, run_bench

    return run_bench(tyro.cli(Bench, args=arguments, prog="sinkroute bench"), console)


# -- compare -------------------------------------------------------------------------------------------------------


def _compare(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.study.run import CompareCommand, run_compare

    return run_compare(tyro.cli(CompareCommand, args=arguments, prog="sinkroute compare"), console)


# -- routers -------------------------------------------------------------------------------------------------------


@dataclass
class RoutersCommand:
    """The ways of routing, or what one of them can be told."""

    name: tyro.conf.Positional[str | None] = None
    """A router: its options, with their defaults and what they mean."""


def _routers(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.overview import overview
    from sinkroute.routing.options import described
    from sinkroute.routing.registry import router_class

    command = tyro.cli(RoutersCommand, args=arguments, prog="sinkroute routers")
    if command.name is None:
        console.print(overview(console.width), highlight=False, markup=False, soft_wrap=True)
        return 0
    table = Table(show_lines=True)
    for column in ("option", "default", "what it means"):
        table.add_column(column, overflow="fold")
    for option in described(router_class(command.name).Options):
        named = f"{escape(option.name)}\n[dim]{escape(option.kind)}[/]"
        table.add_row(named, escape(option.default), escape(option.about))
    console.print(table)
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str], Console], int], str, str]] = {
    "demo": (_demo, "[CONFIG]", "SSR and its rivals side by side on Wikipedia text, in minutes"),
    "train": (_train, "CONFIG", "train, evaluate and attack one model; continues what was interrupted"),
    "compare": (_compare, "CONFIG", "methods × sizes × seeds in parallel, with intervals and paired tests"),
    "evaluate": (_evaluate, "RUN", "measure a run's last checkpoint"),
    "export": (_export, "RUN", "a run's model as a Hugging Face checkpoint"),
    "inspect": (_inspect, "MODEL --text FILE", "the expert load of a Hugging Face checkpoint on a text"),
    "models": (_models, "[NAME...]", "the training presets, with exact parameter counts"),
    "report": (_report, "RUN...", "a self-contained HTML page about runs"),
    "routers": (_routers, "[NAME]", "the ways of routing; of one, its options with their defaults"),
    "bench": (_bench, "", "what each router costs in time and memory, relative to plain top-k"),
}

if __name__ == "__main__":
    sys.exit(main())
