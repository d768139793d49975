"""A log file of one JSON object a line, which stays readable when a process that wrote to it was killed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["append_line"]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append `record` and hand it to the system at once, so that it survives the process.

    A last line that a killed process left torn is cut off first. NaN and infinity become null: JSON has no word for
    them.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                whole, _, tail = file.read().rpartition(b"\n")
                try:
                    json.loads(tail)
                    file.write(b"\n")
                except ValueError:  # torn
                    file.truncate(len(whole) + 1 if whole else 0)
        file.write(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")


def _finite(value: Any) -> Any:
    """`value` with None for each float in it that is NaN or infinite."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
