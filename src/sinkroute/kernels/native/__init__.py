"""The CPU kernels: C, compiled into the wheel or once by the system's compiler, called through ctypes.

They do what the torch references do, several times faster, and are never needed: where there are no compiled ones and
no compiler, or with `SINKROUTE_NATIVE=0` in the environment, `load()` is None and torch does the work. What is compiled
on this machine is kept in `$XDG_CACHE_HOME/sinkroute` (else `~/.cache/sinkroute`, else `sinkroute-` and the user's
number among the temporary files); the file's name holds a digest of the sources, the compiler's command and the
processor, so that a home directory may be shared between machines. What wheels bring: `shipped`. How the rest is found,
compiled or given up: `build`. What they take: `functions`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings

from sinkroute.kernels.native import build, shipped
from sinkroute.kernels.native.functions import DTYPES, Progress, Rows, declare

__all__ = ["DTYPES", "Progress", "Rows", "load", "status"]


def load() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none: decided at the first call, for the life of the process.

    Never raises, whatever the machine is like. Where there is a compiler and still no kernels, a `RuntimeWarning` says
    why. The first call of all compiles, in a few seconds, unless the package was installed with compiled ones.

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
    _found = found = _shipped_or_built()  # before the warning, which may be made an error
    if found.kernels is not None:
        _let_children_live(found.kernels)
    if found.warning:
        warnings.warn(found.warning, RuntimeWarning, stacklevel=3)
    return found


def _shipped_or_built() -> build.Found:
    shipped_ones = shipped.find(declare)
    if shipped_ones and shipped_ones.kernels:
        return shipped_ones
    found = build.find(declare)
    if found.kernels or not shipped_ones:
        return found
    return build.Found(None, f"{shipped_ones.about}; {found.about}", found.warning or shipped_ones.warning)


def _let_children_live(kernels: ctypes.CDLL) -> None:
    """End the threads of OpenMP before the process is forked.

    A child lacks the threads of its parent, but the GNU runtime in it counts on them: the first loop on several
    threads, of these kernels or of torch, would wait for ever. Both start their threads anew where they need them.
    """
    soft = 1  # omp_pause_soft
    with contextlib.suppress(AttributeError):  # compiled without OpenMP; no fork on this system
        pause = kernels.omp_pause_resource_all
        os.register_at_fork(before=lambda: pause(soft))
