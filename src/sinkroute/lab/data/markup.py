"""MediaWiki markup to plain text, roughly: a filter for training text, not a renderer.

What is dropped with all it holds: comments; `<ref>`, `<math>`, `<gallery>` and the other elements of `_HIDDEN`;
templates `{{...}}` and tables `{|...|}`, nested ones too; links to files, images, categories and other languages; bare
addresses; magic words (`__TOC__`); rules (`----`). What keeps its text: other tags, links (the words that a reader
sees), bold and italics, list items. Headings stay, as `== Title ==` on separate lines. Templates hold some words
that a reader would see (units, quotations, foreign words): these are lost.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

__all__ = ["strip_markup"]

_HIDDEN = "ref|math|gallery|timeline|source|syntaxhighlight|code|pre|score|imagemap|nowiki"

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# An element that is closed at once (`<ref name="x" />`) holds nothing: it must not swallow the text up to the next end.
_EMPTY = re.compile(rf"<(?:{_HIDDEN}|br)\b[^<>]*/>", re.IGNORECASE)
_ELEMENT = re.compile(rf"<({_HIDDEN})\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Innermost first, so that what is left around a removed one becomes innermost in turn.
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", re.DOTALL)
# A file, a category, another language (`de:`, `zh-yue:`) or project; `[[:Category:x]]` is a link like any other.
_UNSEEN = re.compile(r"(?:file|image|category|media|[a-z]{2,3}(?:-[a-z-]+)?|simple)\s*:", re.IGNORECASE)
_LABELLED_ADDRESS = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]+(?:[ \t]+([^\]\n]*))?\]")
_ADDRESS = re.compile(r"(?:https?|ftp)://[^\s\]|}]+")
_QUOTES = re.compile(r"'{2,5}")
_MAGIC = re.compile(r"__[A-Z]+__")
_RULE = re.compile(r"^-{4,}", re.MULTILINE)
_BULLET = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
# What is left of tables and templates that do not close.
_TABLE_LINE = re.compile(r"^[ \t]*(?:\{\||\|\}|\||!).*$", re.MULTILINE)


def strip_markup(wikitext: str) -> str:
    """The text of a page, one paragraph, list item or heading a line.

    Args:
        wikitext: The source of a page. Entities that XML needs (`&lt;`) are resolved, others (`&nbsp;`) need not be.

    Returns:
        Lines without blank ones between them and without spaces around them.

    >>> page = "{{infobox|a={{b}}}}'''Moss''' is [[Plant|a plant]].<ref>Smith</ref>\\n\\n== Uses ==\\n* peat"
    >>> print(strip_markup(page))
    Moss is a plant.
    == Uses ==
    peat
    """
    text = _COMMENT.sub("", wikitext)
    text = _EMPTY.sub(" ", text)
    text = _ELEMENT.sub("", text)
    text = _TAG.sub("", text)
    text = _repeat(_TEMPLATE, text)
    text = _repeat(_TABLE, text)
    # Before the links: `]` of an address in a caption must not stand beside the caption's own end.
    text = _LABELLED_ADDRESS.sub(r"\1", text)
    text = _repeat(_LINK, text, _seen)
    for pattern in (_ADDRESS, _QUOTES, _MAGIC, _RULE, _BULLET, _TABLE_LINE):
        text = pattern.sub("", text)
    lines = (line.strip() for line in html.unescape(text).replace("\xa0", " ").split("\n"))
    return "\n".join(line for line in lines if line)


def _repeat(pattern: re.Pattern[str], text: str, replacement: Callable[[re.Match[str]], str] = lambda _: "") -> str:
    """Replace until nothing matches: what is nested n deep takes n rounds."""
    found = 1
    while found:
        text, found = pattern.subn(replacement, text)
    return text


def _seen(link: re.Match[str]) -> str:
    """What a reader sees of a link's inside."""
    target, _, label = link[1].partition("|")
    if _UNSEEN.match(target):
        return ""
    return label.rpartition("|")[2] or target.lstrip(":")
