"""Training windows whose order is a function of (seed, index), so that a resumed run needs no sampler state."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinkroute.lab.data._symbols import require_symbols

__all__ = ["Windows"]


class Windows(Dataset[dict[str, Tensor]]):
    """Training windows in a keyed order: item i is the same whatever was read before; resuming needs no sampler state.

    Epoch e cuts the data into non-overlapping windows that start at a random phase in [0, length) and orders them by a
    random permutation; both come from a generator keyed by (seed, e). Item i is window i mod W of epoch i // W, where
    W = `windows_per_epoch` is the same for every phase. Read the items in order: the data set is the shuffle, and a
    reader that jumps between epochs draws a permutation at each jump.

    Args:
        data: (n,) integers (bytes, or ids of a vocabulary), with n >= 2 * length, so that one window and its last
            target fit at any phase. Not copied.
        length: Symbols per window, at least 1.
        seed: Key of the order, at least 0.
        count: Items in the data set, at least 0; it may span any number of epochs.

    Raises:
        TypeError, ValueError: `data` is no 1-d array of integers.
        ValueError: `data` is too short, or `length`, `seed` or `count` is out of range.

    >>> text = np.frombuffer(b"to be or not to be, that is the question", dtype=np.uint8)
    >>> windows = Windows(text, length=8, seed=0, count=100)
    >>> item = windows[42]
    >>> item["inputs"].shape, item["inputs"].dtype
    (torch.Size([8]), torch.int64)
    >>> bool((item["inputs"][1:] == item["targets"][:-1]).all())
    True
    """

    def __init__(self, data: np.ndarray, length: int, seed: int, count: int) -> None:
        require_symbols("data", data)
        if length < 1:
            raise ValueError(f"length: expected at least 1 symbol per window, got {length}")
        if len(data) < 2 * length:
            raise ValueError(
                f"data: found {len(data):,} symbols, needed at least {2 * length:,} for windows of length {length:,} "
                "at any phase; give more data or a smaller length"
            )
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        if count < 0:
            raise ValueError(f"count: expected at least 0 windows, got {count}")
        self.data = data
        self.length = length
        self.seed = seed
        self.count = count
        # The last target lies at phase + W * length; for the largest phase, length - 1, it must be at most n - 1.
        self.windows_per_epoch = (len(data) - length) // length
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item `index`: {"inputs": (length,) int64, "targets": (length,) int64}, targets one symbol ahead of inputs.

        Raises:
            IndexError: `index` is outside [0, count); negative indices are not counted from the end.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The items of one batch, gathered at once; `torch.utils.data.DataLoader` calls this by itself."""
        starts = np.array([self._start(operator.index(index)) for index in indices], dtype=np.int64)
        rows = self.data[starts[:, None] + np.arange(self.length + 1)]  # (B, length + 1)
        # Two casts, two buffers: writing into a batch's inputs must not change its targets.
        inputs = torch.from_numpy(rows[:, :-1].astype(np.int64))
        targets = torch.from_numpy(rows[:, 1:].astype(np.int64))
        return [{"inputs": row, "targets": aim} for row, aim in zip(inputs, targets, strict=True)]

    def _start(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index: expected 0 <= index < {self.count} (count), got {index}")
        epoch, position = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            phase = generator.integers(self.length)
            self._starts = phase + self.length * generator.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return int(self._starts[position])
