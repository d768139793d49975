"""A cell belongs to one process at a time, whatever becomes of that process.

`flock` rather than a file that is there or not: the kernel lets go when the process ends, however it ends, so there is
no stale lock to recognise, and no moment in which two processes both take one over.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["hold", "holder"]

_NAME = ".lock"


@contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Within it no other process has the folder; yields False if one has it already."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _NAME).open("a+", encoding="utf-8") as file:
        if not _take(file):
            yield False
            return
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node()}))
        file.flush()
        yield True
        file.truncate(0)


def holder(folder: Path) -> str | None:
    """Who has a folder, in words; None if nobody has."""
    try:
        with (folder / _NAME).open("r", encoding="utf-8") as file:
            if _take(file, fcntl.LOCK_SH):
                return None
            try:
                about = json.loads(file.read())
                return f"process {about['pid']} on {about['host']}"
            except (ValueError, KeyError, TypeError):
                return "another process"  # it is about to write who it is
    except FileNotFoundError:
        return None


def _take(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
