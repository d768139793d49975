"""A corpus: bytes in a fixed order, cut 90/5/5 into train, valid and test, with the digest that identifies them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

__all__ = ["MIN_SPLIT_BYTES", "Corpus", "split_corpus"]

MIN_SPLIT_BYTES = 1024
"""Fewest bytes that valid and test must each hold: less than this gives no meaningful loss."""


@dataclass(frozen=True)
class Corpus:
    """Bytes split in order into train, valid and test. Two corpora are equal when name, source and digest are.

    Attributes:
        name: The registry name: "wikipedia", "text" or "enwik8".
        source: Where the bytes came from, in human words.
        sha256: Hex digest of the whole content in its order (train, valid, test joined).
        train: (n,) uint8, read-only.
        valid: (n,) uint8, read-only.
        test: (n,) uint8, read-only.
    """

    name: str
    source: str
    sha256: str
    # The digest already speaks for the content: comparing and printing megabytes would add nothing.
    train: np.ndarray = field(compare=False, repr=False)
    valid: np.ndarray = field(compare=False, repr=False)
    test: np.ndarray = field(compare=False, repr=False)


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
