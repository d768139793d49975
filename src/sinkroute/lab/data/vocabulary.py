"""Words and their ids, in the order in which the words are first seen."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sinkroute.lab.data._symbols import symbol_dtype

__all__ = ["EOS", "SWAPPED", "UNKNOWN", "FirstSeen", "Vocabulary"]

EOS = "<eos>"
"""What ends a line of a word-level corpus."""
UNKNOWN = "<unk>"
"""What stands for a word that is not in the vocabulary."""
SWAPPED = "AAA"
"""The ordinary word that the word-swap attack writes."""


@dataclass(frozen=True)
class Vocabulary:
    """The words of a corpus: the id of a word is its place.

    Attributes:
        words: id -> word, each word once.
        byte_values: id -> byte, where every symbol is a byte under another number; None for words.

    Raises:
        ValueError: a word stands twice.

    >>> vocabulary = Vocabulary(("<unk>", "to", "be", "<eos>"))
    >>> len(vocabulary), vocabulary.id("be"), vocabulary.id("not")
    (4, 2, None)
    >>> vocabulary.encode("to be or".split())
    array([1, 2, 0], dtype=uint8)
    """

    words: tuple[str, ...]
    byte_values: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self._ids) < len(self.words):
            twice = next(word for place, word in enumerate(self.words) if self._ids[word] != place)
            raise ValueError(f"words: {twice!r} stands twice; give each word once")

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words)}

    def id(self, word: str) -> int | None:
        """The id of `word`, or None."""
        return self._ids.get(word)

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """The ids of `words`; that of `<unk>` for those the vocabulary lacks.

        Returns:
            (n,) of the smallest of uint8, uint16 and int32 that holds every id.

        Raises:
            ValueError: a word is unknown, and so is `<unk>`.
        """
        if UNKNOWN in self._ids:
            known = self._ids.get
            ids = [known(word, self._ids[UNKNOWN]) for word in words]
        else:
            try:
                ids = [self._ids[word] for word in words]
            except KeyError as error:
                raise ValueError(
                    f"words: {error} is not among the {len(self):,} words of this vocabulary, and neither is "
                    f"{UNKNOWN!r}; replace it by a word that is"
                ) from None
        return np.array(ids, dtype=symbol_dtype(len(self)))

    def to_bytes(self, ids: np.ndarray) -> np.ndarray:
        """(n,) uint8: the bytes that `ids` stand for; only with `byte_values`."""
        assert self.byte_values is not None
        return np.frombuffer(self.byte_values, dtype=np.uint8)[ids]

    def from_bytes(self, data: np.ndarray) -> np.ndarray:
        """(n,) uint8: the ids of (n,) uint8 bytes; only with `byte_values`.

        Raises:
            ValueError: a byte has no id.
        """
        assert self.byte_values is not None
        values = np.frombuffer(self.byte_values, dtype=np.uint8)
        strange = np.ones(256, dtype=bool)
        strange[values] = False
        if strange[data].any():
            raise ValueError(
                f"data: byte {data[strange[data]][0]} is not among the {len(self)} symbols of this vocabulary; "
                "leave it out, or take the corpus of plain bytes"
            )
        ids = np.zeros(256, dtype=np.uint8)
        ids[values] = np.arange(len(self))
        return ids[data]


class FirstSeen:
    """Builds a vocabulary while it encodes: a word gets the next id when it is first seen.

    >>> seen = FirstSeen()
    >>> seen.encode("to be or not to be".split()).tolist()
    [0, 1, 2, 3, 0, 1]
    >>> seen.vocabulary().words
    ('to', 'be', 'or', 'not')
    """

    def __init__(self) -> None:
        self._ids: defaultdict[str, int] = defaultdict()
        # Looking up a missing word gives it the next id, in C: there may be a hundred million.
        self._ids.default_factory = self._ids.__len__

    def encode(self, words: Iterable[str]) -> array[int]:
        """The ids of `words`, new words included, as C ints."""
        return array("i", map(self._ids.__getitem__, words))

    def vocabulary(self) -> Vocabulary:
        """The words seen so far."""
        return Vocabulary(tuple(self._ids))
