"""The attacks by name, and the one entrance that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from sinkroute._errors import unknown_name
from sinkroute.lab.attacks.word_swap import swap_words
from sinkroute.lab.data._bytes import require_bytes

__all__ = ["ATTACKS", "attack_text", "list_attacks"]

ATTACKS: dict[str, Callable[..., np.ndarray]] = {
    "word-swap": swap_words,
}
"""Name -> attack(data: (n,) uint8, generator, *, options) -> (m,) uint8. Its keyword-only arguments are its options."""


def list_attacks() -> list[str]:
    """The names that `attack_text` knows, sorted.

    >>> list_attacks()
    ['word-swap']
    """
    return sorted(ATTACKS)


def attack_text(name: str, data: np.ndarray | bytes, seed: int, **options: Any) -> np.ndarray:
    """Attack a text; the same (name, data, seed, options) gives the same bytes.

    Args:
        name: One of `list_attacks()`.
        data: (n,) uint8, or bytes. Not changed.
        seed: Key of the attack's random draws, at least 0.
        options: The attack's own options, by name; for "word-swap": `rate`.

    Returns:
        (m,) uint8; m may differ from n.

    Raises:
        ValueError: `name` or an option's name is unknown, `seed` is negative, or an option's value is out of range.
        TypeError: `data` is neither bytes nor a uint8 array.

    >>> attack_text("word-swap", b"to be, or not to be", seed=0, rate=1.0).tobytes()
    b'AAA AAA, AAA AAA AAA AAA'
    """
    if name not in ATTACKS:
        raise unknown_name("attack", name, ATTACKS)
    attack = ATTACKS[name]
    known = [
        parameter.name
        for parameter in inspect.signature(attack).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise unknown_name(f"{name} option", option, known)
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    text = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else require_bytes("data", data)
    return attack(text, np.random.default_rng(seed), **options)
