"""The kernels as the rest sees them: there or not there, decided once, never a reason to stop."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

import sinkroute
from sinkroute.kernels import native
from sinkroute.kernels.native import build, functions


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    """Each test looks for a compiler anew, and leaves nothing behind for the others."""
    monkeypatch.setattr(native, "_found", None)


def test_the_environment_switches_them_off(monkeypatch):
    monkeypatch.setenv("SINKROUTE_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load() is None and "SINKROUTE_NATIVE=0" in native.status()


def test_no_compiler_is_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.load() is None and "no C compiler" in native.status()


def test_a_compiler_that_fails_is_warned_of_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="torch does the work.*SINKROUTE_NATIVE=0"):
        assert native.load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load() is None and "could not be compiled" in native.status()


def test_a_warning_that_is_made_an_error_is_raised_once(monkeypatch):
    monkeypatch.setenv("CC", 'gcc "')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="No closing quotation"):
            native.load()
        assert native.load() is None


def test_a_process_decides_once(monkeypatch):
    monkeypatch.setenv("SINKROUTE_NATIVE", "0")
    native.load()
    monkeypatch.delenv("SINKROUTE_NATIVE")
    assert native.load() is None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("compiler", ["cc", 'gcc "'])
def test_a_user_without_a_home_and_a_name_is_served(compiler):
    # All is imported before, as the interpreter may lie where only root can read.
    code = (
        "import os, sys, tempfile, torch, sinkroute, warnings; from sinkroute.kernels import native\n"
        "sinkroute.solve(torch.randn(16, 4, dtype=torch.float64)); warnings.simplefilter('ignore')\n"
        "[os.environ.pop(name, None) for name in ('HOME', 'XDG_CACHE_HOME')]; tempfile.tempdir = sys.argv[1]\n"
        "native._found = None; os.setuid(54321)\n"
        "plan = sinkroute.solve(torch.randn(16, 4)); print(bool(plan.column_error <= 1e-3), native.status())"
    )
    # Not in a folder of pytest's, as those are closed to others.
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o1777)
        done = _run(code, str(folder), CC=compiler)
    finally:
        shutil.rmtree(folder)
    assert done.stdout.startswith("True")
    if compiler == "cc" and native.load() is not None:
        assert f"{folder}/sinkroute-54321/kernels-" in done.stdout


def test_the_table_declares_what_the_sources_define():
    text = "".join(path.read_text() for path in sorted(build.SOURCES.glob("*.c")))
    defined = {
        name: re.sub(r"\s+", " ", arguments).split(", ")
        for name, arguments in re.findall(r"^(?:void|int64_t|double) (\w+)\(([^)]*)\) \{", text, re.MULTILINE)
    }
    declared = functions.FUNCTIONS
    assert set(declared) <= set(defined)  # the sources call some of each other's functions
    for name, (_, *arguments) in declared.items():
        kinds = ["pointer" if "*" in argument else argument.split()[-2] for argument in defined[name]]
        said = {ctypes.c_int64: "int64_t", ctypes.c_double: "double", ctypes.c_float: "float"}
        assert [said.get(argument, "pointer") for argument in arguments] == kinds, name


def test_the_backend_is_chosen_in_one_place_only():
    package = Path(sinkroute.__file__).parent
    choosers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bnative\.load\(|find_spec\(.triton", path.read_text())
    }
    assert choosers == {"kernels/backend.py"}


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_they_are_compiled_once_into_the_users_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(native.load(), ctypes.CDLL)
    (path,) = (tmp_path / "sinkroute").glob("*.so")
    assert native.status() == str(path) and path.parent.stat().st_mode & 0o077 == 0
    before = path.stat().st_mtime_ns
    native._found = None
    assert native.load() is not None and path.stat().st_mtime_ns == before


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_is_forked_after_threads_were_used_does_not_hang():
    code = (
        "import os, signal, torch, sinkroute; from sinkroute.kernels.backend import threads_for\n"
        "torch.set_num_threads(2); logits = torch.randn(8192, 64); assert threads_for(logits) == 2\n"
        "work = lambda: [logits.softmax(1), *sinkroute.solve(logits).topk(2), sinkroute.balanced_topk(logits, 2)[0]]\n"
        "before = work(); child = os.fork()\n"
        "if child == 0: signal.alarm(30); os._exit(7 * all(map(torch.equal, before, work())))\n"
        "assert all(map(torch.equal, before, work())); print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert _run(code, OMP_NUM_THREADS="2").stdout.strip() == "7"  # -14 for one that was woken by the alarm


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_loading_them_leaves_the_rounding_of_the_process_alone():
    # A library that is linked with -ffast-math makes denormals 0 for everyone.
    code = (
        "from sinkroute.kernels import native; import numpy as np; assert native.load();"
        "print(np.float32(1e-30) * np.float32(1e-10) > 0)"
    )
    assert _run(code).stdout.strip() == "True"


def _run(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | variables
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
