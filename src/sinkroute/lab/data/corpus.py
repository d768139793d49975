"""A corpus: symbols in a fixed order, split into train, valid and test, with the digest that identifies them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from sinkroute.lab.data._symbols import require_symbols, symbol_dtype
from sinkroute.lab.data.vocabulary import Vocabulary

__all__ = ["MIN_SPLIT_BYTES", "Corpus", "encoded_corpus", "split_corpus", "switched_corpus"]

MIN_SPLIT_BYTES = 1024
"""Fewest bytes that valid and test must each hold: less than this gives no meaningful loss."""


@dataclass(frozen=True)
class Corpus:
    """Symbols split in order into train, valid and test. Two corpora are equal when name, source and digest are.

    Attributes:
        name: The registry name, see `list_corpora()`.
        source: Where the text came from, in human words.
        sha256: Hex digest of the whole content in its order (train, valid, test joined), and of the vocabulary if
            there is one.
        train: (n,) ids, read-only: uint8 for bytes, else the smallest of uint8, uint16 and int32 that holds them.
        valid: (n,) of the same dtype, read-only.
        test: (n,) of the same dtype, read-only.
        vocabulary: What the ids mean; None for plain bytes.
        first: (n,), read-only: what training reads before it turns to `train`; None where it reads one text only.
    """

    name: str
    source: str
    sha256: str
    # The digest already speaks for the content: comparing and printing megabytes would add nothing.
    train: np.ndarray = field(compare=False, repr=False)
    valid: np.ndarray = field(compare=False, repr=False)
    test: np.ndarray = field(compare=False, repr=False)
    vocabulary: Vocabulary | None = field(default=None, compare=False, repr=False)
    first: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def symbols(self) -> int:
        """How many different symbols there are: 256 for bytes, else the size of the vocabulary."""
        return 256 if self.vocabulary is None else len(self.vocabulary)


def encoded_corpus(
    name: str, source: str, vocabulary: Vocabulary, train: np.ndarray, valid: np.ndarray, test: np.ndarray
) -> Corpus:
    """A corpus of ids in a vocabulary.

    Args:
        name: The registry name of the corpus.
        source: Where the text came from, in human words.
        vocabulary: What the ids mean.
        train: (n,) ids, n >= 1. Copied only to become of the smallest dtype.
        valid: As `train`.
        test: As `train`.

    Raises:
        TypeError, ValueError: a split is no 1-d array of integers.
        ValueError: a split is empty, or holds an id that the vocabulary lacks.

    >>> vocabulary = Vocabulary(("to", "be", "<eos>"))
    >>> corpus = encoded_corpus("text", "a line", vocabulary, *np.array([[0, 1, 2], [1, 0, 2], [0, 0, 2]]))
    >>> corpus.symbols, corpus.train
    (3, array([0, 1, 2], dtype=uint8))
    """
    dtype = symbol_dtype(len(vocabulary))
    digest = hashlib.sha256("\n".join(vocabulary.words).encode())
    splits: dict[str, np.ndarray] = {}
    for argument, data in (("train", train), ("valid", valid), ("test", test)):
        if len(require_symbols(argument, data)) == 0:
            raise ValueError(f"{argument}: corpus {name!r} ({source}) has no symbols in this split; give it more text")
        if data.min() < 0 or data.max() >= len(vocabulary):
            raise ValueError(
                f"{argument}: found ids from {data.min()} to {data.max()}, expected 0 to {len(vocabulary) - 1}, "
                "the size of the vocabulary less 1"
            )
        split = np.ascontiguousarray(data, dtype=dtype).view()
        split.setflags(write=False)
        # The sizes too: the same symbols split elsewhere are another corpus.
        digest.update(f"\n{argument} {len(split)} {dtype.name}\n".encode())
        digest.update(split)
        splits[argument] = split
    return Corpus(name, source, digest.hexdigest(), **splits, vocabulary=vocabulary)


def split_corpus(name: str, source: str, content: bytes) -> Corpus:
    """Cut `content` at 90 % and 95 % of its bytes, in order.

    Args:
        name: The registry name of the corpus.
        source: Where the bytes came from, in human words.
        content: The whole corpus. The splits are read-only views of it; nothing is copied.

    Raises:
        ValueError: valid or test would hold fewer than `MIN_SPLIT_BYTES` bytes.

    >>> corpus = split_corpus("text", "a line said often", b"to be or not to be\\n" * 2000)
    >>> len(corpus.train), len(corpus.valid), len(corpus.test)
    (34200, 1900, 1900)
    >>> corpus.train[:5].tobytes()
    b'to be'
    """
    needed = 20 * MIN_SPLIT_BYTES
    if len(content) < needed:
        raise ValueError(
            f"corpus {name!r} ({source}): found {len(content):,} bytes, needed at least {needed:,} "
            f"({MIN_SPLIT_BYTES:,} in each 5 % split); give it more text"
        )
    whole = np.frombuffer(content, dtype=np.uint8)
    train_end, valid_end = len(whole) * 90 // 100, len(whole) * 95 // 100
    return Corpus(
        name=name,
        source=source,
        sha256=hashlib.sha256(content).hexdigest(),
        train=whole[:train_end],
        valid=whole[train_end:valid_end],
        test=whole[valid_end:],
    )


def switched_corpus(first: Corpus, then: Corpus) -> Corpus:
    """`then`, for a training that begins with the training text of `first` and turns to its own in its midst.

    Args:
        first: What is read first. Its valid and test are in nothing.
        then: What is read afterwards, and evaluated.

    Raises:
        ValueError: a number means one symbol in one of them and another in the other.

    >>> texts = [split_corpus(name, "a line", name.encode() * 8000) for name in ("prose", "verse")]
    >>> corpus = switched_corpus(*texts)
    >>> corpus.name, corpus.first[:5].tobytes(), corpus.valid[:5].tobytes()
    ('prose, then verse', b'prose', b'verse')
    """
    if first.vocabulary != then.vocabulary:
        raise ValueError(
            f"data.switch_to={then.name!r} has other symbols than {first.name!r}: {then.symbols:,} and "
            f"{first.symbols:,}; take two texts of bytes, such as 'wikipedia' and 'stdlib'"
        )
    return replace(
        then,
        name=f"{first.name}, then {then.name}",
        source=f"{first.source}; then {then.source}",
        sha256=hashlib.sha256(f"{first.sha256} then {then.sha256}".encode()).hexdigest(),
        first=first.train,
    )
