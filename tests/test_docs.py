"""The site of the documentation: every page is in its contents, links lead on, docstrings are shown as written."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_of_the_site", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs():
    return load(ROOT / "scripts" / "docs.py")


@pytest.fixture(scope="module")
def sources(docs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "sources"
    docs.lay_out(folder, "https://a.b/blob/v1")
    return folder


def test_each_page_is_once_in_the_contents_of_the_site(docs, sources):
    contents = re.findall(r"```\{toctree\}\n(.*?)```", (sources / "index.md").read_text(), flags=re.DOTALL)
    lines = [line for part in contents for line in part.splitlines() if line and not line.startswith(":")]
    listed = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]
    pages = {path.relative_to(sources).with_suffix("").as_posix() for path in sources.rglob("*.md")} - {"index"}
    assert sorted(listed) == sorted(pages)
    assert {f"api/{module}" for module in docs.MODULES} <= pages


def test_each_link_leads_to_a_page_of_the_site_or_into_the_repository(sources):
    for page in sources.glob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text):
            there = sources / link
            assert there.exists() or there.with_suffix(".md").exists() or (sources / f"{link}.md").exists(), link
        into = re.findall(r"\(https://a\.b/blob/v1/([^)#]+)", text)
        assert [path for path in into if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("docs/costs.md", "[a](study.md#b)", "[a](study.md#b)"),
        ("docs/costs.md", "[a](../README.md#b)", "[a](readme.md#b)"),
        ("README.md", "![a](docs/demo.png)", "![a](demo.png)"),
        ("README.md", "[a](LICENSE)", "[a](https://a.b/LICENSE)"),
        ("docs/costs.md", "[a](../src/x.py)", "[a](https://a.b/src/x.py)"),
        ("docs/costs.md", "[a](#b) [c](https://x.y/z)", "[a](#b) [c](https://x.y/z)"),
        ("README.md", "```\n[a](docs/b.md)\n```", "```\n[a](docs/b.md)\n```"),
    ],
)
def test_a_link_of_a_page_is_made_one_of_the_site(docs, page, link, there):
    assert docs.on_the_site(link, page, "https://a.b") == there


def test_docstrings_become_what_sphinx_reads():
    conf = load(ROOT / "docs" / "conf.py")
    assert doctest.testmod(conf) == (0, doctest.testmod(conf).attempted) and doctest.testmod(conf).attempted
    assert conf.as_rst(["Args:", "    x_E: *args of `f`, not_"]) == ["Args:", "    x_E: \\*args of ``f``, not\\_"]
    assert conf.as_rst(["As `a", "b` says."]) == ["As ``a", "b`` says."]
    assert conf.as_rst([">>> 2 ** 3", "8", "", "Of *some* book."]) == [">>> 2 ** 3", "8", "", "Of *some* book."]


def test_the_reference_has_the_package_and_all_that_it_shows(docs):
    import sinkroute

    assert docs.MODULES[0] == "sinkroute"
    modules = {getattr(sinkroute, name).__module__.split(".")[1] for name in sinkroute.__all__}
    assert modules <= {module.split(".")[1] for module in docs.MODULES[1:]}
