"""The compiled library: found in a folder of this user's, or compiled into it, once.

Nothing in here may stop a program, as torch does the same work: whatever goes wrong, `find` answers that there is no
library, and why. A failure is warned of once and written down beside the place of the library, so that the next
processes neither compile in vain nor warn again; after a day it is forgotten.

One process compiles, under `flock`, which the kernel gives back however its holder ends. The others wait for it rather
than start with torch: which of the two does the work changes the last bits of a plan, and all of the noise that routers
draw (`kernels.normal`). A process therefore decides once, and ranks that start together, the commonest case, must
decide as they will at every later start. What they wait for is bounded by the time that a compiler is given, and said
on stderr when it takes long. Where the file system has no locks every process compiles for itself; files are moved into
place whole, so that nobody loads half of one.
"""

from __future__ import annotations

import _ctypes
import concurrent.futures
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LEVELS", "Found", "compiler", "find", "processor"]

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC")
# The libraries of a wheel, by the processor that each is compiled for in place of "native", the fastest first: what a
# processor must have, as Linux names it. One that has less compiles for itself.
LEVELS = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl avx avx2 bmi1 bmi2 f16c fma movbe abm",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma movbe abm",
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
}
# Threads come from the OpenMP runtime that torch has loaded already, libgomp.so.1, where torch is built with that one.
# Where OpenMP is not to be had, one thread has to do. The first that a compiler takes is used.
THREADS = (("-mprefer-vector-width=512", "-fopenmp"), ("-fopenmp",), ("-fopenmp-simd",), ())
# What the sources need of a compiler: their headers, and threads.
PROBE = """#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
int probe(int n) {
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += i;
    return sum;
}
"""
SECONDS_TO_COMPILE = 120  # all of it, on the slowest machine; idle ones take 1 to 4
SECONDS_IN_SILENCE = 2
SECONDS_TO_REMEMBER = 24 * 3600
CURES = (
    "CC names another compiler, XDG_CACHE_HOME another folder (your own, on a file system that may hold programs), "
    "and SINKROUTE_NATIVE=0 does without the kernels in silence"
)


class Found(NamedTuple):
    """What there is.

    Attributes:
        kernels: the compiled library, None where there is none.
        about: where it lies, or why there is none.
        warning: what the user should be told, or "".
    """

    kernels: ctypes.CDLL | None
    about: str
    warning: str = ""


class _Refusal(Exception):
    """No other folder would help."""

    def __init__(self, reason: str, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting  # another process would meet it too


def find(declare: Callable[[ctypes.CDLL], None]) -> Found:
    """Find the library, or compile it; only an interrupt by the user is raised.

    Args:
        declare: what to do with a library before it is used; an `AttributeError` says that it is another one.
    """
    if os.environ.get("SINKROUTE_NATIVE", "1") == "0":
        return Found(None, "switched off by SINKROUTE_NATIVE=0")
    try:
        return _find(declare)
    except _Refusal as refusal:
        return _without(str(refusal), f"{CURES}.")
    except Exception as error:
        return _without(f"{type(error).__name__}: {error}", f"{CURES}.")


def _without(reason: str, cure: str) -> Found:
    reason = f"the C kernels could not be compiled or loaded: {reason.strip()[-500:]}"
    return Found(None, reason, f"{reason}\nOn a CPU torch does the work, several times slower. {cure}")


def _find(declare: Callable[[ctypes.CDLL], None]) -> Found:
    command = compiler()
    if not command:
        return Found(None, "no C compiler: install gcc or clang, or set CC, for faster solving on a CPU")
    name = f"kernels-{_digest(command)}"
    places = _places()
    if found := _kept(places, name, declare):
        return found
    able = next(filter(_is_able, places), None)
    home = able or next(filter(_is_writable, places), None)
    if home is None:
        raise _Refusal("no folder that only this user can write to")
    # Two names, so that a folder in which programs may run after all is tried.
    failure = home / f"{name}.{'failed' if able else 'unable'}"
    if found := _failed_before(failure):
        return found
    with _said_if_it_takes_long(), _alone(home / f"{name}.lock"):
        if found := _kept(places, name, declare) or _failed_before(failure):  # of the process that was waited for
            return found
        try:
            return _compiled_somewhere(command, filter(_is_able, places), name, declare)
        except _Refusal as refusal:
            told_once = refusal.lasting and _write_down(str(refusal), failure)
            again = f" This is said once; it is tried again after a day, or when {failure} is deleted."
            return _without(str(refusal), f"{CURES}.{again if told_once else ''}")


# ---------------------------------------------------------------------------------------------------------- folders


def _places() -> list[Path]:
    """Where the library may lie, whether the folders are there or not.

    The second is for whoever has no home, or one that cannot be written to or must not hold programs.
    """
    places = []
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no HOME, and a user without a name
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not cache.is_absolute():  # to be ignored, says the standard: it would be another one in every folder
            cache = Path.home() / ".cache"
        if cache.is_absolute():
            places.append(cache / "sinkroute")
    with contextlib.suppress(OSError):
        temporary = Path(tempfile.gettempdir())
        mode = temporary.stat().st_mode
        # Not where others could put a folder of theirs in the place of ours.
        ours = temporary / f"sinkroute-{_user()}"
        if not ours.is_symlink() and (_user() < 0 or not mode & 0o022 or mode & stat.S_ISVTX):
            places.append(ours)
    return places


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else -1


def _is_ours(folder: Path) -> bool:
    """Whether nobody but this user and root can write to it: what lies there is loaded as code."""
    try:
        status = folder.stat()
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode):
        return False
    return _user() < 0 or (status.st_uid in (0, _user()) and not status.st_mode & 0o022)


def _is_writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _is_ours(folder) and os.access(folder, os.W_OK)


def _is_able(folder: Path) -> bool:
    """Whether a library can be put there and loaded from there."""
    return _is_writable(folder) and not (hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC)


# ------------------------------------------------------------------------------------------ what was there before us


def _kept(places: list[Path], name: str, declare: Callable[[ctypes.CDLL], None]) -> Found | None:
    for folder in filter(_is_ours, places):
        path = folder / f"{name}.so"
        # One that cannot be loaded (any more) is as good as none.
        with contextlib.suppress(OSError):
            if _is_whole(path):
                return _loaded(path, declare)
    return None


def _loaded(path: Path, declare: Callable[[ctypes.CDLL], None]) -> Found:
    kernels = ctypes.CDLL(str(path))
    try:
        declare(kernels)
    except AttributeError as error:  # the sources changed while they were compiled
        raise OSError(f"{path} is not what it should be: {error}") from None
    return Found(kernels, str(path))


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the digest of the rest: to load half a library is to crash."""
    content = path.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _failed_before(failure: Path) -> Found | None:
    try:
        if abs(time.time() - failure.stat().st_mtime) > SECONDS_TO_REMEMBER:
            return None
        reason = failure.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return Found(None, f"{_without(reason, '').about} (as an earlier process found; delete {failure} to try again)")


def _write_down(reason: str, failure: Path) -> bool:
    try:
        failure.write_text(reason, encoding="utf-8", errors="replace")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within it no other process compiles, unless the file system has no locks."""
    with open(path, "ab") as file:
        # A compiler ends before those who wait for it do.
        until = time.monotonic() + SECONDS_TO_COMPILE
        held = False
        while fcntl is not None and not held:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() > until:
                    reason = f"another process, which holds {path}, has not compiled them in {SECONDS_TO_COMPILE} s"
                    raise _Refusal(reason, lasting=False) from None
                time.sleep(0.05)
            except OSError:  # no locks on this file system
                break
        try:
            yield
        finally:
            if held:  # by name: a child that was forked meanwhile has the file too
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _said_if_it_takes_long() -> Iterator[None]:
    def say() -> None:
        with contextlib.suppress(Exception):
            if sys.stderr is not None:
                print(
                    "sinkroute: the C kernels are being compiled, once (SINKROUTE_NATIVE=0 does without)",
                    file=sys.stderr,
                    flush=True,
                )

    timer = threading.Timer(SECONDS_IN_SILENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# -------------------------------------------------------------------------------------------------------- compiling


def compiler() -> list[str]:
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise _Refusal(f"CC={os.environ['CC']!r} is no command: {error}") from None
    return command or [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path][:1]


def _digest(command: list[str]) -> str:
    """Of all that the library depends on, the processor too: a home may be shared between machines."""
    digest = hashlib.sha256("\0".join([*command, repr((FLAGS, THREADS)), processor()]).encode(errors="replace"))
    for source in (*sorted(SOURCES.glob("*.c")), *sorted(SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def processor() -> str:
    """What this processor can do, in Linux's words; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _compiled_somewhere(
    command: list[str], folders: Iterable[Path], name: str, declare: Callable[[ctypes.CDLL], None]
) -> Found:
    reasons = []
    until = time.monotonic() + SECONDS_TO_COMPILE
    for folder in folders:
        try:
            return _loaded(_compiled(command, folder, name, until), declare)
        except OSError as error:  # the disk is full, or code from here is not loaded
            reasons.append(str(error))
    raise _Refusal("; ".join(reasons) or "this user's folders must not hold programs (they are mounted noexec)")


def _compiled(command: list[str], folder: Path, name: str, until: float) -> Path:
    for left in folder.glob("unfinished-*"):  # by processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 2 * SECONDS_TO_COMPILE:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder, ignore_cleanup_errors=True) as work:
        command = [*command, *FLAGS, *_threads_taken(command, Path(work), until)]
        sources = sorted(SOURCES.glob("*.c"))
        objects = [str(Path(work, source.stem + ".o")) for source in sources]
        jobs = [[*command, "-c", "-o", out, str(source)] for source, out in zip(sources, objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(lambda job: _run(job, work, until), jobs))
        unfinished, path = Path(work, "library"), folder / f"{name}.so"
        _run([*command, "-shared", "-o", str(unfinished), *objects], work, until)
        with open(unfinished, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    return path


def _threads_taken(command: list[str], work: Path, until: float) -> tuple[str, ...]:
    """The first of THREADS with which something small is compiled and loaded, so that the kernels are tried once."""
    source = work / "probe.c"
    source.write_text(PROBE)
    problem: _Refusal | OSError | None = None
    for number, threads in enumerate(THREADS):
        library = work / f"probe{number}.so"
        try:
            _run([*command, *FLAGS, *threads, "-shared", "-o", str(library), str(source)], str(work), until)
            handle = ctypes.CDLL(str(library))._handle
        except (_Refusal, OSError) as error:
            # What is compiled but not loaded tells more than a flag that is not known.
            problem = error if isinstance(error, OSError) or problem is None else problem
            if isinstance(error, _Refusal) and not error.lasting:
                break
            continue
        # A file that is in use leaves another one in its folder when it is removed over NFS.
        if hasattr(_ctypes, "dlclose"):
            _ctypes.dlclose(handle)
        return threads
    assert problem is not None
    raise problem


def _run(command: list[str], folder: str, until: float) -> None:
    seconds = max(until - time.monotonic(), 0)
    # Not through a pipe, which would be waited for until all that the compiler has started has ended: the programs that
    # it calls, after it was killed, or the server of a compiler cache.
    with tempfile.TemporaryFile(dir=folder) as words:
        try:
            subprocess.run(
                command,
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                timeout=seconds,
                env=os.environ | {"TMPDIR": folder},
            )
        except subprocess.CalledProcessError as error:
            words.seek(0)
            said = words.read().decode(errors="replace").strip()
            # By a signal: memory ran out, or somebody ended it.
            raise _Refusal(said or str(error), lasting=error.returncode > 0) from None
        except subprocess.TimeoutExpired:
            raise _Refusal(f"{command[0]} did not end in {SECONDS_TO_COMPILE} s") from None
        except OSError as error:
            raise _Refusal(f"{command[0]} cannot be run: {error}") from None
