"""The documentation as a site: `make docs`. Warnings are errors; nothing is fetched when it is read.

    python scripts/docs.py [--out build/docs] [--sources-only]

Pages are kept as GitHub shows them, so their links are made those of the site here: to a page, to a page of the root,
or to a file of this version in the repository. The reference is one page a module, made of docstrings; it is checked to
have every public class and function.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages of the root, by their names on the site.
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
# Whose public names the reference has; `__all__` says which they are.
MODULES = (
    "sinkroute", "sinkroute.transport", "sinkroute.routing", "sinkroute.routing.options", "sinkroute.routing.fold",
    "sinkroute.routing.ranks", "sinkroute.moe", "sinkroute.adapters.hf", "sinkroute.adapters.megatron",
    "sinkroute.adapters.torchtitan", "sinkroute.adapters.torchtitan_trainer", "sinkroute.adapters.deepspeed",
    "sinkroute.lab.config", "sinkroute.lab.data", "sinkroute.lab.images", "sinkroute.lab.models", "sinkroute.lab.tasks",
    "sinkroute.lab.training", "sinkroute.lab.run", "sinkroute.lab.attacks", "sinkroute.lab.inspect",
    "sinkroute.lab.export", "sinkroute.lab.bench",
)  # fmt: skip
HANDLES = ("sinkroute.adapters.hf",)  # users call what their classes inherit
LINK = re.compile(r"(!?\[[^]]*\])\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_the_site(text: str, page: str, files: str) -> str:
    """The text of a page, such as "docs/costs.md", with links of the site; `files` is where the repository's are."""

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            path = f"{files}/{path}"
        return f"{words}({path}{anchor or ''})"

    # What is shown as code is left alone.
    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))


def lay_out(folder: Path, files: str) -> None:
    """Everything that Sphinx reads."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder)
    for page in (*DOCS.glob("*.md"), *(ROOT / name for name in PAGES)):
        path = page.relative_to(ROOT).as_posix()
        text = on_the_site(page.read_text(encoding="utf-8"), path, files)
        (folder / PAGES.get(path, page.name)).write_text(text, encoding="utf-8")
    (folder / "api").mkdir()
    for module in MODULES:
        options = ":members:\n   :show-inheritance:"
        if module in HANDLES:
            options += "\n   :inherited-members: TrainerCallback"
        directive = f"```{{eval-rst}}\n.. automodule:: {module}\n   {options}\n```\n"
        (folder / "api" / f"{module}.md").write_text(f"# {module}\n\n{directive}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    parser.add_argument("--sources-only", action="store_true", help="lay the sources out, and build nothing")
    options = parser.parse_args()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    package = (ROOT / "src" / "sinkroute" / "__init__.py").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.*)"$', pyproject, flags=re.MULTILINE)
    (version,) = re.findall(r'^__version__ = "(.*)"$', package, flags=re.MULTILINE)
    sources, pages = options.out / "sources", options.out / "html"
    lay_out(sources, f"{repository}/blob/v{version}")
    if options.sources_only:
        return
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-E"]
    done = subprocess.run([*command, str(sources), str(pages)])
    if done.returncode:
        sys.exit(done.returncode)
    if missing := not_told(pages):
        sys.exit(f"the reference lacks {', '.join(missing)}")
    print(f"{pages / 'index.html'}")


def not_told(pages: Path) -> list[str]:
    """Public classes and functions without a place in the reference."""
    missing = []
    for module in MODULES:
        text = (pages / "api" / f"{module}.html").read_text(encoding="utf-8")
        try:
            found = importlib.import_module(module)
        except ImportError:  # of a framework that is not installed; Sphinx has read it all the same
            continue
        for name in getattr(found, "__all__", ()):
            public = getattr(found, name)
            if (inspect.isclass(public) or inspect.isfunction(public)) and f'id="{module}.{name}"' not in text:
                missing.append(f"{module}.{name}")
    return missing


if __name__ == "__main__":
    main()
