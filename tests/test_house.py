"""The rules of the house that a test can keep: which way imports go, how long a file is, what texts say."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sinkroute"
# What a floor may import: itself and what stands to its left. Modules at the root are under all floors, but for the
# command line. `sinkroute/__init__.py` is a table of names that are loaded when first asked for.
FLOORS = ("", "kernels", "transport", "routing", "moe", "adapters", "lab", "commands", "cli")
SHORT = ("kernels", "transport", "routing", "moe", "adapters")  # the lab's rooms are its own
LINES, COLUMNS = 400, 120
# A name of two modules on one floor, with what makes them one idea.
TWICE = {
    "registry": "names of routers, and of losses",
}
FORBIDDEN = re.compile(
    r"\bof (its|their|his|her|your|our|my|one's) own\b|\bnone of\b|nobody's business|no business of|\bwhich see\b",
    re.IGNORECASE,
)


@cache
def modules():
    """Dotted name → file, of all of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor(module):
    name = module.split(".")[1] if "." in module else ""
    return name if name in FLOORS else ""


def is_for_types(node):
    """`if TYPE_CHECKING:`, whose imports take place nowhere."""
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def imported(node, package):
    """Dotted names that a tree imports, inside functions too."""
    if is_for_types(node):
        for part in node.orelse:
            yield from imported(part, package)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        # A name is a module of the package, or something that the package holds.
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if full in modules() else base
    for part in ast.iter_child_nodes(node):
        yield from imported(part, package)


@cache
def imports():
    """Module → the modules of the package that it imports."""
    found = {}
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        names = imported(ast.parse(path.read_text(encoding="utf-8")), package)
        found[name] = {other for other in names if other in modules()} - {name}
    return found


def circles(graph):
    """The strongly connected parts of more than one node (Tarjan), each sorted."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            part, stack[place:] = stack[place:], []
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def texts():
    """What people read: the pages of the documentation and those at the root."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def sources():
    """All that people wrote: texts, and code with its comments."""
    folders = ("src", "tests", "scripts", "benchmarks", "examples", "experiments")
    kinds = (".py", ".c", ".h", ".md", ".j2", ".yaml")
    written = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    return sorted([*texts(), ROOT / "Makefile", *(path for path in written if path != Path(__file__))])


# -- imports -------------------------------------------------------------------------------------------------------


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_an_import_for_types_is_none_and_one_in_a_function_is_one():
    tree = ast.parse("if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from .c import d\n")
    assert list(imported(tree, "p")) == ["b", "p.c"]


def test_imports_go_down():
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in sorted(others)
        if name != "sinkroute" and FLOORS.index(floor(other)) > FLOORS.index(floor(name))
    ]
    assert upward == []


def test_the_layer_and_the_adapters_know_nothing_of_each_other():
    both = {"adapters", "moe"}
    assert [n for n, others in imports().items() if both <= {floor(n), *map(floor, others)} and floor(n) in both] == []


def test_no_import_is_part_of_a_circle():
    assert circles(imports()) == []


# -- files ---------------------------------------------------------------------------------------------------------


def test_no_file_of_the_floors_below_the_lab_is_longer_than_400_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: n for name, n in lengths.items() if floor(name) in SHORT and n > LINES} == {}
    sources = [path for ending in "ch" for path in (PACKAGE / "kernels" / "native").glob(f"*.{ending}")]
    assert sources and {path.name: n for path in sources if (n := len(path.read_text().splitlines())) > LINES} == {}


def test_no_two_modules_of_a_floor_have_the_same_name():
    by_name = defaultdict(list)
    for name, path in modules().items():
        if floor(name) in SHORT and path.name != "__init__.py":
            by_name[floor(name), path.stem].append(name)
    twice = {stem: names for (_, stem), names in by_name.items() if len(names) > 1}
    assert {stem: names for stem, names in twice.items() if stem not in TWICE} == {}
    assert set(TWICE) <= set(twice), "an exception that is none any more"


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.name)
def test_lines_of_texts_end_at_120_characters(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    # The row of a table is one line, however long.
    assert [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS and not line.lstrip().startswith("|")] == []


def test_no_text_or_comment_says_it_in_words_that_the_style_forbids():
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}"
        for path in sources()
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


def test_looking_for_tests_leaves_torch_as_it_is():
    """What stands in for a GPU in the peers' processes must not be imported into this one."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    for own in (dist.barrier, dist.all_to_all, FSDPModule.set_gradient_divide_factor):
        assert own.__module__.startswith("torch."), own
