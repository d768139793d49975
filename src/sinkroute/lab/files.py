"""Files that are there wholly or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json", "write_text"]


def write_json(content: Any, path: Path, indent: int | None = 1) -> None:
    """Write wholly or not at all; `indent=None` for one line, which is smaller."""
    write_text(json.dumps(content, indent=indent), path)


def write_text(text: str, path: Path) -> None:
    """Write wholly or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
