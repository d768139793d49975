"""The source code of the running Python's standard library: bytes of another kind than prose, on every machine.

Which modules there are depends on Python's version: two machines have the same text where they have the same one. A
run's `corpus.json` says which it was, and holds its SHA-256.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path

from sinkroute.lab.data.corpus import Corpus, split_corpus

__all__ = ["load_stdlib"]

# What users installed, what distributions leave out, and what is no source code: tables, and the manual as a string.
_NO_LIBRARY = frozenset({"dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"})
_OF_THE_MACHINE = "_sysconfigdata"


def load_stdlib(path: str | Path | None = None) -> Corpus:
    """Every module of the standard library that is written in Python, joined by a newline, split 90/5/5.

    In the order of their relative paths; without tests, `encodings` (tables) and `pydoc_data` (the manual).

    Args:
        path: Must be None; the text is part of Python.

    Raises:
        ValueError: `path` is given.
        FileNotFoundError: this Python has no source code (it may lie in a zip file, or be frozen).

    >>> corpus = load_stdlib()
    >>> corpus.name, len(corpus.train) > 5_000_000
    ('stdlib', True)
    """
    if path is not None:
        raise ValueError(
            f"path: 'stdlib' is part of Python and takes no path, got {str(path)!r}; use load_corpus('text', path)"
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _modules(root)
    if not files:
        raise FileNotFoundError(f"corpus 'stdlib': {root} holds no source code; take a Python that is installed whole")
    source = f"Python {platform.python_version()}: standard library, {len(files)} modules"
    return split_corpus("stdlib", source, b"\n".join(file.read_bytes() for file in files))


def _modules(root: Path) -> list[Path]:
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NO_LIBRARY]  # site-packages may hold more than all else
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(_OF_THE_MACHINE)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())
