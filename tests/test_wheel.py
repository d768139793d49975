"""What is built: kernels for a machine without a compiler, a README whose links work elsewhere, the right files."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

import sinkroute

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "src" / "sinkroute" / "kernels" / "native"
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
COMPILED = (sys.platform, platform.machine()) == ("linux", "x86_64") and (shutil.which("cc") or shutil.which("gcc"))


def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path, what: str, wanted: str) -> Path:
    """Build a wheel or an sdist of this checkout."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"SINKROUTE_WHEEL": wanted})
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not COMPILED:
        pytest.skip("kernels are compiled into wheels on Linux x86-64 only, with a C compiler")
    return build(tmp_path_factory.mktemp("wheel"), "wheel", "compiled")


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pure"), "wheel", "pure")


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """Runs code where the wheel is installed, without a compiler and with a home that cannot be written to."""
    place = tmp_path_factory.mktemp("bare")
    home, python = place / "home", place / "venv" / "bin" / "python"
    home.mkdir(mode=0o555)
    venv.create(place / "venv", with_pip=False)
    (site,) = (place / "venv" / "lib").glob("*/site-packages")
    # torch and the rest, without a line of this checkout: what a .pth file names is not searched for others.
    (site / "environment.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    kept = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PATH": str(python.parent), "COLUMNS": "200"}

    def run(*words: str) -> str:
        command = [str(python), "-W", "error::RuntimeWarning", *words]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not list(home.iterdir())  # root may write there all the same
        return done.stdout

    return run


def test_a_wheel_is_one_for_all_pythons_of_a_platform(wheel, pure):
    assert wheel.name.split("-", 2)[2] == "py3-none-linux_x86_64.whl"
    assert pure.name.split("-", 2)[2] == "py3-none-any.whl"


def test_what_a_wheel_holds(wheel, pure):
    ours = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()}
    ours |= {f"sinkroute/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "experiments").rglob("*.*")}
    ours = {name for name in ours if "__pycache__" not in name}
    held = {}
    for path in (wheel, pure):
        with zipfile.ZipFile(path) as archive:
            held[path] = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held[pure] == ours
    levels = hook().load_build(NATIVE).LEVELS
    assert held[wheel] - ours == {f"sinkroute/kernels/native/kernels-{level}.so" for level in levels}


def test_without_a_compiler_and_a_home_the_kernels_are_those_of_the_wheel_and_agree_with_torch(bare):
    code = (
        "import sinkroute, torch; from sinkroute.kernels import native\n"
        "logits = torch.randn(512, 24, generator=torch.Generator().manual_seed(0))\n"
        "ours = sinkroute.solve(logits, reg=0.1, tol=1e-6).potentials; status = native.status()\n"
        "native._found = native._found._replace(kernels=None)\n"
        "gap = (ours - sinkroute.solve(logits, reg=0.1, tol=1e-6).potentials).abs().max()\n"
        "print(sinkroute.__file__, status, float(gap))"
    )
    package, library, gap = bare("-c", code).split()
    assert Path(library).parent == Path(package).parent / "kernels" / "native" and float(gap) < 1e-5
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert ("v4" in library) == ({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"} <= flags)


def test_the_code_of_the_readme_runs_there(bare):
    bare("-c", "\n".join(CODE))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--sizes", "4096x16x2", "--seconds", "1", "--repeats", "1"], id="short"),
        pytest.param(["--quick"], id="quick", marks=pytest.mark.slow),
    ],
)
def test_the_bench_runs_there_with_the_kernels(bare, tmp_path, options):
    out = ["--out", str(tmp_path / "routing.json")]
    assert "ssr-dual" in bare("-m", "sinkroute.cli", "bench", "--routers", "ssr-dual", *options, *out)


def test_a_release_without_a_compiler_is_refused(tmp_path, monkeypatch):
    if not COMPILED:
        pytest.skip("no compiler here at all")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        build(tmp_path, "wheel", "compiled")
    assert b"SINKROUTE_WHEEL=compiled, but the kernels cannot be compiled" in refused.value.stderr
    assert build(tmp_path, "wheel", "").name.endswith("py3-none-any.whl")


def test_links_of_the_readme_lead_to_this_version(pure):
    with zipfile.ZipFile(pure) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    repository = metadata["Project-URL"].split(", ")[1]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", metadata.get_payload())
    assert len(links) > 40 and [link for _, link in links if not re.match("https://|#", link)] == []
    theirs = {(mark, link) for mark, link in links if link.startswith(repository)}
    assert ("!", f"{repository}/raw/v{metadata['Version']}/docs/demo.png") in theirs
    files = {link.removeprefix(f"{repository}/{kind}/v{metadata['Version']}/").partition("#")[0]
             for mark, link in theirs for kind in ["raw" if mark else "blob"]}  # fmt: skip
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_texts_name_the_version_of_the_package_and_the_repository_stands_in_one_place():
    version = re.escape(sinkroute.__version__)
    for name, line in (
        ("CITATION.cff", rf"^version: {version}$"),
        ("README.md", rf"^  version = \{{{version}\}}$"),
        ("CHANGELOG.md", rf"\A# Changelog\n\n## {version}\b"),
    ):
        assert re.search(line, (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE), name
    with (ROOT / "pyproject.toml").open("rb") as file:
        repository = tomllib.load(file)["project"]["urls"]["Repository"].removeprefix("https://")
    texts = [*ROOT.glob("*.*"), *(ROOT / "docs").glob("*.*"), *(ROOT / ".github").rglob("*.*")]
    assert [path.name for path in texts if path.is_file() and repository.encode() in path.read_bytes()] == [
        "pyproject.toml"
    ]


def test_a_citation_is_of_the_software_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= citation.keys()
    (paper,) = citation["references"]
    names = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in paper["authors"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme and f"author  = {{{names}}}" in readme and "2511.08972" in paper["url"]


@pytest.mark.parametrize("form", ["bug", "new-router", "wrong-counts"])
def test_forms_for_issues_are_such(form):
    read = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= read.keys()
    asked = [part for part in read["body"] if part["type"] != "markdown"]
    assert asked and all(part["attributes"]["label"] and part["id"] for part in asked)


def test_a_source_distribution_holds_what_the_repository_does(tmp_path):
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if known.returncode:
        pytest.skip("no checkout")
    with tarfile.open(build(tmp_path, "sdist", "")) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in known.stdout.splitlines() if (ROOT / name).exists()} <= held | {".gitignore"}
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
