"""One worker: a process that executes cells one after the other, as it is told.

It reads orders from stdin, a JSON object a line, and writes what happens to stdout in the same way; whatever else
would be printed goes to stderr. When stdin ends, because the comparison was stopped or is dead, it saves a checkpoint
and ends too. (A new process for each cell would import torch and load the text every time.)
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sinkroute.lab.config import Config, from_mapping
from sinkroute.lab.interrupt import Interrupted, StopRequest, stop_on_signal
from sinkroute.lab.machine import machine
from sinkroute.lab.study.lock import hold, holder
from sinkroute.lab.study.state import record_begin, record_end, record_failure
from sinkroute.lab.training import Progress

__all__ = ["main", "run_cell"]

Say = Callable[..., None]


def run_cell(order: dict[str, Any], stop: StopRequest | None, say: Say) -> None:
    """Execute one cell, unless another process has it, and say how it ends.

    Args:
        order: "name", "folder", "config", "hash"; "fresh" to delete an earlier run; "about" for its record.
        stop: as `sinkroute.lab.run.execute` looks at it.
        say: told kind="progress" and "status" on the way, and at the end "done", "failed", "interrupted" or "busy".
    """
    folder = Path(order["folder"])
    with hold(folder) as mine:
        if not mine:
            say(kind="busy", note=f"left to {holder(folder) or 'another process'}")
            return
        try:
            _execute(order, folder, stop, say)
        except Interrupted as error:
            say(kind="interrupted", note=str(error))
        except Exception as error:  # of one cell: the others go on
            message = f"{type(error).__name__}: {error}"
            with suppress(OSError):  # a full disk may be what failed
                record_failure(folder, order["hash"], message)
            say(kind="failed", note=message, trace=traceback.format_exc())
        else:
            say(kind="done")


def _execute(order: dict[str, Any], folder: Path, stop: StopRequest | None, say: Say) -> None:
    import torch
    from accelerate.state import AcceleratorState

    from sinkroute.lab.run import execute

    def on_progress(progress: Progress) -> None:
        say(kind="progress", **vars(progress))

    began = time.monotonic()
    config = from_mapping(Config, order["config"])
    say(kind="status", note="loading data")
    data = load_cell_data(config)
    # What Accelerate remembers of the run before, such as its precision, must not reach this run.
    AcceleratorState._reset_state(reset_partial_state=True)
    about = {**order["about"], **machine(), "threads": torch.get_num_threads()}
    record_begin(folder, order["hash"], about, order["fresh"])
    done = False
    try:
        execute(
            config,
            data,
            folder,
            fresh=order["fresh"],
            stop=stop,
            on_progress=on_progress,
            on_status=lambda text: say(kind="status", note=text),
        )
        done = True
    finally:
        record_end(folder, time.monotonic() - began, done)


_loaded: dict[tuple[str, str | None, str | None, int | None], Any] = {}


def load_cell_data(config: Config) -> Any:
    """What a cell learns from; the last one loaded is kept, for most cells share it."""
    from sinkroute.lab.tasks import load_data

    key = (config.data.name, config.data.path, config.data.switch_to, getattr(config.model, "image_size", None))
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_data(config)
    return _loaded[key]


def main() -> int:
    """Execute what stdin orders."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**event: Any) -> None:
        sys.stderr.write(event.pop("trace", ""))
        with suppress(BrokenPipeError):  # the comparison is dead; the cell is still saved
            channel.write(json.dumps(event) + "\n")

    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    with stop_on_signal() as stop:

        def listen() -> None:
            for line in sys.stdin:
                with suppress(ValueError):  # torn, for the comparison was killed while it wrote
                    orders.put(json.loads(line))
            stop.asked = True
            orders.put(None)

        threading.Thread(target=listen, daemon=True).start()
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        say(kind="ready")
        while not stop:
            try:
                order = orders.get(timeout=0.2)  # a signal must not wait for an order
            except queue.Empty:
                continue
            if order is None:
                break
            run_cell(order, stop, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
