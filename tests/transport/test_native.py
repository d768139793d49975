"""Compiling the kernels: never needed, never half done, never from a folder that others can write to."""

import ctypes
import os
import subprocess
import sys

import pytest

from sinkroute.transport import native


@pytest.fixture(autouse=True)
def _forget():
    """Each test looks for a compiler anew, and leaves nothing behind for the others."""
    caches = native._loaded, native._cache, native._temporary
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_environment_switches_them_off(monkeypatch):
    monkeypatch.setenv("SINKROUTE_NATIVE", "0")
    assert native.load() is None and "SINKROUTE_NATIVE=0" in native.status()


def test_no_compiler_is_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.load() is None and "no C compiler" in native.status()


def test_a_compiler_that_fails_is_no_error_and_its_words_are_kept(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.load() is None and "the disk is full" in native.status()
    assert not list((tmp_path / "sinkroute").iterdir())


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_they_are_compiled_once_into_the_users_own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(native.load(), ctypes.CDLL)
    (path,) = (tmp_path / "sinkroute").iterdir()
    assert native.status() == str(path) and path.parent.stat().st_mode & 0o077 == 0
    before = path.stat().st_mtime_ns
    native._loaded.cache_clear()
    assert native.load() is not None and path.stat().st_mtime_ns == before


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
@pytest.mark.parametrize("length", [0, 100, 5000, 20_000])
def test_half_a_library_is_not_loaded_but_compiled_anew(monkeypatch, tmp_path, length):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command, folder = ["cc", *native.FLAGS], native._cache()
    path = native._compiled(command, folder)
    content = path.read_bytes()
    path.write_bytes(content[:length])
    assert native._compiled(command, folder) == path and path.read_bytes()[-32:] == content[-32:]


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_a_folder_that_others_can_write_to_is_not_trusted(monkeypatch, tmp_path):
    (tmp_path / "sinkroute").mkdir(mode=0o777)
    (tmp_path / "sinkroute").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.load() is not None
    assert not native.status().startswith(str(tmp_path / "sinkroute"))


@pytest.mark.skipif(native.load() is None, reason="no compiler here")
def test_loading_them_leaves_the_rounding_of_the_process_alone():
    # A library that is linked with -ffast-math makes denormals 0 for everyone.
    code = (
        "from sinkroute.transport import native; import numpy as np; assert native.load();"
        "print(np.float32(1e-30) * np.float32(1e-10) > 0)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
