"""The compiled kernels of a wheel: which of them a processor takes, and what comes where none can be loaded."""

import shutil
import subprocess
import warnings
from types import SimpleNamespace

import pytest

from sinkroute.kernels import native
from sinkroute.kernels.native import build, shipped

# As Linux tells them.
SAPPHIRE_RAPIDS = " ".join(build.LEVELS.values()) + " avx512_fp16 amx_tile"
ZEN_2 = build.LEVELS["x86-64-v3"] + " " + build.LEVELS["x86-64-v2"] + " sse4a clzero"
SKYLAKE_X_WITHOUT_CD = SAPPHIRE_RAPIDS.replace(" avx512cd", "")
NEHALEM = build.LEVELS["x86-64-v2"]
CORE_2 = "cx16 lahf_lm pni ssse3"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A place for libraries, where the package looks for its own."""
    find = shipped.find
    monkeypatch.setattr(native, "shipped", SimpleNamespace(find=lambda declare: find(declare, tmp_path)))
    monkeypatch.setattr(native, "_found", None)
    monkeypatch.delenv("SINKROUTE_NATIVE", raising=False)
    for level in build.LEVELS:
        (tmp_path / f"kernels-{level}.so").write_bytes(b"no library at all")
    return tmp_path


@pytest.mark.parametrize(
    ("processor", "levels"),
    [
        (SAPPHIRE_RAPIDS, "v4 v3 v2"),
        (SKYLAKE_X_WITHOUT_CD, "v3 v2"),
        (ZEN_2, "v3 v2"),
        (NEHALEM, "v2"),
        (CORE_2, ""),
        ("arm64 arm myhost", ""),
    ],
)
def test_a_processor_takes_what_it_can_run_the_fastest_first(monkeypatch, folder, processor, levels):
    monkeypatch.setattr(shipped, "processor", lambda: f"flags : {processor}")
    assert [path.stem.removeprefix("kernels-x86-64-") for path in shipped.suitable(folder)] == levels.split()


def test_a_checkout_has_none():
    assert shipped.suitable() == [] and shipped.find(lambda kernels: None) is None


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no compiler here")
def test_one_that_cannot_be_loaded_is_passed_over(monkeypatch, folder):
    monkeypatch.setattr(shipped, "processor", lambda: SAPPHIRE_RAPIDS)
    second = folder / "kernels-x86-64-v3.so"
    source = folder / "one.c"
    source.write_text("int one(void) { return 1; }")
    subprocess.run([*build.compiler(), "-shared", "-fPIC", "-o", str(second), str(source)], check=True)
    found = shipped.find(lambda kernels: kernels.one, folder)
    assert found.kernels.one() == 1 and found.about == str(second) and not found.warning
    found = shipped.find(lambda kernels: kernels.another, folder)
    assert found.kernels is None and "no library" not in found.warning and "kernels-x86-64-v4.so" in found.warning


def test_where_they_cannot_be_loaded_they_are_compiled_in_silence(monkeypatch, folder, tmp_path_factory):
    monkeypatch.setattr(shipped, "processor", lambda: SAPPHIRE_RAPIDS)
    compiled = build.Found(build.ctypes.CDLL(None), "compiled here")
    monkeypatch.setattr(native.build, "find", lambda declare: compiled)
    monkeypatch.setattr(native, "_let_children_live", lambda kernels: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load() is compiled.kernels and native.status() == "compiled here"


def test_where_they_cannot_be_loaded_nor_compiled_that_is_said(monkeypatch, folder):
    monkeypatch.setattr(shipped, "processor", lambda: NEHALEM)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.warns(RuntimeWarning, match=r"installed package cannot be loaded: .*v2\.so.*torch does the work"):
        assert native.load() is None
    assert "cannot be loaded" in native.status() and "no C compiler" in native.status()


@pytest.mark.parametrize("value", ["0", "compile"])
def test_they_are_not_looked_at_where_the_environment_says_so(monkeypatch, folder, value):
    monkeypatch.setattr(shipped, "processor", lambda: SAPPHIRE_RAPIDS)
    monkeypatch.setenv("SINKROUTE_NATIVE", value)
    assert shipped.find(lambda kernels: None, folder) is None
