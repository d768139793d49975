"""Compiling the kernels: by one process, once, never half, never from a folder that others can write to."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sinkroute.kernels.native import build

GCC = shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(GCC is None or not hasattr(os, "geteuid"), reason="no compiler here")
# Without the project around it, and so without torch: a process of 0.1 s.
ALONE = (
    "import importlib.util, sys; spec = importlib.util.spec_from_file_location('build', sys.argv[1])\n"
    "build = importlib.util.module_from_spec(spec); sys.modules['build'] = build\n"
    "spec.loader.exec_module(build); build.SOURCES = build.Path(sys.argv[2])\n"
    "found = build.find(lambda kernels: kernels.one)\n"
    "print(found.kernels is not None, bool(found.warning), found.about)"
)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A machine for one test: its folders, a compiler that keeps a diary, and little to compile."""
    names = "cache", "temporary", "sources", "diary"
    cache, temporary, sources, diary = (tmp_path / name for name in names)
    for folder in (cache, temporary, sources):
        folder.mkdir()
    (sources / "one.c").write_text("int one(void) { return 1; }")
    (sources / "two.c").write_text("int two(void) { return 2; }")
    monkeypatch.setattr(build, "SOURCES", sources)
    temporary.chmod(0o1777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    compiler = tmp_path / "cc"

    def write(before: str = "", then: str = f'exec {GCC} "$@"') -> None:
        compiler.write_text(f'#!/bin/sh\necho "$@" >> {diary}\n{before}\n{then}\n')
        compiler.chmod(0o755)

    write()
    monkeypatch.setenv("CC", str(compiler))

    def lines() -> list[str]:
        return diary.read_text().splitlines() if diary.exists() else []

    def linked() -> int:
        """How often the library itself was made."""
        return sum("-shared" in line and "probe" not in line for line in lines())

    return SimpleNamespace(
        cache=cache,
        temporary=temporary,
        folder=cache / "sinkroute",
        sources=sources,
        write=write,
        lines=lines,
        linked=linked,
        start=lambda: start(sources),
    )


def find() -> build.Found:
    return build.find(lambda kernels: kernels.one)


def start(sources: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ALONE, build.__file__, str(sources)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def noexec(monkeypatch):
    """Folders in this set look as if their file systems were mounted noexec."""
    folders: set[Path] = set()
    true = os.statvfs

    def statvfs(path):
        return SimpleNamespace(f_flag=true(path).f_flag | (os.ST_NOEXEC if Path(path).parent in folders else 0))

    monkeypatch.setattr(build.os, "statvfs", statvfs)
    return folders


# ------------------------------------------------------------------------------------------------------------ folders


def test_they_are_compiled_once_into_the_users_own_folder(place):
    found = find()
    (path,) = place.folder.glob("*.so")
    assert found.kernels is not None and found.about == str(path) and not found.warning
    assert path.parent.stat().st_mode & 0o077 == 0
    assert find().about == str(path) and place.linked() == 1
    assert not list(place.folder.glob("unfinished-*")) and not list(place.temporary.iterdir())


@pytest.mark.parametrize("length", [0, 20, 5000])
def test_half_a_library_is_not_loaded_but_compiled_anew(place, length):
    find()
    (path,) = place.folder.glob("*.so")
    content = path.read_bytes()[:length]
    path.unlink()  # what is loaded is not to be changed
    path.write_bytes(content)
    assert find().kernels is not None and build._is_whole(path) and place.linked() == 2


def test_a_library_that_cannot_be_loaded_is_compiled_anew(place):
    place.start().communicate(timeout=60)  # not this process, which would be handed what it has loaded already
    (path,) = place.folder.glob("*.so")
    content = b"no library at all"
    path.write_bytes(content + build.hashlib.sha256(content).digest())
    assert find().kernels is not None and place.linked() == 2


def test_a_library_with_other_functions_is_compiled_anew(place):
    find()
    assert build.find(lambda kernels: kernels.three).kernels is None
    assert place.linked() == 3  # in both folders


def test_a_folder_that_others_can_write_to_is_not_trusted(place):
    place.folder.mkdir()
    place.folder.chmod(0o777)
    assert find().about.startswith(str(place.temporary))
    assert not list(place.folder.iterdir())


@pytest.mark.parametrize("others", ["open", "link"])
def test_nor_is_one_among_the_temporary_files_that_others_could_have_put_there(place, tmp_path, others):
    place.folder.write_text("no folder")
    if others == "open":  # without the sticky bit anyone may rename anything
        place.temporary.chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        (place.temporary / f"sinkroute-{os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    found = find()
    assert found.kernels is None and "no folder that only this user can write to" in found.about
    assert not place.lines()


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_a_folder_that_moves_with_the_process_is_none(monkeypatch, place, tmp_path, variable):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, "here")
    monkeypatch.chdir(tmp_path)
    where = tmp_path / "home" if variable == "XDG_CACHE_HOME" else place.temporary
    assert find().about.startswith(str(where)) and not (tmp_path / "here").exists()


def test_a_library_is_found_in_a_folder_that_is_for_reading_only(monkeypatch, place):
    find()
    monkeypatch.setattr(build, "_is_writable", lambda folder: False)
    assert find().kernels is not None and place.linked() == 1


# --------------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize("command", ['gcc "', "no-such-compiler", "cat", "true", "/"])
def test_whatever_is_called_a_compiler_is_no_error(monkeypatch, place, command):
    monkeypatch.setenv("CC", command)
    found = find()
    assert found.kernels is None and "could not be compiled" in found.about and "torch does the work" in found.warning


def test_spaces_are_no_compiler(monkeypatch, place):
    monkeypatch.setenv("CC", "  ")
    monkeypatch.setenv("PATH", f"{place.cache.parent}:{os.environ['PATH']}")
    assert find().kernels is not None


def test_what_nobody_thought_of_is_no_error(monkeypatch, place):
    def broken(command):
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(build, "_digest", broken)
    found = find()
    assert found.kernels is None and "surprise" in found.about and found.warning


def test_the_words_of_a_compiler_that_fails_are_kept_and_it_is_not_asked_again(place):
    place.write("echo the disk is full >&2", "exit 1")
    first, asked = find(), len(place.lines())
    assert first.kernels is None and "the disk is full" in first.about and "the disk is full" in first.warning
    second = find()
    assert second.kernels is None and "the disk is full" in second.about and not second.warning
    assert len(place.lines()) == asked


def test_a_failure_is_forgotten_after_a_day_or_with_its_file(place):
    place.write("", "exit 1")
    find()
    (failure,) = place.folder.glob("*.failed")
    assert str(failure) in find().about
    place.write()
    assert find().kernels is None
    yesterday = time.time() - build.SECONDS_TO_REMEMBER - 60
    os.utime(failure, (yesterday, yesterday))
    assert find().kernels is not None


def test_a_compiler_that_was_killed_is_asked_again_by_the_next_process(place):
    place.write("kill -9 $$")
    assert find().warning and find().warning
    place.write()
    assert find().kernels is not None


def test_an_error_in_the_sources_is_met_once(place):
    (place.sources / "one.c").write_text("int one(void) { return undeclared; }")
    assert "undeclared" in find().about
    assert sum("one.c" in line for line in place.lines()) == 1


@pytest.mark.parametrize("sleep", ["exec sleep 60", "sleep 60"])  # itself, and in a program that it calls
def test_a_compiler_that_hangs_is_left(monkeypatch, place, sleep):
    monkeypatch.setattr(build, "SECONDS_TO_COMPILE", 0.3)
    place.write(sleep)
    before = time.monotonic()
    assert "did not end" in find().about and time.monotonic() - before < 20


def test_a_server_that_a_compiler_leaves_running_is_not_waited_for(place):
    place.write("sleep 60 &")
    before = time.monotonic()
    assert find().kernels is not None and time.monotonic() - before < 50


def test_flags_that_the_compiler_does_not_know_are_left_out(place):
    place.write('case "$*" in *-fopenmp\\ *|*-mprefer*) echo unknown flag >&2; exit 1;; esac')
    assert find().kernels is not None
    assert place.linked() == 1 and sum("one.c" in line for line in place.lines()) == 1


def test_flags_whose_library_cannot_be_loaded_are_left_out(place):
    place.write('case "$*" in *-fopenmp\\ *probe.c*) while [ "$1" != -o ]; do shift; done; echo > "$2"; exit;; esac')
    assert find().kernels is not None
    assert place.linked() == 1 and "-fopenmp-simd" in place.lines()[-1]


def test_a_cache_that_must_not_hold_programs_is_passed_over(place, noexec):
    noexec.add(place.cache)
    assert find().about.startswith(str(place.temporary)) and place.linked() == 1
    assert find().kernels is not None and place.linked() == 1


def test_a_machine_that_cannot_keep_what_it_compiles_does_not_compile_and_is_told_once(place, noexec):
    noexec.update((place.cache, place.temporary))
    first, second = find(), find()
    assert first.kernels is None and "noexec" in first.warning and not second.warning
    assert "noexec" in second.about and not place.lines()
    noexec.clear()
    assert find().kernels is not None


def test_a_cache_from_which_code_is_not_loaded_all_the_same_is_passed_over(monkeypatch, place):
    true = build.ctypes.CDLL

    def load(path):
        if str(place.cache) in path:
            raise OSError("failed to map segment from shared object")
        return true(path)

    monkeypatch.setattr(build.ctypes, "CDLL", load)
    assert find().about.startswith(str(place.temporary)) and place.linked() == 1


# --------------------------------------------------------------------------------------------------- several processes


def test_of_processes_that_start_together_one_compiles_and_all_have_the_kernels(place):
    place.write("sleep 0.1")
    processes = [place.start() for _ in range(6)]
    said = [process.communicate(timeout=100) for process in processes]
    assert [out.split()[:2] for out, _ in said] == [["True", "False"]] * 6, said
    assert place.linked() == 1


def test_of_processes_that_start_together_one_fails_and_is_told(place):
    place.write("sleep 0.1", "exit 1")
    processes = [place.start() for _ in range(4)]
    said = [process.communicate(timeout=100)[0].split()[:2] for process in processes]
    assert sorted(said) == [["False", "False"]] * 3 + [["False", "True"]]


def test_threads_that_start_together_compile_once(place):
    found = []
    threads = [threading.Thread(target=lambda: found.append(find())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(one.kernels is not None for one in found) and place.linked() == 1


def test_a_process_that_was_killed_while_it_compiled_is_replaced(place):
    place.write("sleep 30")
    killed = place.start()
    wait_for(place.lines)
    place.write()
    waiting = place.start()
    time.sleep(0.3)
    assert waiting.poll() is None and place.linked() == 0
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert waiting.communicate(timeout=30)[0].startswith("True") and place.linked() == 1


def test_what_a_killed_process_left_is_removed_later(place):
    old, new = (place.folder / f"unfinished-{age}" for age in ("old", "new"))
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    find()
    assert not old.exists() and new.exists()


def test_a_process_waits_no_longer_than_a_compiler_may_take(monkeypatch, place):
    monkeypatch.setattr(build, "SECONDS_TO_COMPILE", 0.2)
    place.folder.mkdir(mode=0o700)
    lock = place.folder / f"kernels-{build._digest(build.compiler())}.lock"
    with build._alone(lock):
        found = find()
    assert found.kernels is None and "another process" in found.about and found.warning
    assert not list(place.folder.glob("*.failed")) and not place.lines()


def test_waiting_that_takes_long_is_said(monkeypatch, place, capfd):
    monkeypatch.setattr(build, "SECONDS_IN_SILENCE", 0)
    find()
    assert capfd.readouterr().err.count("the C kernels are being compiled, once") == 1
    find()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_error(monkeypatch, place, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(build.fcntl, "flock", flock)
    assert find().kernels is not None


def test_a_system_without_flock_is_no_error(monkeypatch, place):
    monkeypatch.setattr(build, "fcntl", None)
    assert find().kernels is not None
