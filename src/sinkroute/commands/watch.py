"""`sinkroute watch`: runs while they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from sinkroute.commands import UsageError

__all__ = ["run"]

PORT = 8642  # of --serve without a number, if it is free


@dataclass
class WatchCommand:
    """Follow training while it runs: loss, balance, the load of each expert, plans, speed and the time left.

    A RUN is a folder that `train`, `demo` or `compare` writes, also before it is there, or the log file that a
    LoadMonitor writes in your own trainer. Into a pipe goes a line for each new line of the logs. Ctrl-C ends the
    watch, not the runs.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")] = ()
    """Folders of runs, folders that hold such folders, or .jsonl files."""
    serve: int | None = None
    """Show a page that follows, on this machine's loopback address (http://127.0.0.1) alone, at this port; --serve
    without a number takes 8642, or any that is free."""
    once: bool = False
    """Show what there is, and end."""


def run(arguments: list[str], console: Console) -> int:
    words = list(arguments)
    any_port = False
    if "--serve" in words:  # a number may follow
        after = words.index("--serve") + 1
        any_port = after == len(words) or not words[after].isdecimal()
        if any_port:
            words.insert(after, str(PORT))
    command = tyro.cli(WatchCommand, args=words, prog="sinkroute watch")
    if not command.runs:
        raise UsageError("watch needs a RUN: sinkroute watch runs/demo")
    if command.serve is not None and command.once:
        raise UsageError("--serve shows a page that follows, and --once ends at once; take one of them")
    if command.serve is not None and not 0 <= command.serve < 2**16:
        raise UsageError(f"--serve must be a port from 0 to 65535, got {command.serve}")

    from sinkroute.lab.watch.follow import Follower
    from sinkroute.lab.watch.terminal import watch

    follower = Follower(command.runs)
    try:
        if command.serve is None:
            watch(follower, console, once=command.once)
            return 0
        from sinkroute.lab.watch.serve import make_server

        with make_server(follower, command.serve, or_any=any_port) as server:
            console.print(
                f"Page: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it, not the runs)", soft_wrap=True
            )
            server.serve_forever()
    except KeyboardInterrupt:  # the usual way out: nothing is lost
        return 130
    return 0
