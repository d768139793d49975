"""The log of a run: one JSON object a line, append only, cut back on resume to where the checkpoint stands.

`RunLog` writes it, `read_lines` and `read_log` read it once and strictly, `Lines` while it grows. (Without torch.)
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from sinkroute.lab.files import write_text

__all__ = ["Lines", "RunLog", "last_step", "number", "read_lines", "read_log"]

Line = dict[str, Any]


class RunLog:
    """Writes `log.jsonl`.

    Args:
        path: the file.
        last_step: of the checkpoint from which the run continues, 0 for a new one. What an earlier process logged
            after it will be done again, so it is removed.
        enabled: False on all but the main process: then nothing is written.

    Raises:
        OSError: the file cannot be written (a full disk, say); lines that are there stay.
    """

    def __init__(self, path: Path, last_step: int, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        if not enabled:
            return
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= last_step]
            write_text("".join(line + "\n" for line in kept), path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append one object and hand it to the system at once: what was logged survives the process."""
        if self.enabled:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.enabled:
            self.file.close()


class Lines:
    """The objects of a file that grows, each once; those of one that was replaced or cut from its beginning again.

    A line counts when its newline is there, so that one that is half written is read when it is whole. What is no
    object is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read = 0  # bytes
        self._tail = b""  # the last of them: whether they are still there
        self._seen: tuple[int, int, int] | None = None

    def new(self) -> tuple[bool, list[Line]]:
        """Whether all that came before is void, and the objects since the last call."""
        try:
            about = self.path.stat()
            seen = about.st_size, about.st_mtime_ns, about.st_ino
            if seen == self._seen:
                return False, []
            with self.path.open("rb") as file:
                void = self.read > 0 and not self._is_continued(file, about.st_size)
                if void:
                    self.read, self._tail = 0, b""
                file.seek(self.read)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet, or no longer
            void, self.read, self._tail, self._seen = self.read > 0, 0, b"", None
            return void, []
        self._seen = seen
        self.read += len(whole) + len(newline)
        self._tail = (self._tail + whole + newline)[-64:]
        return void, [line for line in map(_lenient, whole.splitlines()) if line is not None]

    def _is_continued(self, file: Any, size: int) -> bool:
        if size < self.read:
            return False
        file.seek(self.read - len(self._tail))
        return bool(file.read(len(self._tail)) == self._tail)


def read_lines(path: Path) -> list[Line]:
    """The objects of a JSONL file; a last line that a killed process left torn is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: another line is no object; the message names it.
    """
    lines = path.read_bytes().rstrip().splitlines()
    found = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            found.append(_object(raw))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: not a JSON object ({error}); only the last line of a log may be torn. "
                    "Repair or remove this line."
                ) from error
    return found


def read_log(path: Path) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The lines of training and those of validation on the way, in the order of their steps.

    Of a step that stands there twice, as after a resume, the later line counts: it is the one whose weights live on.

    Raises:
        OSError, ValueError: as of `read_lines`; or a line has no step.
    """
    train: dict[int, Line] = {}
    evals: dict[int, Line] = {}
    for line in read_lines(path):
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"{path}: 'step' must be a whole number in each line; received {step!r}.")
        if line.get("kind") == "train":
            train[step] = line
        elif line.get("kind") == "eval" and line.get("split", "valid") == "valid":
            evals[step] = line
    return tuple(train[step] for step in sorted(train)), tuple(evals[step] for step in sorted(evals))


def last_step(path: Path) -> int:
    """Of the last line; 0 without one. Read from the end: a log may be long."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))  # a line holds the loads of all experts
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    # One that is torn, or cut off by the window, has none.
    return next((int(step) for line in reversed(lines) if (step := _step(line)) < math.inf), 0)


def _object(raw: bytes | str) -> Line:
    found = json.loads(raw)  # JSON and UTF-8 errors are ValueErrors
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, received {type(found).__name__}")
    return found


def _lenient(raw: bytes) -> Line | None:
    try:
        return _object(raw)
    except ValueError:
        return None


def number(value: Any) -> float | None:
    """A number of a log or a result as a float; None for what is none, truth values among them.

    >>> number(3), number(10**400), number(True)
    (3.0, inf, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length; 1e400 is read as inf, and so is what it says in full
        return math.inf if value > 0 else -math.inf


def _step(line: bytes | str) -> float:
    """The step of a logged line; one that a killed process left torn counts as never."""
    try:
        step = number(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
    return math.inf if step is None else step
