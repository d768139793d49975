"""The CPU kernels: C compiled once by the system's compiler, kept in a cache folder, called through ctypes.

They do what the torch passes do, several times faster, and are never needed: without a compiler, or with
`SINKROUTE_NATIVE=0` in the environment, `load()` is None and torch does the work. The folder is
`$XDG_CACHE_HOME/sinkroute` (else `~/.cache/sinkroute`); the file's name holds a digest of the sources, the compiler's
command and the processor, so that a home directory may be shared between machines.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DTYPES", "Scores", "load", "pointer", "status"]

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared")
# Threads come from the OpenMP runtime that torch has loaded already, libgomp.so.1, where torch is built with that one.
# Where OpenMP is not to be had, one thread has to do.
THREADS = (("-mprefer-vector-width=512", "-fopenmp"), ("-fopenmp",), ("-fopenmp-simd",), ())
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Scores(ctypes.Structure):
    """`Scores` of row.h."""

    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("softmax_cost", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("mass", ctypes.c_void_p),
        ("mass_stride", ctypes.c_int64),
    )

    @classmethod
    def of(
        cls, scores_TE: Tensor, softmax_cost: bool = False, mask_T: Tensor | None = None, mass_T: Tensor | None = None
    ) -> Scores:
        """Describe CPU tensors: scores of a dtype in `DTYPES` with columns 1 apart, bool mask, float32 mass.

        The tensors must outlive what is returned.
        """
        return cls(
            scores_TE.data_ptr(),
            DTYPES[scores_TE.dtype],
            scores_TE.shape[0],
            scores_TE.shape[1],
            scores_TE.stride(0),
            softmax_cost,
            pointer(mask_T),
            0 if mask_T is None else mask_T.stride(0),
            pointer(mass_T),
            0 if mass_T is None else mass_T.stride(0),
        )


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's memory, or None (NULL)."""
    return None if x is None else x.data_ptr()


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none; compiled at the first call, in about a second."""
    return _loaded()[0]


def status() -> str:
    """Where the compiled kernels are, or why there are none.

    >>> isinstance(status(), str)
    True
    """
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("SINKROUTE_NATIVE", "1") == "0":
        return None, "switched off by SINKROUTE_NATIVE=0"
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler: install gcc or clang, or set CC, for faster solving on a CPU"
    reason = ""
    for threads in THREADS:
        command = [*shlex.split(compiler), *FLAGS, *threads]
        # A second folder, in case that the first does not allow code to be loaded from it.
        for folder in (_cache, _temporary):
            try:
                path = _compiled(command, folder())
                return _declared(ctypes.CDLL(str(path))), str(path)
            except subprocess.SubprocessError as error:
                reason = str(getattr(error, "stderr", None) or error)
                break
            except OSError as error:
                reason = str(error)
    return None, f"the C kernels could not be compiled or loaded: {reason.strip()[-500:]}"


def _compiled(command: list[str], folder: Path) -> Path:
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256("\0".join([*command, _processor()]).encode())
    for source in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    path = folder / f"kernels-{digest.hexdigest()[:24]}.so"
    if not _whole(path):
        # Written beside and moved, so that processes which start together never load half a file.
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
        try:
            arguments = [*command, "-o", unfinished, *map(str, sources)]
            subprocess.run(arguments, check=True, capture_output=True, text=True, errors="replace", timeout=120)
            with open(unfinished, "r+b") as file:
                content = file.read()
                file.write(hashlib.sha256(content).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return path


def _whole(path: Path) -> bool:
    """Whether the file is there and ends with the digest of the rest: to load half a library is to crash."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


@functools.cache
def _cache() -> Path:
    """A folder that only this user can write to: what lies there is loaded as code."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinkroute"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _temporary()


@functools.cache
def _temporary() -> Path:
    """A folder of this process alone."""
    folder = Path(tempfile.mkdtemp(prefix="sinkroute-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    integer, number, address, scores = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.POINTER(Scores)
    kernels.column_sums_workspace.argtypes = [integer, integer]
    kernels.column_sums_workspace.restype = integer
    kernels.column_sums.argtypes = [scores, address, number, number, address, address, integer]
    kernels.column_sums.restype = None
    kernels.column_ranks.argtypes = [scores, address, address, address, address]
    kernels.column_ranks.restype = None
    kernels.costs.argtypes = [scores, address]
    kernels.costs.restype = None
    kernels.topk.argtypes = [scores, address, number, integer, integer, address, address, integer]
    kernels.topk.restype = None
    kernels.noisy_topk.argtypes = [
        *(address, integer, integer, integer, address, integer, ctypes.c_float, integer, address, address, integer)
    ]
    kernels.noisy_topk.restype = None
    kernels.normal.argtypes = [integer, integer, address, integer]
    kernels.normal.restype = None
    return kernels
