"""The compiled libraries that a wheel brings, for machines without a compiler, without a home, or in a hurry.

There is one for each of `build.LEVELS`, next to the sources, put there by the build hook (hatch_build.py). A checkout
and a source distribution have none: `build` compiles there. `SINKROUTE_NATIVE=compile` does so in spite of them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from sinkroute.kernels.native.build import LEVELS, SOURCES, Found, processor

__all__ = ["find", "suitable"]


def suitable(folder: Path = SOURCES) -> list[Path]:
    """The libraries in the folder that this processor can run, the fastest first."""
    able = set(processor().split())
    paths = {folder / f"kernels-{level}.so": set(needed.split()) for level, needed in LEVELS.items()}
    return [path for path, needed in paths.items() if needed <= able and path.is_file()]


def find(declare: Callable[[ctypes.CDLL], None], folder: Path = SOURCES) -> Found | None:
    """The first of them that can be loaded; None where there is none to try.

    Args:
        declare: what to do with a library before it is used; an `AttributeError` says that it is another one.
        folder: where the libraries lie.
    """
    if os.environ.get("SINKROUTE_NATIVE") in ("0", "compile"):
        return None
    problem = ""
    for path in suitable(folder):
        try:
            kernels = ctypes.CDLL(str(path))
            declare(kernels)
        except (OSError, AttributeError) as error:  # an old libc, a torch without libgomp, half an upgrade
            problem = problem or f"the C kernels of the installed package cannot be loaded: {error}"
        else:
            return Found(kernels, str(path))
    if not problem:
        return None
    return Found(None, problem, f"{problem}. On a CPU torch does the work, several times slower.")
