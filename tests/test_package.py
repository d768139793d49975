"""The package as a whole: what it shows, what it imports, how fast, and which floor rests on which."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sinkroute

ROOT = Path(sinkroute.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
FLOORS = ["transport", "routing", "moe"]  # each may use those before it


def run(code, env=None):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return done.stdout.strip()


def imports(path):
    """Absolute names of all modules that a source imports, wherever in it."""
    package = ["sinkroute", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of_floors(*floors):
    return [name for name in SOURCES if name.split("/")[0] in floors]


def test_the_public_names_are_these():
    assert sorted(sinkroute.__all__) == [
        "LoadMonitor",
        "MoE",
        "MultiHeadMoE",
        "Plan",
        "Router",
        "Routes",
        "balanced_topk",
        "create_router",
        "end_step",
        "list_routers",
        "no_balancing",
        "patch",
        "set_inference",
        "set_step",
        "solve",
    ]
    assert all(getattr(sinkroute, name).__doc__ for name in sinkroute.__all__)


def test_every_name_that_a_module_declares_public_exists():
    for name in of_floors(*FLOORS):
        module = "sinkroute." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        declared = __import__(module, fromlist=["__all__"])
        assert all(hasattr(declared, public) for public in declared.__all__), module


@pytest.mark.parametrize("module", ["", ".transport", ".routing", ".moe", ".adapters.hf"])
def test_every_public_name_has_an_example_which_runs_as_a_doctest(module):
    floor = importlib.import_module(f"sinkroute{module}")
    public = {name: getattr(floor, name) for name in floor.__all__}
    bare = [name for name, it in public.items() if callable(it) and ">>> " not in (inspect.getdoc(it) or "")]
    assert [name for name in bare if name != "Router"] == []  # the base of all: create_router shows it


def test_the_example_in_three_lines_runs():
    layer = sinkroute.MoE(d_model=8, d_hidden=16, num_experts=4, top_k=2)
    sinkroute.set_step(layer, 0)
    assert layer(torch.zeros(2, 3, 8)).shape == (2, 3, 8)


def test_import_is_light():
    heavy = "transformers matplotlib accelerate datasets pandas gensim sklearn scipy yaml rich tyro torch._dynamo"
    use = "[getattr(sinkroute, name) for name in sinkroute.__all__]"
    code = f"import sys, sinkroute; {use}; print(*[name for name in {heavy.split()} if name in sys.modules])"
    assert run(code) == ""


def test_the_package_alone_does_not_even_import_torch():
    assert run("import sys, sinkroute; print('torch' in sys.modules)") == "False"


def test_floors_are_attributes_of_the_package():
    assert run("import sinkroute; print(sinkroute.routing.list_routers() == sinkroute.list_routers())") == "True"


def test_an_unknown_attribute_is_an_error():
    with pytest.raises(AttributeError, match="module 'sinkroute' has no attribute 'slove'"):
        sinkroute.slove  # noqa: B018


def test_import_takes_no_longer_than_a_fifth_of_what_torch_takes():
    # Everything public is asked for: the package itself loads its parts lazily.
    use = "import sinkroute; [getattr(sinkroute, name) for name in sinkroute.__all__]"
    # Of the process's own time, and beside torch's: the package does not answer for how fast or busy the machine is.
    code = f"from time import process_time as t; a = t(); import torch; b = t(); {use}; print((t() - b) / (b - a))"
    # With compiled bytecode, as torch's is: what sets this variable would have ours compiled anew each time.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    assert any(float(run(code, env=kept)) <= 0.2 for _ in range(4))


@pytest.mark.parametrize("name", of_floors(*FLOORS))
def test_the_library_needs_torch_numpy_and_the_standard_library_only(name):
    # Below, NumPy (an operation on E numbers costs it a third of what it costs torch), and Triton for a GPU alone.
    # typing_extensions comes with torch.
    allowed = {"torch", "typing_extensions", "sinkroute", *sys.stdlib_module_names} | (
        {"numpy", "triton"} if name.startswith("transport/") else set()
    )
    assert {module.split(".")[0] for module in imports(SOURCES[name])} <= allowed


@pytest.mark.parametrize("name", of_floors(*FLOORS))
def test_floors_rest_on_those_below_them_only(name):
    above = [*FLOORS[FLOORS.index(name.split("/")[0]) + 1 :], "lab", "commands", "cli"]
    forbidden = {f"sinkroute.{floor}" for floor in above}
    used = {".".join(module.split(".")[:2]) for module in imports(SOURCES[name])}
    assert not used & forbidden
    # The root imports every floor: whoever imports from it rests on all of them.
    assert not used & {f"sinkroute.{public}" for public in sinkroute.__all__}


@pytest.mark.parametrize("name", [name for name in SOURCES if name.split("/")[0] not in ("lab", "commands", "cli.py")])
def test_nothing_but_the_lab_and_the_command_line_uses_the_lab(name):
    assert not [module for module in imports(SOURCES[name]) if module.startswith("sinkroute.lab")]


def test_the_scan_of_imports_sees_all_its_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "moe").mkdir()
    source = tmp_path / "moe" / "layer.py"
    source.write_text(
        "import numpy as np\nfrom sinkroute import lab\nfrom . import experts\nfrom ..lab import run\n"
        "def late():\n    from pandas.core import frame\n"
    )
    assert set(imports(source)) == {
        "numpy",
        "sinkroute",
        "sinkroute.lab",
        "sinkroute.moe",
        "sinkroute.moe.experts",
        "sinkroute.lab.run",
        "pandas.core",
        "pandas.core.frame",
    }
