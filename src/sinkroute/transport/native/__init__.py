"""The CPU kernels: C compiled once by the system's compiler, kept in a cache folder, called through ctypes.

They do what the torch passes do, several times faster, and are never needed: without a compiler, or with
`SINKROUTE_NATIVE=0` in the environment, `load()` is None and torch does the work. The folder is
`$XDG_CACHE_HOME/sinkroute` (else `~/.cache/sinkroute`, else `sinkroute-` and the user's number among the temporary
files); the file's name holds a digest of the sources, the compiler's command and the processor, so that a home
directory may be shared between machines. How they are found, compiled or given up: `build`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings

import torch
from torch import Tensor

from sinkroute._values import address
from sinkroute.transport.native import build

__all__ = ["DTYPES", "Progress", "Scores", "load", "status"]

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
            address(scores_TE),
            DTYPES[scores_TE.dtype],
            scores_TE.shape[0],
            scores_TE.shape[1],
            scores_TE.stride(0),
            softmax_cost,
            address(mask_T),
            0 if mask_T is None else mask_T.stride(0),
            address(mass_T),
            0 if mass_T is None else mass_T.stride(0),
        )


class Progress(ctypes.Structure):
    """`Progress` of chains.c."""

    _fields_ = (
        ("room", ctypes.c_double),
        ("widened", ctypes.c_int64),
        ("part", ctypes.c_int64),
        ("moves", ctypes.c_int64),
    )


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none: decided at the first call, for the life of the process.

    Never raises, whatever the machine is like. Where there is a compiler and still no kernels, a `RuntimeWarning` says
    why. The first call of all compiles, in a few seconds.

    >>> load() is load()
    True
    """
    return (_found or _find()).kernels


def status() -> str:
    """Where the compiled kernels are, or why there are none.

    >>> isinstance(status(), str)
    True
    """
    return (_found or _find()).about


_found: build.Found | None = None


def _find() -> build.Found:
    global _found
    _found = found = build.find(_declare)  # before the warning, which may be made an error
    if found.kernels is not None:
        _let_children_live(found.kernels)
    if found.warning:
        warnings.warn(found.warning, RuntimeWarning, stacklevel=3)
    return found


def _let_children_live(kernels: ctypes.CDLL) -> None:
    """End the threads of OpenMP before the process is forked.

    A child has none of its parent's threads, but the GNU runtime in it counts on them: the first loop on several
    threads, of these kernels or of torch, would wait for ever. Both start their threads anew where they need them.
    """
    soft = 1  # omp_pause_soft
    with contextlib.suppress(AttributeError):  # compiled without OpenMP; no fork on this system
        pause = kernels.omp_pause_resource_all
        os.register_at_fork(before=lambda: pause(soft))


def _declare(kernels: ctypes.CDLL) -> None:
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
    kernels.choose.argtypes = [
        *(scores, address, integer, address, address, address, address, address, address, address, integer)
    ]
    kernels.choose.restype = None
    kernels.repair.argtypes = [
        *(scores, integer, address, address, address, address, address, address, address, integer),
        ctypes.POINTER(Progress),
    ]
    kernels.repair.restype = integer
    kernels.normal.argtypes = [integer, integer, address, integer]
    kernels.normal.restype = None
