"""The entrance to the attacks on text, of which there is one: on bytes, or on the ids of words."""

from __future__ import annotations

from typing import Any

import numpy as np

from sinkroute._errors import unknown_name
from sinkroute.lab.attacks.word_swap import swap_word_ids, swap_words
from sinkroute.lab.data import Vocabulary
from sinkroute.lab.data._bytes import require_bytes
from sinkroute.lab.data._symbols import require_symbols

__all__ = ["attack_text"]

_OPTIONS = {"word-swap": ("rate",)}


def attack_text(
    name: str, data: np.ndarray | bytes, seed: int, vocabulary: Vocabulary | None = None, **options: Any
) -> np.ndarray:
    """Attack a text; the same (name, data, seed, vocabulary, options) gives the same symbols.

    Args:
        name: "word-swap".
        data: (n,) uint8, or bytes; with a vocabulary (n,) ids. Not changed.
        seed: Key of the attack's random draws, at least 0.
        vocabulary: What the ids of `data` mean; None for bytes. Where every symbol of it is a byte, the bytes are
            attacked.
        options: The attack's own options, by name: `rate`.

    Returns:
        (m,) of the dtype of `data`; m may differ from n.

    Raises:
        ValueError: `name` or an option's name is unknown, `seed` is negative, or an option's value is out of range;
            the vocabulary lacks what the attack writes.
        TypeError: `data` is neither bytes nor a uint8 array, or with a vocabulary no array of integers.

    >>> attack_text("word-swap", b"to be, or not to be", seed=0, rate=1.0).tobytes()
    b'AAA AAA, AAA AAA AAA AAA'
    >>> vocabulary = Vocabulary(("to", "be", ",", "<eos>", "AAA"))
    >>> attack_text("word-swap", np.array([0, 1, 2, 3]), seed=0, vocabulary=vocabulary, rate=1.0).tolist()
    [4, 4, 4, 3]
    """
    if name not in _OPTIONS:
        raise unknown_name("attack", name, _OPTIONS)
    for option in options:
        if option not in _OPTIONS[name]:
            raise unknown_name(f"{name} option", option, _OPTIONS[name])
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    generator = np.random.default_rng(seed)
    if vocabulary is None:
        text = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else require_bytes("data", data)
        return swap_words(text, generator, **options)
    ids = require_symbols("data", data)
    if vocabulary.byte_values is None:
        return swap_word_ids(ids, generator, vocabulary, **options)
    return vocabulary.from_bytes(swap_words(vocabulary.to_bytes(ids), generator, **options)).astype(ids.dtype)
