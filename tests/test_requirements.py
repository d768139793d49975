"""The environments: what pyproject.toml allows, what requirements/ pins, and what the workflow calls."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = ["locked.txt", "oldest.txt"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def read(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def declared(*extras: str) -> list[Requirement]:
    """The direct dependencies of the project with these extras, those of `sinkroute[...]` in place of it."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    for extra in extras:
        for one in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += declared(*one.extras) if one.name == "sinkroute" else [one]
    return found


def on(python: str, platform: str) -> dict[str, Any]:
    """Markers of a CPython on that platform, for `Marker.evaluate`."""
    system = {"linux": "Linux", "darwin": "Darwin"}[platform]
    return default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": platform,
        "platform_system": system,
        "platform_machine": "x86_64" if platform == "linux" else "arm64",
    }


def versions(name: str, python: str, platform: str) -> dict[str, str]:
    """What is installed from that file, by name."""
    chosen = [one for one in read(name) if one.marker is None or one.marker.evaluate(on(python, platform))]
    assert len({one.name for one in chosen}) == len(chosen), "two versions of one package"
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in chosen}


def lowest(one: Requirement) -> str:
    return next(part.version for part in one.specifier if part.operator in (">=", "=="))


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_every_direct_dependency_has_a_lower_bound(extra: str | None) -> None:
    found = declared(*([extra] if extra else []))
    assert [str(one) for one in found if not any(part.operator in (">=", "==") for part in one.specifier)] == []


@pytest.mark.parametrize("name", LOCKS)
def test_requirements_are_exact_versions_and_leave_torch_to_its_own_build(name: str) -> None:
    found = read(name)
    assert [str(one) for one in found if [part.operator for part in one.specifier] != ["=="]] == []
    assert [one.name for one in found if one.name == "torch" or one.name.startswith(("nvidia-", "cuda-"))] == []


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_all_that_demo_and_test_ask_for(python: str, platform: str) -> None:
    pinned = versions("locked.txt", python, platform)
    for one in declared("lab", "dev"):
        if one.name != "torch" and (one.marker is None or one.marker.evaluate(on(python, platform))):
            assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one
    # What torch asks for besides, and what builds the project and what has no wheel.
    assert pinned.keys() >= {"filelock", "fsspec", "jinja2", "mpmath", "networkx", "setuptools", "sympy", "hatchling"}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    pinned = versions("oldest.txt", "3.10", "linux")
    higher = {}
    for one in declared("lab", "dev"):
        found = pinned.get(canonicalize_name(one.name))
        if found is not None and Version(found) != Version(lowest(one)):
            higher[one.name] = f"{found}, not {lowest(one)}"
    assert higher == {}


def test_the_oldest_torch_is_the_lower_bound() -> None:
    (torch,) = (one for one in declared() if one.name == "torch")
    assert f"\nTORCH_OLDEST ?= torch=={lowest(torch)}.0\n" in MAKEFILE
    assert f"\nPYTHON_OLDEST ?= python{PROJECT['requires-python'].removeprefix('>=')}\n" in MAKEFILE


def test_the_workflow_calls_targets_and_versions_of_the_makefile() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    matrix = job["strategy"]["matrix"]
    targets = {*matrix["target"], *(one["target"] for one in matrix["include"])}
    assert targets == {"test", "test-oldest", "test-latest"}
    targets |= {*workflow["jobs"]["release"]["strategy"]["matrix"]["target"]}
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE) for target in targets)
    for name, of_job in (("TORCH", job), ("TORCH_OLDEST", job), ("TORCH", workflow["jobs"]["release"])):
        assert f"\n{name} ?= {of_job['env'][name].split()[0]}\n" in MAKEFILE
    assert matrix["python"] == [PYTHONS[0], PYTHONS[-1]]
