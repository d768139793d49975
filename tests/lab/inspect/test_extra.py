"""`inspect` runs with its extra alone: without gensim, attacks, pandas and whatever else the lab needs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from sinkroute import _errors, cli

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# The command line, where only what `allowed` names, and what that needs, is installed.
CODE = """
import importlib.machinery, sys
hidden, finder = set(sys.argv.pop(1).split()), importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] in hidden else finder(name, *rest))
from sinkroute.cli import main
sys.exit(main(sys.argv[1:]))
"""


def packages(extra: str) -> set[str]:
    """The names of what an extra asks for, those of `sinkroute[...]` in place of it."""
    found = set()
    for line in EXTRAS[extra]:
        name, more = re.match(r"([\w-]+)(?:\[(\w+)\])?", line).groups()
        found |= packages(more) if name == "sinkroute" else {name.lower()}
    return found


def run(hidden: set[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CODE, " ".join(hidden), *words], capture_output=True, text=True)


def test_inspect_needs_its_extra_alone(save: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    away = packages("dev") | packages("track") | packages("sweep") | {"pyarrow"}  # which comes with datasets
    away -= packages("inspect") | {"triton", "tokenizers"}  # torch's and transformers' own
    hidden = {
        file.parts[0]  # packages_distributions() of Python 3.10 knows only what tells its modules
        for package in importlib.metadata.distributions()
        if package.name.lower() in away
        for file in package.files or ()
        if len(file.parts) == 2 and file.name == "__init__.py"
    }
    assert {"gensim", "pandas", "matplotlib", "sklearn", "scipy", "pyautoattack", "datasets"} <= hidden
    words = ["inspect", str(save("mixtral")), "--text", str(text), "--tokens", "60", "--length", "10"]
    done = run(hidden, *words, "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"inspect.html", "inspect.json", "tokens.html"}


@pytest.mark.parametrize(
    ("module", "command", "cure"),
    [
        ("jinja2", "inspect", 'pip install "sinkroute[inspect]"'),
        ("transformers", "inspect", 'pip install "sinkroute[inspect]"'),
        ("jinja2", "report", 'pip install "sinkroute[lab]"'),
        ("sklearn.datasets", "train", 'pip install "sinkroute[lab]"'),
        ("PIL", "train", 'pip install "sinkroute[lab]"'),
        ("pyarrow", "train", 'pip install "sinkroute[lab]"'),
        ("wandb", "train", 'pip install "sinkroute[track]"'),
        ("lm_eval", "evaluate", 'pip install "sinkroute[eval]"'),
        ("numpy", "train", "pip install numpy"),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, command: str, cure: str
) -> None:
    lines = [f"{name}>=1; extra == '{extra}'" for extra in EXTRAS for name in packages(extra)]
    monkeypatch.setattr(_errors.importlib.metadata, "requires", lambda name: ["numpy>=2", *lines])
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert cli._words(error, command) == f"the package {module!r} is missing: {cure}"


def test_without_the_package_s_metadata_the_name_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_errors.importlib.metadata, "requires", requires)
    assert _errors.install_command("lm_eval", "eval") == "pip install lm-eval"
