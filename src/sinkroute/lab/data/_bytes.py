"""The one shape that data has in this package: a 1-d array of uint8."""

from __future__ import annotations

import numpy as np

__all__ = ["require_bytes"]


def require_bytes(argument: str, data: object) -> np.ndarray:
    """Return `data` if it is a 1-d uint8 array; else raise, naming the argument.

    Raises:
        TypeError: `data` is no array, or its dtype is not uint8.
        ValueError: `data` is not one-dimensional.

    >>> require_bytes("train", np.array([1, 2]))
    Traceback (most recent call last):
    ...
    TypeError: train: expected a 1-d uint8 array, got dtype int64; cast it, or read it with np.frombuffer(raw, np.uint8)
    """
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
        found = f"dtype {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
        cure = "cast it, or read it with np.frombuffer(raw, np.uint8)"
        raise TypeError(f"{argument}: expected a 1-d uint8 array, got {found}; {cure}")
    if data.ndim != 1:
        raise ValueError(
            f"{argument}: expected a 1-d uint8 array, got shape {data.shape}; flatten it with .reshape(-1)"
        )
    return data
