"""Files that are there wholly or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["replace_whole", "write_json", "write_text"]


def write_json(content: Any, path: Path, indent: int | None = 1) -> None:
    """Write wholly or not at all; `indent=None` for one line, which is smaller."""
    write_text(json.dumps(content, indent=indent), path)


def write_text(text: str, path: Path) -> None:
    """Write wholly or not at all."""
    replace_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a draft, which then takes the place of the file; its suffix is that of the file."""
    # In the same folder, for a rename is atomic only within one file system; of this process, for several may write.
    draft = path.with_name(f".{path.stem}.{os.getpid()}.draft{path.suffix}")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
