"""`sinkroute train`: one model, evaluated and attacked at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

from sinkroute.commands import UsageError

__all__ = ["run"]


def run(arguments: list[str], console: Console) -> int:
    from sinkroute.lab.config import Config, RouterConfig, read_yaml
    from sinkroute.lab.presets import find_configuration
    from sinkroute.lab.settings import settings

    @settings()
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
    path = Path() if asks_help else find_configuration(arguments[0])
    preset = Config() if asks_help else read_yaml(Config, path)
    options, rest = _router_options(arguments if asks_help else arguments[1:])
    default = TrainCommand(**vars(preset))
    command = tyro.cli(TrainCommand, default=default, args=rest, prog="sinkroute train CONFIG")
    if command.router.name == preset.router.name:
        options = {**preset.router.options, **options}
    else:  # options and label of the preset belong to its own router
        if left_out := ", ".join(f"{name}={value}" for name, value in preset.router.options.items()):
            words = f"--router.name {command.router.name} leaves out {left_out}: options of {preset.router.name}"
            console.print(escape(words), highlight=False, soft_wrap=True)
        command.label = "" if command.label == preset.label else command.label
    command.router = RouterConfig(command.router.name, options)
    config = Config(**{name: value for name, value in vars(command).items() if name not in ("out", "fresh")})
    folder = Path(command.out or Path("runs") / path.stem)

    from sinkroute.lab.interrupt import Interrupted, stop_on_signal
    from sinkroute.lab.peers import join
    from sinkroute.lab.progress import Display
    from sinkroute.lab.run import execute
    from sinkroute.lab.tasks import load_data

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

    from sinkroute.lab.study.results import compare_runs
    from sinkroute.lab.study.runs import read_runs
    from sinkroute.lab.study.tables import print_results

    print_results(compare_runs(read_runs([folder])), console)
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
