"""Words for errors that every floor shares: each names the argument, the value received and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Real

__all__ = ["NonFiniteScores", "SinkrouteError", "require_numbers", "unknown_name"]


class SinkrouteError(Exception):
    """Base of errors that tell a user what to do; the command line prints them without a traceback."""


class NonFiniteScores(ValueError):
    """Scores of a real token that are NaN or infinite; the message names the first."""


def require_numbers(**values: object) -> None:
    """Raise a `TypeError` that names the first argument that is no int or float.

    >>> require_numbers(reg=0.1, noise="much")
    Traceback (most recent call last):
    TypeError: noise must be a number, got 'much' (str)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """A `ValueError` for a name that is in no registry, with the nearest known one as a suggestion.

    >>> str(unknown_name("router", "srr-s", ["softmax", "ssr-l", "ssr-s"]))
    "unknown router 'srr-s'; did you mean 'ssr-s'? Known: softmax, ssr-l, ssr-s"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known) or '(none)'}")
