"""The one shape that data has in this package: a 1-d array of symbol ids."""

from __future__ import annotations

import numpy as np

__all__ = ["require_symbols", "symbol_dtype"]


def require_symbols(argument: str, data: object) -> np.ndarray:
    """Return `data` if it is a 1-d array of integers; else raise, naming the argument.

    Raises:
        TypeError: `data` is no array, or its dtype is no integer one.
        ValueError: `data` is not one-dimensional.

    >>> require_symbols("train", np.array([1.0, 2.0]))
    Traceback (most recent call last):
    ...
    TypeError: train: expected a 1-d array of integers, got dtype float64; cast it, or read bytes by np.frombuffer
    """
    if not isinstance(data, np.ndarray) or not np.issubdtype(data.dtype, np.integer):
        found = f"dtype {data.dtype}" if isinstance(data, np.ndarray) else type(data).__name__
        cure = "cast it, or read bytes by np.frombuffer"
        raise TypeError(f"{argument}: expected a 1-d array of integers, got {found}; {cure}")
    if data.ndim != 1:
        raise ValueError(
            f"{argument}: expected a 1-d array of integers, got shape {data.shape}; flatten it with .reshape(-1)"
        )
    return data


def symbol_dtype(symbols: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that holds the ids 0 to symbols − 1.

    int32 and not uint32, which torch can hardly compute with.

    >>> [symbol_dtype(symbols).name for symbols in (256, 257, 65_536, 267_735)]
    ['uint8', 'uint16', 'uint16', 'int32']
    """
    return np.dtype(np.uint8 if symbols <= 1 << 8 else np.uint16 if symbols <= 1 << 16 else np.int32)
