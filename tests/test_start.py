"""How the command line starts: what is imported before it is needed. (Not in seconds, which are the machine's.)"""

import json
import subprocess
import sys

import pytest

from sinkroute.commands import COMMANDS

HEAVY = {"torch", "transformers", "matplotlib", "accelerate", "datasets", "scipy", "pandas", "sklearn", "gensim"}
WHAT_IS_LOADED = """
import contextlib, io, json, sys
from sinkroute.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:
        code = int(ended.code or 0)
print(json.dumps([code, sorted(sys.modules)]))
"""


def loaded(*words):
    """Exit code, and which of the heavy packages a call leaves in memory."""
    command = [sys.executable, "-c", WHAT_IS_LOADED, *map(str, words)]
    code, modules = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return code, HEAVY & set(modules)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["trian"], *([name, "--help"] for name in COMMANDS)],
)
def test_help_version_and_a_wrong_word_load_nothing_heavy(words):
    code, found = loaded(*words)
    assert code == (2 if words == ["trian"] else 0)
    assert found == set()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train", "nosuch"], 1),
        (["train", "wikipedia-ssr", "--train.stpes", "5"], 2),
        (["evaluate", "nosuch"], 1),
        (["evaluate", "nosuch", "--split", "vaild"], 2),
        (["export", "nosuch", "--output", "x"], 1),
        (["report"], 2),
        (["inspect", "nosuch", "--tokens", "many"], 2),
        (["bench", "--thraeds", "1"], 2),
    ],
)
def test_a_wrong_command_line_is_told_before_torch_is_loaded(words, code):
    assert loaded(*words) == (code, set())


@pytest.mark.parametrize("words", [["models", "wikipedia-ssr"], ["routers"], ["routers", "ssr-dual"]])
def test_what_is_listed_from_classes_needs_torch_alone(words):
    assert loaded(*words) == (0, {"torch"})
