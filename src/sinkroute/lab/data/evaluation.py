"""Windows for evaluation: each symbol of a split is predicted exactly once."""

from __future__ import annotations

import numpy as np

from sinkroute.lab.data._symbols import require_symbols

__all__ = ["evaluation_windows"]


def evaluation_windows(data: np.ndarray, length: int, before: int = 0x0A) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut `data` into rows so that all of its n symbols are targets once, the first and the last included.

    Args:
        data: (n,) integers, n >= 1: bytes, or ids of a vocabulary.
        length: Symbols per row (L), at least 1.
        before: The symbol taken to precede the data, as input for its first one; by default a newline among bytes.

    Returns:
        inputs: (N, L) of the data's dtype, N = ceil(n / L): `before`, then data[:-1]; the last row padded with 0.
        targets: (N, L) of the data's dtype: data; the last row padded with 0.
        mask: (N, L) bool: True where the target is a real symbol. Its sum is n.

    Raises:
        TypeError, ValueError: `data` is no 1-d array of integers.
        ValueError: `data` is empty, or `length` or `before` is out of range.

    >>> inputs, targets, mask = evaluation_windows(np.frombuffer(b"abcde", dtype=np.uint8), length=3)
    >>> [row.tobytes() for row in inputs], [row.tobytes() for row in targets]
    ([b'\\nab', b'cd\\x00'], [b'abc', b'de\\x00'])
    >>> mask.tolist()
    [[True, True, True], [True, True, False]]
    """
    require_symbols("data", data)
    if len(data) == 0:
        raise ValueError("data: expected at least 1 symbol to evaluate, got none; pass a split that is not empty")
    if length < 1:
        raise ValueError(f"length: expected at least 1 symbol per row, got {length}")
    most = np.iinfo(data.dtype).max
    if not 0 <= before <= most:
        raise ValueError(f"before: expected a symbol from 0 to {most} ({data.dtype}), got {before}")
    rows = -(-len(data) // length)
    inputs = np.zeros(rows * length, dtype=data.dtype)
    targets = np.zeros(rows * length, dtype=data.dtype)
    inputs[0] = before
    inputs[1 : len(data)] = data[:-1]
    targets[: len(data)] = data
    mask = np.arange(rows * length) < len(data)
    shape = (rows, length)
    return inputs.reshape(shape), targets.reshape(shape), mask.reshape(shape)
