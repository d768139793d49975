"""The command line: `sinkroute COMMAND`, of `sinkroute.commands`.

Exit codes: 0 done, 1 an error that the message explains, 2 a wrong command line, 130 stopped by Ctrl-C or SIGTERM, 141
nobody reads the output any more.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sinkroute._errors import SinkrouteError, install_command
from sinkroute.commands import COMMANDS, UsageError, load

__all__ = ["main"]

# How long a thread of OpenMP spins for the others before it sleeps. The default is so long that training of a small
# model all but stops when another program wants a core; with this it only slows down, and on an idle machine nothing
# changes. It must be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Of several processes, each is told in words when another one is gone. torch would say it too, in frames of C++.
if int(os.environ.get("WORLD_SIZE") or 1) > 1:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Errors that explain themselves. (What is heavy, Accelerate or matplotlib, is imported by the command that needs it.)
EXPECTED_ERRORS = (SinkrouteError, ValueError, TypeError, OSError, ModuleNotFoundError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Of several processes (torchrun, accelerate launch) one speaks.
    console, errors = Console(quiet=os.environ.get("RANK", "0") != "0"), Console(stderr=True)
    command, rest = words[0] if words else "", words[1:]
    try:
        if command in ("", "-h", "--help", "help"):
            _print_overview(console)
            return 0 if words else 2
        if command == "--version":
            import sinkroute

            console.print(f"sinkroute {sinkroute.__version__}", highlight=False)
            return 0
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            raise UsageError(f"unknown command {command!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return load(command)(rest, console)
    except UsageError as error:
        known = f" {command}" if command in COMMANDS else ""
        told = f"[red]error:[/] {escape(str(error))}\nTry: sinkroute{known} --help"
        errors.print(told, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        cure = " The same command continues from the last checkpoint." if COMMANDS[command].continues else ""
        errors.print(f"[yellow]Interrupted.[/]{cure}", soft_wrap=True)
        return 130
    except BrokenPipeError:
        # Who read the output, such as head, has seen enough. What Python still holds of it must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
        extras = (*(["inspect"] if command == "inspect" else []), "lab", "track", "sweep", "eval")
        return f"the package {error.name!r} is missing: {install_command(error.name.split('.')[0], *extras)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        cure = ", and the same command continues from the last checkpoint" if COMMANDS[command].continues else ""
        return f"the disk is full ({error}); free some space{cure}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


def _print_overview(console: Console) -> None:
    console.print(
        "[bold]sinkroute[/]: balanced mixture-of-experts routing, without auxiliary losses\n", highlight=False
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, command in COMMANDS.items():
        table.add_row(f"[bold]sinkroute {name}[/] {escape(command.usage)}", command.purpose)
    console.print(table)
    console.print("\nsinkroute COMMAND --help tells all options. sinkroute --version", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
