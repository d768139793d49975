"""The commands of `sinkroute`: a file each with a function `run(arguments, console)`, and a line each below.

A command's file is imported when it is called, and what it needs, torch first of all, when its options have been read:
so that `--help` and errors in a command line take no time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

__all__ = ["COMMANDS", "Command", "UsageError", "load"]


class UsageError(Exception):
    """A wrong command line."""


@dataclass(frozen=True)
class Command:
    """What the overview says of a command.

    Attributes:
        usage: the words that may follow its name.
        purpose: what it does.
        continues: its runs keep checkpoints, so that the same command continues them. (bench, which keeps what it has
            measured, says so itself.)
    """

    usage: str
    purpose: str
    continues: bool = False


COMMANDS = {
    "demo": Command("[CONFIG]", "SSR and its rivals side by side on Wikipedia text, in minutes", continues=True),
    "train": Command("CONFIG", "train, evaluate and attack one model; continues what was interrupted", continues=True),
    "compare": Command(
        "CONFIG", "methods × sizes × seeds in parallel, with intervals and paired tests", continues=True
    ),
    "watch": Command("RUN...", "follow training in the terminal, or with --serve as a page"),
    "evaluate": Command("RUN", "measure a run's last checkpoint"),
    "export": Command("RUN", "a run's model as a Hugging Face checkpoint"),
    "inspect": Command("MODEL --text FILE", "the expert load of a Hugging Face checkpoint on a text"),
    "models": Command("[NAME...]", "the training presets, with exact parameter counts"),
    "report": Command("RUN...", "a self-contained HTML page about runs"),
    "routers": Command("[NAME]", "the ways of routing; of one, its options with their defaults"),
    "bench": Command("", "what each router costs in time and memory, relative to plain top-k"),
}


def load(name: str) -> Callable[[list[str], Console], int]:
    """The function that runs the command of that name; it returns the exit code."""
    run: Callable[[list[str], Console], int] = importlib.import_module(f"sinkroute.commands.{name}").run
    return run
