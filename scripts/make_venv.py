"""Make a virtual environment with pip, also where Debian and Ubuntu ship Python without `venv`'s pip (no python3-venv).

    python3 scripts/make_venv.py .venv

Three ways, the first that works: `venv` as it should be; `venv` without pip, filled by the system's pip; or filled by
a pip wheel fetched from the package index (PIP_INDEX_URL is honoured) and checked against the digest stated there.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv
from pathlib import Path

# The newest pip is not needed, one that every supported Python runs is.
PIP = "25.2"
PIP_WHEEL = f"pip-{PIP}-py3-none-any.whl"


def main(target: Path) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - it runs before anything could have checked
        sys.exit(
            f"sinkroute needs Python 3.10 or newer, this is {sys.version.split()[0]}; try: make PYTHON=python3.12 ..."
        )
    python = target / "bin" / "python"
    if subprocess.run([sys.executable, "-m", "venv", str(target)], capture_output=True).returncode == 0 and has_pip(
        python
    ):
        return
    venv.create(target, with_pip=False, clear=True)
    fill = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", f"pip=={PIP}"]
    subprocess.run(fill, capture_output=True)
    if has_pip(python):
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch_pip(Path(folder))
        subprocess.run([str(python), f"{wheel}/pip", "install", "-q", "--no-index", str(wheel)], check=True)


def has_pip(python: Path) -> bool:
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0


def fetch_pip(folder: Path) -> Path:
    """Download the pip wheel from the index's page of pip's files."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    try:
        with urllib.request.urlopen(index, timeout=60) as page:
            links = re.findall(r'href="([^"]+)"', page.read().decode())
        link = next(link for link in map(html.unescape, links) if f"/{PIP_WHEEL}" in link)
        address, _, digest = urllib.parse.urljoin(index, link).partition("#sha256=")
        with urllib.request.urlopen(address, timeout=60) as file:
            content = file.read()
    except (OSError, StopIteration) as error:
        sys.exit(f"cannot make a virtual environment: this Python has no pip and {index} gives none ({error!r}); "
                 "install it first, on Debian or Ubuntu: apt install python3-venv")  # fmt: skip
    if digest and hashlib.sha256(content).hexdigest() != digest:
        sys.exit(f"{PIP_WHEEL} from {index} does not have the SHA-256 that the index states; try again")
    wheel = folder / PIP_WHEEL
    wheel.write_bytes(content)
    return wheel


if __name__ == "__main__":
    main(Path(sys.argv[1]))
