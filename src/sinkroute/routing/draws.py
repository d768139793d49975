"""Random draws that depend on a key and on nothing else.

A stochastic router must give the same answer when a layer is recomputed in the backward pass, after a resume, and (for
the choice of the branch) on all ranks of a group. A global generator fails in all three: its answer depends on who
drew before. Here every draw is a hash of (seed, layer, step, micro-batch), so that it can be made again at will and no
state is kept. What a hash seeds is drawn by `kernels.normal`.
"""

from __future__ import annotations

import hashlib

__all__ = ["hash63", "uniform"]


def hash63(*key: int | str) -> int:
    """A hash of `key` in [0, 2^63), the same in every process: what seeds a generator and fits an int64."""
    return _hash64(*key) >> 1


def _hash64(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def uniform(*key: int | str) -> float:
    """A float in [0, 1) that is a function of `key` alone.

    >>> uniform("branch", 0, 7) == uniform("branch", 0, 7), uniform("branch", 0, 7) == uniform("branch", 0, 8)
    (True, False)
    """
    return (_hash64(*key) >> 11) / 2**53  # 53 bits: exactly what a float64 holds
