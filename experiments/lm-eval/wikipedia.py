"""Documents for lm-evaluation-harness from the text that comes with the lab: the test split of its Wikipedia dump.

Made when a task is loaded; nothing is downloaded, and nothing is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import datasets
import numpy as np

from sinkroute.lab.data import load_corpus


def passages(bytes: int, count: int, **_: object) -> datasets.DatasetDict:
    """The first `count` pieces of so many bytes that are whole UTF-8: {"text"}."""
    rows = [{"text": text} for _, text in zip(range(count), _pieces(bytes), strict=False)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def clozes(bytes: int, count: int, choices: int, **_: object) -> datasets.DatasetDict:
    """Pieces that end before a word, and words of its length of which one comes next: {"context", "choices", "answer"}.

    The other words are drawn from those of the same split, a rare one as often as a common one.
    """
    generator = np.random.default_rng(0)
    text = "".join(_pieces(4096))
    words = [(match.start(), match[0]) for match in re.finditer(r"(?<= )[a-z]{5,8}(?= )", text)]
    by_length: dict[int, list[str]] = {}
    for word in sorted({word for _, word in words}):
        by_length.setdefault(len(word), []).append(word)
    rows = []
    late = [(place, word) for place, word in words if place > bytes]
    for place, word in (late[i] for i in generator.permutation(len(late))[:count]):
        others: set[str] = set()
        while len(others) < choices - 1:
            others |= {str(generator.choice(by_length[len(word)]))} - {word}
        shown = [str(choice) for choice in generator.permutation([word, *sorted(others)])]
        rows.append({"context": text[place - bytes : place - 1], "choices": shown, "answer": shown.index(word)})
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def _pieces(bytes: int) -> Iterator[str]:
    test = load_corpus("wikipedia").test.tobytes()
    for start in range(0, len(test) - bytes, bytes):
        try:
            yield test[start : start + bytes].decode()
        except UnicodeDecodeError:  # a character is cut
            continue
