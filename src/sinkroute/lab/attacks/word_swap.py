"""Word swap: random words become the ordinary word `AAA`, and nothing else changes.

The "attacked perplexity" of the sparse mixture-of-experts literature, for bytes and for word ids: it changes what a
model reads and what it has to predict. The literature does not say at which rate; 2.5 % of the words is the default
here.
"""

from __future__ import annotations

import numpy as np

from sinkroute.lab.data import Vocabulary
from sinkroute.lab.data.vocabulary import EOS, SWAPPED, UNKNOWN

__all__ = ["swap_word_ids", "swap_words"]

_REPLACEMENT = SWAPPED.encode()

# ASCII letters, and every byte of a multi-byte UTF-8 character, so that no word is cut in the middle of a character.
_IS_LETTER = np.zeros(256, dtype=bool)
_IS_LETTER[np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", dtype=np.uint8)] = True
_IS_LETTER[0x80:] = True


def swap_words(data: np.ndarray, generator: np.random.Generator, *, rate: float = 0.025) -> np.ndarray:
    """Replace round(rate * words) words, chosen without replacement, by `AAA`.

    A word is a maximal run of the bytes [A-Za-z] and 0x80 to 0xFF.

    Args:
        data: (n,) uint8.
        generator: The source of the choice.
        rate: Share of the words to replace, in [0, 1].

    Returns:
        (m,) uint8: everything outside the chosen words is byte-identical and in order.

    Raises:
        ValueError: `rate` is outside [0, 1].

    >>> text = np.frombuffer("Gödel, Escher, Bach".encode(), dtype=np.uint8)
    >>> swap_words(text, np.random.default_rng(0), rate=1 / 3).tobytes().decode()
    'Gödel, Escher, AAA'
    """
    # A word starts and ends where the letter mask, with a non-letter added at both ends, changes.
    edges = np.flatnonzero(np.diff(_IS_LETTER[data], prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    chosen = _choose(generator, len(starts), rate)
    pieces = []
    kept_from = 0
    for start, end in zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True):
        pieces += [data[kept_from:start].tobytes(), _REPLACEMENT]
        kept_from = end
    pieces.append(data[kept_from:].tobytes())
    return np.frombuffer(b"".join(pieces), dtype=np.uint8)


def swap_word_ids(
    data: np.ndarray, generator: np.random.Generator, vocabulary: Vocabulary, *, rate: float = 0.025
) -> np.ndarray:
    """Replace round(rate * words) words, chosen without replacement, by the id of `AAA`.

    A word is any symbol but `<eos>`: punctuation and `<unk>` too, as the symbols of a word-level corpus are its words.

    Args:
        data: (n,) ids of the vocabulary.
        generator: The source of the choice.
        vocabulary: Of the ids. `<unk>` replaces where it has no `AAA`; WikiText-103's has it.
        rate: Share of the words to replace, in [0, 1].

    Returns:
        (n,) of the same dtype: all else is the same and in order.

    Raises:
        ValueError: `rate` is outside [0, 1], or the vocabulary has neither `AAA` nor `<unk>`.

    >>> vocabulary = Vocabulary(("to", "be", "<eos>", "AAA"))
    >>> swap_word_ids(np.array([0, 1, 2, 0, 1, 2]), np.random.default_rng(0), vocabulary, rate=0.5).tolist()
    [0, 1, 2, 3, 3, 2]
    """
    ids = [vocabulary.id(word) for word in (SWAPPED, UNKNOWN)]
    replacement = next((id for id in ids if id is not None), None)
    if replacement is None:
        raise ValueError(
            f"vocabulary: found neither {SWAPPED!r} nor {UNKNOWN!r} among its {len(vocabulary):,} words, one of which "
            "replaces others; take a corpus that has it, or leave out word-swap"
        )
    words = np.flatnonzero(data != vocabulary.id(EOS))
    swapped = data.copy()
    swapped[words[_choose(generator, len(words), rate)]] = replacement
    return swapped


def _choose(generator: np.random.Generator, words: int, rate: float) -> np.ndarray:
    """Which of so many words are replaced, in order."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a share of the words from 0 to 1, got {rate}")
    return np.sort(generator.choice(words, size=round(rate * words), replace=False))
