"""The articles of the Wikipedia dump head inside gensim, as words: a word-level corpus that needs no download.

A stand-in for WikiText-103 (Merity et al. 2017, arXiv 1609.07843) in its kind, not in its size: articles under
`= Title =`, section headings under `= = Title = =`, punctuation split off, `@-@` `@,@` `@.@` where it joins a word or a
number, words seen fewer than three times in the train split replaced by `<unk>`, `<eos>` at the end of a line. What
differs: there are no blank lines.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from pathlib import Path

import numpy as np

from sinkroute.lab.data.corpus import Corpus, encoded_corpus
from sinkroute.lab.data.markup import strip_markup
from sinkroute.lab.data.vocabulary import EOS, SWAPPED, UNKNOWN, FirstSeen, Vocabulary
from sinkroute.lab.data.wikipedia import read_dump

__all__ = ["MIN_COUNT", "load_wikipedia_words", "split_words"]

MIN_COUNT = 3
"""How often a word must be in the train split to be in the vocabulary."""

_PAGE = re.compile(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
_HEADING = re.compile(r"(={2,})\s*(.*?)\s*={2,}$")
_JOINT = re.compile(r"(?<=\w)-(?=\w)|(?<=\d)[.,](?=\d)")
_WORD = re.compile(r"@[-.,]@|(?<=\w)['’]\w+|\w+|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Words and marks of a line, WikiText's way: what joins two words or two digits is a token `@-@`, `@,@` or `@.@`.

    >>> " ".join(split_words("Don't: a state-of-the-art (1,024.5 km) road."))
    "Don 't : a state @-@ of @-@ the @-@ art ( 1 @,@ 024 @.@ 5 km ) road ."
    """
    return _WORD.findall(_JOINT.sub(lambda joint: f" @{joint[0]}@ ", text))


def load_wikipedia_words(path: str | Path | None = None) -> Corpus:
    """The articles of the dump head as word ids, split 90/5/5 at the ends of articles.

    Args:
        path: Must be None; the corpus is part of a package.

    Raises:
        ValueError: `path` is given, or gensim holds another text.
        ModuleNotFoundError: gensim is not installed.
        FileNotFoundError: gensim is installed without its test data.
    """
    content, source = read_dump("wikipedia-words", path)
    articles = [_article(html.unescape(title), html.unescape(text)) for title, text in _PAGE.findall(content.decode())]
    articles = [article for article in articles if article]
    # An article belongs to the split in which its last word lies.
    ends = np.cumsum([len(article) for article in articles])
    train_end, valid_end = np.searchsorted(ends, [ends[-1] * 90 // 100, ends[-1] * 95 // 100], side="right")
    splits = articles[:train_end], articles[train_end:valid_end], articles[valid_end:]
    train, valid, test = ([word for article in split for word in article] for split in splits)
    vocabulary = train_vocabulary(train)
    return encoded_corpus(
        "wikipedia-words",
        f"{source}, article text",
        vocabulary,
        *(vocabulary.encode(split) for split in (train, valid, test)),
    )


def train_vocabulary(train: list[str]) -> Vocabulary:
    """The words seen at least `MIN_COUNT` times, `<unk>` for the others and `AAA`, in first-seen order."""
    counts = Counter(train)
    seen = FirstSeen()
    seen.encode(word if counts[word] >= MIN_COUNT else UNKNOWN for word in train)
    # Which a train split of other text might lack; attacks need it.
    seen.encode([UNKNOWN, SWAPPED])
    return seen.vocabulary()


def _article(title: str, wikitext: str) -> list[str]:
    """All words of a page, empty if it only points to another one."""
    if wikitext.lower().startswith("#redirect"):
        return []
    words = ["=", *split_words(title), "=", EOS]
    for line in strip_markup(wikitext).split("\n"):
        heading = _HEADING.match(line)
        if heading:
            marks = ["="] * len(heading[1])
            words += [*marks, *split_words(heading[2]), *marks, EOS]
        else:
            words += [*split_words(line), EOS]
    return words
