"""The memory of a process: how much a stretch of work needs at its peak, and pages that are kept for the next step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["keep_freed_memory", "peak_memory_mb", "reset_peak_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MOST = -1, -3, 2**31 - 1  # of mallopt (glibc's malloc.h)


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next allocation, from now on and in the whole process.

    By itself it hands blocks of more than some 30 MB back at once. The logits of a batch of words are such blocks, in
    every step: thousands of pages that the system must find and clear again (docs/costs.md has the time).

    Returns:
        Whether it does. It does not where there is another allocator, or where the environment has asked for something
        (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`, `GLIBC_TUNABLES`).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    libc = _libc("mallopt")
    return libc is not None and all(libc.mallopt(name, _MOST) for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def _libc(function: str) -> ctypes.CDLL | None:
    """The C library that the process runs with, if it has this function of glibc's."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, function) else None


def reset_peak_memory() -> None:
    """Begin a new stretch. Where the system cannot forget a peak (other than Linux), the process's own stays."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if (libc := _libc("malloc_trim")) is not None:
        libc.malloc_trim(0)  # what an earlier stretch has freed is no part of this one
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark of resident memory


def peak_memory_mb() -> float:
    """MiB: of the GPU's allocator where there is one, else the process's highest resident memory since the reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
