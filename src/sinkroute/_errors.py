"""Words for errors that every floor shares: each names the argument, the value received and the cure."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Iterable
from numbers import Real

__all__ = [
    "NonFiniteLogits",
    "RankLost",
    "SinkrouteError",
    "install_command",
    "nearest",
    "require_count",
    "require_numbers",
    "unknown_name",
]


class SinkrouteError(Exception):
    """Base of errors that tell a user what to do; the command line prints them without a traceback."""


class RankLost(SinkrouteError, RuntimeError):
    """A collective call that failed because another rank has gone or came too late. Its cause is torch's error.

    >>> lost = RankLost("rank 1 of [0, 1] no longer answers")
    >>> str(lost.during("the end of step 7"))
    'during the end of step 7: rank 1 of [0, 1] no longer answers'
    """

    def during(self, what: str) -> RankLost:
        """This, saying what the call was for: who knows that is above who made it."""
        self.args = (f"during {what}: {self}",)
        return self


class NonFiniteLogits(ValueError):
    """Logits of a real token that are NaN or infinite; the message names the first."""


def require_numbers(**values: object) -> None:
    """Raise a `TypeError` that names the first argument that is no int or float.

    >>> require_numbers(reg=0.1, noise="much")
    Traceback (most recent call last):
    TypeError: noise must be a number, got 'much' (str)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")


def require_count(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise a `ValueError` unless `value` is an int (no bool) within the bounds.

    >>> require_count("dim", 2.5, 1)
    Traceback (most recent call last):
    ValueError: dim must be an integer of 1 or more, got 2.5
    >>> require_count("serving_top_k", 9, 1, 8)
    Traceback (most recent call last):
    ValueError: serving_top_k must be an integer from 1 to 8, got 9
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bounds = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")


def nearest(name: object, choices: Iterable[str]) -> str:
    """`"; did you mean 'the nearest'?"`, or nothing where no choice is near.

    >>> nearest("wikipedia-srr", ["demo", "wikipedia-ssr"]), nearest("x", ["demo"])
    ("; did you mean 'wikipedia-ssr'?", '')
    """
    near = difflib.get_close_matches(str(name), sorted(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> ValueError:
    """A `ValueError` for a name that is in no registry, with the nearest known one as a suggestion.

    >>> str(unknown_name("router", "srr-s", ["softmax", "ssr-l", "ssr-s"]))
    "unknown router 'srr-s'; did you mean 'ssr-s'? Known: softmax, ssr-l, ssr-s"
    """
    known = sorted(choices)
    hint = nearest(name, known) if isinstance(name, str) else ""
    return ValueError(f"unknown {kind} {name!r}{hint or '.'} Known: {', '.join(known) or '(none)'}")


# Where the name of a package is not that of the module, or the module comes with another one.
_PACKAGES = {"PIL": "pillow", "ot": "pot", "pyarrow": "datasets", "sklearn": "scikit-learn"}


def install_command(module: str, *extras: str) -> str:
    """The command that brings a missing module: by the first of these extras that asks for it, else by its name.

    >>> install_command("no_such_module", "lab")
    'pip install no-such-module'
    """
    package = _PACKAGES.get(module, module).replace("_", "-").lower()
    try:
        asked = importlib.metadata.requires("sinkroute") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        asked = []
    ours = [line for line in asked if re.match(r"[\w.-]+", line)[0].replace("_", "-").lower() == package]  # type: ignore[index]
    for extra in extras:
        if any(re.search(rf"extra == ['\"]{extra}['\"]", line) for line in ours):
            return f'pip install "sinkroute[{extra}]"'
    return f"pip install {package}"
