"""Byte n-gram models: the yardstick printed beside the neural models.

A history h is the k - 1 bytes before a byte c. With n(h, c) the count of the pair in the training bytes,
n(h) = sum_c n(h, c), T(h) the number of different c seen after h, and h' the history without its oldest byte,

    p(c | h) = (n(h, c) + T(h) p(c | h')) / (n(h) + T(h)),    p(c | h) = p(c | h') where n(h) = 0,

down to the uniform 1/256 below the unigram. This is interpolated Witten-Bell smoothing (Witten and Bell 1991, "The
zero-frequency problem", method C; Chen and Goodman 1998, "An empirical study of smoothing techniques", section 2.5).
"""

from __future__ import annotations

import numpy as np

from sinkroute.lab.data._bytes import require_bytes

__all__ = ["MAX_ORDER", "ngram_bits_per_byte", "ngram_probabilities"]

MAX_ORDER = 3
"""Counts are a table of 256**order cells of 4 bytes: 64 MiB for the trigram, 16 GiB for one more byte."""

_CHUNK = 1 << 22
"""Training n-grams counted at a time: bounds the temporary memory whatever the corpus size."""


def ngram_bits_per_byte(train: np.ndarray, test: np.ndarray, order: int, before: bytes = b"\n") -> float:
    """Mean of -log2 p over the bytes of `test`, for a byte n-gram model fitted on `train`.

    Args:
        train: (n,) uint8, not empty.
        test: (m,) uint8, not empty. Each byte is predicted once.
        order: 1 (unigram), 2 (bigram: the previous byte) or 3 (trigram: the two previous bytes).
        before: Bytes that precede `test`, as context for its first bytes; where they are too few, the context is
            shorter.

    Returns:
        Bits per byte; 8.0 is the uniform guess.

    Raises:
        TypeError, ValueError: `train` or `test` is no 1-d uint8 array.
        ValueError: `train` or `test` is empty, or `order` is not 1, 2 or 3.

    >>> train = np.frombuffer(b"abab" * 250, dtype=np.uint8)
    >>> round(ngram_bits_per_byte(train, train, order=1), 3)
    1.003
    >>> round(ngram_bits_per_byte(train, train, order=2), 3)
    0.002
    """
    return float(-np.log2(ngram_probabilities(train, test, order, before)).mean())


def ngram_probabilities(train: np.ndarray, test: np.ndarray, order: int, before: bytes = b"\n") -> np.ndarray:
    """The probability that the model gives to each byte of `test`; arguments and errors as `ngram_bits_per_byte`.

    Returns:
        (m,) float64, each in (0, 1).

    >>> a, b = (np.frombuffer(text, dtype=np.uint8) for text in (b"aab", b"ab"))
    >>> ngram_probabilities(a, b, order=1).round(4).tolist()  # (2 + 2/256) / 5 and (1 + 2/256) / 5
    [0.4016, 0.2016]
    """
    require_bytes("train", train)
    require_bytes("test", test)
    for argument, data in (("train", train), ("test", test)):
        if len(data) == 0:
            raise ValueError(f"{argument}: expected at least 1 byte, got none; pass a split that is not empty")
    if order not in range(1, MAX_ORDER + 1):
        raise ValueError(f"order: expected 1, 2 or 3 (unigram, bigram, trigram), got {order!r}")
    context = np.concatenate([np.frombuffer(before, dtype=np.uint8), test])
    probability = np.full(len(test), 1 / 256)
    for k in range(1, order + 1):
        counts = _counts(train, k)
        seen = counts.sum(axis=1)  # n(h)
        kinds = np.count_nonzero(counts, axis=1)  # T(h)
        # The k-grams that end at a test byte; the first test bytes may have no history this long.
        grams = _grams(context, k)[-len(test) :]
        history, byte = grams >> 8, grams & 0xFF
        mixed = counts[history, byte] + kinds[history] * probability[-len(grams) :]
        total = seen[history] + kinds[history]
        known = total > 0
        probability[-len(grams) :][known] = mixed[known] / total[known]
    return probability


def _grams(data: np.ndarray, k: int) -> np.ndarray:
    """(n,) uint8 -> (max(n - k + 1, 0),) int32: each run of k bytes as one big-endian number."""
    size = max(len(data) - k + 1, 0)
    grams = np.zeros(size, dtype=np.int32)
    for offset in range(k):
        grams <<= 8
        grams |= data[offset : offset + size]
    return grams


def _counts(data: np.ndarray, k: int) -> np.ndarray:
    """(256**(k-1), 256) int32: how often each byte follows each history."""
    cells = 256**k
    counts = np.zeros(cells, dtype=np.int32)
    for start in range(0, len(data), _CHUNK):
        # Neighbouring chunks share k - 1 bytes, so the runs across the seam are counted, once.
        found = np.bincount(_grams(data[start : start + _CHUNK + k - 1], k), minlength=cells)
        # In place: `found` is int64, and a cast copy of it would cost as much as the table itself.
        np.add(counts, found, out=counts, casting="unsafe")
    return counts.reshape(-1, 256)
