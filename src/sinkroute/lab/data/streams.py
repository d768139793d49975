"""Contiguous streams, for models that carry a cache from block to block (Transformer-XL and the adaptive span).

The data is cut into `batch` rows that lie one after the other in the text; step s reads from every row the block that
follows that of step s − 1, so what the model has cached is what stands before. Source of the scheme: Dai et al. 2019,
arXiv 1901.02860; Sukhbaatar et al. 2019, arXiv 1905.07799, and its code.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sinkroute.lab.data._symbols import require_symbols

__all__ = ["StreamBlocks", "Streams", "stream_evaluation"]


class Streams(Dataset[dict[str, Tensor]]):
    """Training blocks of contiguous rows: item i is a function of (seed, i), so a resumed run needs no sampler state.

    Item `step * batch + row` is the block that row `row` reads in step `step`; read them in order, `batch` at a time.
    A row holds n // batch symbols (the n % batch last symbols of the data are in none). An epoch starts at the same
    random offset in [0, length) of all rows, drawn from a generator keyed by (seed, epoch), so that blocks begin at
    other places each time; it takes `steps_per_epoch` steps, the same for every offset. (The adaptive span's own
    code draws the offset from the second epoch on, and starts the first at 0.)

    Args:
        data: (n,) integers (bytes, or ids of a vocabulary), with n >= 2 * length * batch, so that every row holds one
            block and its last target at any offset. Not copied.
        length: Symbols per block, at least 1.
        batch: Rows, at least 1.
        seed: Key of the offsets, at least 0.
        steps: Steps in the data set, at least 0; they may span any number of epochs.

    Raises:
        TypeError, ValueError: `data` is no 1-d array of integers.
        ValueError: `data` is too short, or `length`, `batch`, `seed` or `steps` is out of range.

    >>> streams = Streams(np.arange(40), length=4, batch=2, seed=0, steps=100)
    >>> [streams[step * 2 + 1]["inputs"].tolist() for step in range(3)]  # the second row holds 20 to 39
    [[23, 24, 25, 26], [27, 28, 29, 30], [31, 32, 33, 34]]
    >>> [bool(streams[step * 2]["fresh"]) for step in range(5)]  # 4 steps an epoch
    [True, False, False, False, True]
    """

    def __init__(self, data: np.ndarray, length: int, batch: int, seed: int, steps: int) -> None:
        require_symbols("data", data)
        for argument, value, least in (
            ("length", length, 1),
            ("batch", batch, 1),
            ("seed", seed, 0),
            ("steps", steps, 0),
        ):
            if value < least:
                raise ValueError(f"{argument}: expected at least {least}, got {value}")
        if len(data) < 2 * length * batch:
            raise ValueError(
                f"data: found {len(data):,} symbols, needed at least {2 * length * batch:,} for {batch:,} rows of "
                f"blocks of length {length:,} at any offset; give more data, a smaller batch or a smaller length"
            )
        self.data = data
        self.length = length
        self.batch = batch
        self.seed = seed
        self.steps = steps
        self.row_length = len(data) // batch
        # The last target lies at offset + S * length; for the largest offset, length - 1, it must be in the row.
        self.steps_per_epoch = (self.row_length - length) // length

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item `index`.

        Returns:
            "inputs": (length,) int64.
            "targets": (length,) int64, one symbol ahead of the inputs.
            "fresh": 0-d bool, True where an epoch starts: what was cached of this row is not what stands before.

        Raises:
            IndexError: `index` is outside [0, steps * batch); negative indices are not counted from the end.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The items of one batch, gathered at once; `torch.utils.data.DataLoader` calls this by itself."""
        items = np.array([self._within(operator.index(index)) for index in indices], dtype=np.int64)
        steps, rows = np.divmod(items, self.batch)
        epochs, blocks = np.divmod(steps, self.steps_per_epoch)
        # A batch lies in one epoch unless the reader jumps.
        known, place = np.unique(epochs, return_inverse=True)
        offsets = np.array([self._offset(int(epoch)) for epoch in known], dtype=np.int64)[place]
        starts = rows * self.row_length + offsets + blocks * self.length
        symbols = self.data[starts[:, None] + np.arange(self.length + 1)]  # (B, length + 1)
        # Two casts, two buffers: writing into a batch's inputs must not change its targets.
        inputs = torch.from_numpy(symbols[:, :-1].astype(np.int64))
        targets = torch.from_numpy(symbols[:, 1:].astype(np.int64))
        fresh = torch.from_numpy(blocks == 0)
        return [
            {"inputs": row, "targets": aim, "fresh": new} for row, aim, new in zip(inputs, targets, fresh, strict=True)
        ]

    def _within(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 <= index < {len(self)} (steps * batch), got {index}")
        return index

    def _offset(self, epoch: int) -> int:
        return int(np.random.default_rng([self.seed, epoch]).integers(self.length))


class StreamBlocks:
    """The blocks that `stream_evaluation` cuts, in the order in which they must be read: `len()` and iteration.

    Attributes:
        count: How many symbols are scored, over all blocks.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray, ends: np.ndarray, length: int, before: int) -> None:
        # Row b scores data[starts[b]:ends[b]].
        self._data, self._starts, self._ends = data, starts, ends
        self._length, self._before = length, before
        self.count = int((ends - starts).sum())

    def __len__(self) -> int:
        return -(-int((self._ends - self._starts).max()) // self._length)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in range(len(self)):
            places = self._starts[:, None] + np.arange(number * self._length, (number + 1) * self._length)  # (B, L)
            mask = places < self._ends[:, None]
            targets = np.where(mask, self._data[np.where(mask, places, 0)], 0)
            inputs = np.where(mask, self._data[np.where(mask, places - 1, 0)], 0)
            inputs[places == 0] = self._before
            yield {
                "inputs": torch.from_numpy(inputs.astype(np.int64)),
                "targets": torch.from_numpy(targets.astype(np.int64)),
                "mask": torch.from_numpy(mask),
                "fresh": torch.full((len(places),), number == 0),
            }


def stream_evaluation(
    data: np.ndarray, length: int, batch: int, before: int = 0x0A, exact: bool = True
) -> StreamBlocks:
    """Cut `data` into blocks to be scored one after the other by a model that caches what it has read.

    The data is cut into rows as in training; all rows start with a fresh cache. So the first symbols of every row but
    the first are predicted with less of the text before them than there is: with one symbol at the start of a row,
    and with the whole cache only after as many symbols as it holds. Batch 1 loses nothing; with more rows it
    is smaller the longer the rows are.

    Args:
        data: (n,) integers, n >= 1: bytes, or ids of a vocabulary.
        length: Symbols per block (L), at least 1.
        batch: Rows (B), at least 1; no more than n are made.
        before: The symbol taken to precede the data, as input for its first one; by default a newline among bytes.
        exact: True: every symbol is scored once. The rows differ by at most one symbol in length; what the last block
            lacks is masked. False: as the code of the adaptive-span family scores. The n % batch last symbols, the
            first symbol of every row and what does not fill a whole block of every row are left out: about 10 % of
            WikiText-103's valid and test at batch 48 and length 512.

    Returns:
        The blocks, each a dictionary of
        "inputs": (B, L) int64, padded with 0;
        "targets": (B, L) int64, one symbol ahead of the inputs, padded with 0;
        "mask": (B, L) bool, True where the target is to be scored;
        "fresh": (B,) bool, True in the first block.

    Raises:
        TypeError, ValueError: `data` is no 1-d array of integers.
        ValueError: `data` is empty, or too short for one block of every row with `exact=False`; `length`, `batch` or
            `before` is out of range.

    >>> for block in stream_evaluation(np.arange(1, 8), length=2, batch=2, before=0):
    ...     block["inputs"].tolist(), block["targets"].tolist(), block["mask"].tolist()
    ([[0, 1], [3, 4]], [[1, 2], [4, 5]], [[True, True], [True, True]])
    ([[2, 0], [5, 6]], [[3, 0], [6, 7]], [[True, False], [True, True]])
    >>> [block["targets"].tolist() for block in stream_evaluation(np.arange(1, 8), length=2, batch=2, exact=False)]
    [[[2, 3], [5, 6]]]
    """
    n = len(require_symbols("data", data))
    for argument, value, least in (("length", length, 1), ("batch", batch, 1), ("before", before, 0)):
        if value < least:
            raise ValueError(f"{argument}: expected at least {least}, got {value}")
    if n == 0:
        raise ValueError("data: expected at least 1 symbol to evaluate, got none; pass a split that is not empty")
    if exact:
        rows = min(batch, n)
        edges = np.arange(rows + 1) * n // rows
        return StreamBlocks(data, edges[:-1], edges[1:], length, before)
    row_length = n // batch
    blocks = (row_length - 1) // length
    if blocks < 1:
        raise ValueError(
            f"data: found {n:,} symbols, needed at least {batch * (length + 1):,} for one whole block of length "
            f"{length:,} in each of {batch:,} rows; give more data, a smaller batch or length, or exact=True"
        )
    starts = np.arange(batch) * row_length + 1
    return StreamBlocks(data, starts, starts + blocks * length, length, before)
