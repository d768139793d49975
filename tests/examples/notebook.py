"""Runs a notebook's code cells in one namespace, as Jupyter would: `python notebook.py FILE [--write] [--quick]`.

`--write` puts what they print, the value of a last line and the open figures into the file, which is what people see
before they run it. `--quick` trains two steps and checks no `assert`. No kernel is needed: the test environment has no
Jupyter.
"""

import ast
import base64
import contextlib
import importlib
import io
import json
import linecache
import re
import sys
from pathlib import Path

import matplotlib as mpl
from PIL import Image

mpl.use("Agg")
import matplotlib.pyplot as plt

DOTS = 96  # an inch


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save(book, path):
    """As nbformat writes it, so that Jupyter's next save changes only what was edited."""
    text = json.dumps(book, sort_keys=True, indent=1, ensure_ascii=False, separators=(",", ": "))
    Path(path).write_text(text + "\n", encoding="utf-8")


def run_cell(source, name, namespace, quick=False):
    """The outputs of a cell, in the form of nbformat 4.

    >>> run_cell("a = 1\\nprint('one')", "a cell", {})
    [{'name': 'stdout', 'output_type': 'stream', 'text': ['one\\n']}]
    """
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(tree, name, "exec", optimize=int(quick)), namespace)  # 1: without `assert`
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs = []
    if said.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": said.getvalue().splitlines(keepends=True)})
    if value is not None:
        shown = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": shown, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=DOTS, bbox_inches="tight")
        plt.close(number)
        small = io.BytesIO()
        Image.open(picture).convert("RGB").quantize(48).save(small, "png", optimize=True)
        shown = {"image/png": base64.b64encode(small.getvalue()).decode("ascii") + "\n"}
        outputs.append({"data": shown, "metadata": {}, "output_type": "display_data"})
    return outputs


def run(book, name, quick):
    """Run all cells and give them their outputs."""
    namespace = {"__name__": "__main__"}
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        source = re.sub(r"^STEPS = \d+$", "STEPS = 2", source, flags=re.MULTILINE) if quick else source
        cell["outputs"] = run_cell(source, f"{name}[{count}]", namespace, quick)
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count
            print(*(output.get("text") or output["data"].get("text/plain", ["(a picture)"])), sep="")


def main(file, *options):
    path = Path(file).resolve()
    sys.path.insert(0, str(path.parent))  # where Jupyter runs it
    if quick := "--quick" in options:
        importlib.import_module("small_mixture").STEPS = 2
    book = load(path)
    run(book, path.name, quick)
    if "--write" in options:
        save(book, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
