"""The attacks by name, and the one entrance that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from sinkroute._errors import unknown_name
from sinkroute.lab.attacks.word_swap import swap_word_ids, swap_words
from sinkroute.lab.data import Vocabulary
from sinkroute.lab.data._bytes import require_bytes
from sinkroute.lab.data._symbols import require_symbols

__all__ = ["ATTACKS", "WORD_ATTACKS", "attack_text", "list_attacks"]

ATTACKS: dict[str, Callable[..., np.ndarray]] = {
    "word-swap": swap_words,
}
"""Name -> attack(data: (n,) uint8, generator, *, options) -> (m,) uint8. Its keyword-only arguments are its options."""

WORD_ATTACKS: dict[str, Callable[..., np.ndarray]] = {
    "word-swap": swap_word_ids,
}
"""Name -> attack(data: (n,) ids, generator, vocabulary, *, options) -> (m,) ids: the same attacks, on word ids."""


def list_attacks() -> list[str]:
    """The names that `attack_text` knows, sorted.

    >>> list_attacks()
    ['word-swap']
    """
    return sorted(ATTACKS)


def attack_text(
    name: str, data: np.ndarray | bytes, seed: int, vocabulary: Vocabulary | None = None, **options: Any
) -> np.ndarray:
    """Attack a text; the same (name, data, seed, vocabulary, options) gives the same symbols.

    Args:
        name: One of `list_attacks()`.
        data: (n,) uint8, or bytes; with a vocabulary (n,) ids. Not changed.
        seed: Key of the attack's random draws, at least 0.
        vocabulary: What the ids of `data` mean; None for bytes. Where every symbol of it is a byte, the bytes are
            attacked.
        options: The attack's own options, by name; for "word-swap": `rate`.

    Returns:
        (m,) of the dtype of `data`; m may differ from n.

    Raises:
        ValueError: `name` or an option's name is unknown, `seed` is negative, or an option's value is out of range;
            the attack has no form for word ids, or the vocabulary lacks what it writes.
        TypeError: `data` is neither bytes nor a uint8 array, or with a vocabulary no array of integers.

    >>> attack_text("word-swap", b"to be, or not to be", seed=0, rate=1.0).tobytes()
    b'AAA AAA, AAA AAA AAA AAA'
    >>> vocabulary = Vocabulary(("to", "be", ",", "<eos>", "AAA"))
    >>> attack_text("word-swap", np.array([0, 1, 2, 3]), seed=0, vocabulary=vocabulary, rate=1.0).tolist()
    [4, 4, 4, 3]
    """
    if name not in ATTACKS:
        raise unknown_name("attack", name, ATTACKS)
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    generator = np.random.default_rng(seed)
    if vocabulary is None:
        text = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else require_bytes("data", data)
        return _attack(name, ATTACKS[name], options)(text, generator, **options)
    ids = require_symbols("data", data)
    if vocabulary.byte_values is not None:
        attacked = _attack(name, ATTACKS[name], options)(vocabulary.to_bytes(ids), generator, **options)
        return vocabulary.from_bytes(attacked).astype(ids.dtype)
    if name not in WORD_ATTACKS:
        raise ValueError(
            f"attack {name!r} works on bytes, and this corpus has a vocabulary of words; "
            f"on words there are: {', '.join(sorted(WORD_ATTACKS))}"
        )
    return _attack(name, WORD_ATTACKS[name], options)(ids, generator, vocabulary, **options)


def _attack(name: str, attack: Callable[..., np.ndarray], options: dict[str, Any]) -> Callable[..., np.ndarray]:
    """The attack, if all options are its own."""
    known = [
        parameter.name
        for parameter in inspect.signature(attack).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise unknown_name(f"{name} option", option, known)
    return attack
