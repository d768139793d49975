"""Stopping a run from outside without losing it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopRequest", "stop_on_signal"]


class Interrupted(Exception):
    """Somebody asked a run to stop; it saved a checkpoint first."""


class StopRequest:
    """True once somebody asked."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within it the first Ctrl-C (or SIGTERM, which schedulers send) only sets a flag; a second ends the program.

    Of several processes that leave by an error or as asked, one is first, and torchrun then asks the others to stop.
    They are about to: what they have to say and their exit code would be lost, so they no longer hear it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> Any:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    except BaseException:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
