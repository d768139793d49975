"""Write requirements/locked.txt and requirements/oldest.txt: `make lock`, with uv.

    python scripts/lock.py UV TORCH OLDEST_TORCH, such as: uv torch==2.13.0 torch==2.10.0

Both name exact versions of all that `make demo` and `make test` install, but for torch: that comes first and by itself,
as it has many builds. Its own requirements, triton's version among them, are those of the build on PyPI.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Parts of torch: which it needs, if any, is told by the build that is installed.
TORCHS_OWN = ("torch==", "nvidia-", "cuda-")
# What builds the project, and what has no wheel: pip's own build environments would take versions of the day.
BUILDS = ("hatchling>=1.26", "editables>=0.5", "setuptools>=77")


def lock(uv: str, target: Path, what: str, torch: str, *options: str) -> None:
    """Resolve the project with its `lab` and `dev` extras, and write the versions to `target`."""
    with tempfile.TemporaryDirectory() as folder:
        besides = Path(folder) / "besides.in"
        besides.write_text("\n".join((torch, *BUILDS)))
        command = [uv, "pip", "compile", "--python-version", "3.10", "--no-python-downloads", "--quiet", "--no-header"]
        command += ["--no-annotate", "--extra", "lab", "--extra", "dev", *options, "pyproject.toml", str(besides)]
        found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    versions = [line.rstrip() for line in found.splitlines() if line and not line.startswith(TORCHS_OWN)]
    head = [f"# {what}.", "# Written by `make lock`. Torch is not in it: it comes first and by itself (Makefile)."]
    target.write_text("\n".join([*head, *versions, ""]))
    print(f"{target.relative_to(ROOT)}: {len(versions)} lines, beside {torch}")


def main(uv: str, torch: str, oldest_torch: str) -> None:
    folder = ROOT / "requirements"
    folder.mkdir(exist_ok=True)
    what = "All that `make demo` and `make test` install, on Python 3.10 to 3.13"
    lock(uv, folder / "locked.txt", what, torch, "--universal")
    what = "The lowest versions that pyproject.toml allows, for `make test-oldest` on Python 3.10 and Linux"
    options = ("--resolution", "lowest-direct", "--python-platform", "linux")
    lock(uv, folder / "oldest.txt", what, oldest_torch, *options)


if __name__ == "__main__":
    main(*sys.argv[1:])
