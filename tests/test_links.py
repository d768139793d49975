"""Every link of the README and of the pages leads to what is there: a file, and in a page the heading that it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """What GitHub makes of headings: lower case, hyphens for blanks, no other punctuation; -1, -2 for repetitions."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(text), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("]", heading).lower()).replace(" ", "-")
        number = sum(other == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", other) is not None for other in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken(page: Path) -> list[str]:
    out = []
    for link in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        missing = not target.exists()
        if missing or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            out.append(link)
    return out


def test_anchors_are_those_of_github():
    text = "# A `b`, c: d!\n\n## A-b\n\n## A-b\n\n```bash\n# no heading\n```\n\n### Ω × 2 [x](y.md)\n"
    assert anchors(text) == {"a-b-c-d", "a-b", "a-b-1", "ω--2-x"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_link_of_a_page_leads_somewhere(page):
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "there.md").write_text("## Here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](there.md#here) [b](there.md#gone) [c](gone.md) [d](#top) [e](#bottom) [f](https://x.y/#z)\n"
    )
    assert broken(page) == ["there.md#gone", "gone.md", "#bottom"]


def test_each_page_is_in_the_contents_of_the_readme():
    linked = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES if page.parent == ROOT / "docs"}
    pages.remove("docs/index.md")  # the contents of the site
    assert pages - {link.partition("#")[0] for link in linked} == set()
