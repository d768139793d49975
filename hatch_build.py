"""What building adds to the files: compiled C kernels in a wheel, and a README whose links work on a package index.

On Linux on x86-64 with a C compiler a wheel holds the kernels once for each of `LEVELS`, and is one for all versions of
Python (py3-none-linux_x86_64). Elsewhere, and where compiling fails, it holds none and fits every machine
(py3-none-any): the sources in it are compiled at first use. `SINKROUTE_WHEEL=compiled` makes that an error, for a
release; `SINKROUTE_WHEEL=pure` asks for it.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

NATIVE = Path("src", "sinkroute", "kernels", "native")
LINK = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


class Kernels(BuildHookInterface[Any]):
    """Compile the kernels into a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("SINKROUTE_WHEEL", "")
        if self.target_name != "wheel" or version == "editable" or wanted == "pure":
            return
        self.work = tempfile.TemporaryDirectory(prefix="sinkroute-wheel-")
        try:
            libraries = compile_kernels(Path(self.root, NATIVE), Path(self.work.name))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            if wanted == "compiled":
                raise RuntimeError(f"SINKROUTE_WHEEL=compiled, but the kernels cannot be compiled: {said}") from error
            self.app.display_warning(f"The C kernels are not in this wheel, but compiled at first use: {said}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"  # `auditwheel repair` turns it into a manylinux tag (Makefile)
        folder = NATIVE.relative_to("src").as_posix()
        build_data["force_include"].update({str(path): f"{folder}/{path.name}" for path in libraries})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "work"):
            self.work.cleanup()


class Readme(MetadataHookInterface):
    """The README with links to the files of this version in the repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = with_whole_links(text, metadata["urls"]["Repository"], metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_whole_links(text: str, repository: str, version: str) -> str:
    """Markdown with relative links made whole: to the files at the tag of the version, to pictures as they are."""

    def whole(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/v{version}/{path})"

    return LINK.sub(whole, text)


def compile_kernels(sources: Path, folder: Path) -> list[Path]:
    """One library for each level, in `folder`.

    Raises:
        OSError: no compiler, or another platform than Linux on x86-64.
        subprocess.SubprocessError: the compiler fails.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise OSError(f"compiled wheels are made on linux x86_64 only, this is {sys.platform} {platform.machine()}")
    build = load_build(sources)
    if not (compiler := build.compiler()):
        raise OSError("no C compiler")

    def compiled(level: str) -> Path:
        path = folder / f"kernels-{level}.so"
        flags = [f"-march={level}" if flag == "-march=native" else flag for flag in build.FLAGS]
        command = [*compiler, *flags, *build.THREADS[0], "-shared", "-s", "-o", str(path)]
        command += map(str, sorted(sources.glob("*.c")))
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        return path

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, build.LEVELS))


def load_build(sources: Path) -> ModuleType:
    """The module that compiles at first use; it needs the standard library alone, the package itself torch."""
    spec = importlib.util.spec_from_file_location("sinkroute_native_build", sources / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
