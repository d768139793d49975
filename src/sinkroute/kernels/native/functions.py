"""What the C functions take: the only place that says so.

ctypes turns a structure into a pointer to it by itself, so that callers pass `Rows` and `Progress` as they are.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from sinkroute.kernels.rows import Rows as RowsOfTensors
from sinkroute.kernels.storage import address

__all__ = ["DTYPES", "FUNCTIONS", "Progress", "Rows", "declare"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Rows(ctypes.Structure):
    """`Rows` of row.h."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("experts", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("softmax_cost", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("mass", ctypes.c_void_p),
        ("mass_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, rows: RowsOfTensors) -> Rows:
        """Describe rows on a CPU, of a dtype in `DTYPES`, with columns 1 apart; they must outlive what is returned."""
        logits_TE, mask_T, mass_T = rows.logits_TE, rows.token_mask, rows.token_mass
        return cls(
            address(logits_TE),
            DTYPES[logits_TE.dtype],
            logits_TE.shape[0],
            logits_TE.shape[1],
            logits_TE.stride(0),
            rows.cost == "softmax",
            address(mask_T),
            0 if mask_T is None else mask_T.stride(0),
            address(mass_T),
            0 if mass_T is None else mass_T.stride(0),
        )


class Progress(ctypes.Structure):
    """`Progress` of chains.c."""

    _fields_ = (
        ("room", ctypes.c_double),
        ("widened", ctypes.c_int64),
        ("part", ctypes.c_int64),
        ("moves", ctypes.c_int64),
    )


_INT, _FLOAT, _DOUBLE, _AT = ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p
_ROWS, _PROGRESS = ctypes.POINTER(Rows), ctypes.POINTER(Progress)

# Name: what comes back, then the arguments as the C source names them.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # tokens, experts
    "column_sums_workspace": (_INT, _INT, _INT),
    # rows, potentials, reg, precision, sums, workspace, threads
    "column_sums": (None, _ROWS, _AT, _DOUBLE, _DOUBLE, _AT, _AT, _INT),
    # rows, ranks, means, quantiles, lists
    "column_ranks": (None, _ROWS, _AT, _AT, _AT, _AT),
    # rows, costs
    "costs": (None, _ROWS, _AT),
    # rows, potentials, reg, k, normalise, experts, weights, threads
    "topk": (None, _ROWS, _AT, _DOUBLE, _INT, _INT, _AT, _AT, _INT),
    # values, tokens, experts, row stride, bias, k, std, seed, experts, noise, threads
    "noisy_topk": (None, _AT, _INT, _INT, _INT, _AT, _INT, _FLOAT, _INT, _AT, _AT, _INT),
    # values, tokens, experts, row stride, bias, k, experts, next, margins, threads
    "edge_topk": (None, _AT, _INT, _INT, _INT, _AT, _INT, _AT, _AT, _AT, _INT),
    # margins, experts, next, tokens, k, rank, least, room, counts
    "edge": (_DOUBLE, _AT, _AT, _AT, _INT, _INT, _INT, _DOUBLE, _AT, _AT),
    # rows, bias, k, target, limit, experts, loads, step, near, workspace, threads
    "choose": (None, _ROWS, _AT, _INT, _AT, _AT, _AT, _AT, _AT, _AT, _AT, _INT),
    # rows, k, lower, upper, experts, loads, bias, levels, costs, rounds, progress
    "repair": (_INT, _ROWS, _INT, _AT, _AT, _AT, _AT, _AT, _AT, _AT, _INT, _PROGRESS),
    # seed, count, numbers, threads
    "normal": (None, _INT, _INT, _AT, _INT),
}


def declare(kernels: ctypes.CDLL) -> None:
    """Tell ctypes what every function takes and gives; an `AttributeError` says that one is missing."""
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = arguments, result
