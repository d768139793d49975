"""`scripts/against.py` compares this checkout with a commit, bit for bit and in speed."""

import doctest
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "against.py"
spec = importlib.util.spec_from_file_location("against", SCRIPT)
against = importlib.util.module_from_spec(spec)
spec.loader.exec_module(against)


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=ROOT)


def has_git():
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True)
    return found.returncode == 0


def test_the_examples_in_its_docstrings_run():
    assert doctest.testmod(against).failed == 0


def test_two_nans_of_the_same_bits_are_the_same():
    assert against.difference(np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) == ""


def test_another_dtype_shape_or_text_is_a_difference():
    one = np.array([1.0, 2.0])
    assert against.difference(one, one.astype(np.float32)) == "float64 (2,) became float32 (2,)"
    assert against.difference(one, one[:1]) == "float64 (2,) became float64 (1,)"
    assert against.difference(np.array("softmax"), np.array("sinkhorn")) == "softmax became sinkhorn"


def test_what_differs_is_told_by_problem(capsys):
    base = {"solve: passes": np.array(3), "solve: matrix": np.eye(2), "route: refused": np.array("ValueError")}
    assert against.report_results(base, base)
    assert capsys.readouterr().out == "2 problems: 1 with the same bits, 1 refused by both, 0 different\n"
    assert not against.report_results(base, base | {"solve: passes": np.array(5)})
    assert capsys.readouterr().out.splitlines() == [
        "solve: passes: 1 of 1 numbers, by up to 2",
        "2 problems: 0 with the same bits, 1 refused by both, 1 different",
    ]


@pytest.mark.skipif(not has_git(), reason="not a git checkout")
def test_a_commit_is_a_folder_that_goes_afterwards():
    with against.checked_out("HEAD") as folder:
        assert (folder / "pyproject.toml").is_file()
    assert not folder.exists()
    assert str(folder) not in subprocess.check_output(["git", "-C", str(ROOT), "worktree", "list"], text=True)


@pytest.mark.skipif(not has_git(), reason="not a git checkout")
def test_the_problems_with_a_word_in_their_name_are_asked():
    found = run("HEAD", "--results", "solve 96x8 linear reg=0.5")
    assert found.returncode in (0, 1), found.stderr
    assert found.stdout.splitlines()[-1].startswith("2 problems: ")


@pytest.mark.skipif(not has_git(), reason="not a git checkout")
def test_speed_is_told_beside_the_floor():
    found = run("HEAD", "--speed", "solve 512x16", "--rounds", "2")
    assert found.returncode == 0, found.stderr
    head, line = found.stdout.splitlines()
    assert head.split() == ["commit", "ratio", "quartiles", "least", "floor", "quartiles", "least"]
    assert line.startswith("solve 512x16")
