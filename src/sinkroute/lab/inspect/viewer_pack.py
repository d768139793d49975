"""The choices of one layer as few bytes, which the viewer's script unfolds when the layer is first looked at.

In this order, then deflated (zlib) as a whole; a column is one number for each of T tokens:

    experts     K columns of bytes, the heaviest first; with more than 256 experts K columns of their upper bytes follow
    values      K columns: levels of the scores, or of the weights where there are no scores; all columns but the first
                as what the level is below that of the column before, modulo 256
    factors     with scores only: weight over score. One column of levels where all of a token's choices share one, as
                under every rule that scales or renormalises; else K columns
    dropped     with scores only: ceil(K / 8) columns of bits, bit k for the k-th choice that balanced routing drops
    new         for each dropped choice, token by token, another expert, the best score first: all lower bytes, all
                upper bytes if there are more than 256 experts, all levels of their scores, as what they are below the
                one before of the same token

A level is a byte on a scale of ratios: 255 is the layer's largest, 16 levels less are half of it, 0 is 2^−15.9 of the
largest or less. So a value that is shown is within 2.2 % of the true one, and the product of two within 4.4 %.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import torch
from torch import Tensor

from sinkroute.lab.inspect.choices import Choices

__all__ = ["pack", "spell"]

_OCTAVE = 16
# Of a token's largest weight: what rounding may take from weights that are their scores times one factor.
_STEADY = 0.01


def pack(choices: Choices, experts: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes, and what is needed to read them: `tokens`, `top_k`, `wide`, `peak`, `factor` and `factor_peak`.

    Args:
        choices: of one layer.
        experts: E.
    """
    wide = experts > 256
    tokens, top_k = choices.experts_TK.shape
    out = _experts(choices.experts_TK.t().flatten(), wide)
    told: dict[str, Any] = {"tokens": tokens, "top_k": top_k, "wide": wide}
    weights_TK, scores_TK = _plain(choices.weights_TK), choices.scores_TK
    if scores_TK is None or choices.balanced_TK is None or choices.balanced_scores_TK is None:
        peak = _peak(weights_TK)
        out += _bytes(_differences(_levels(weights_TK, peak)))
        return _deflated(out), told | {"peak": peak, "factor": None, "factor_peak": 0.0}
    peak = max(_peak(scores_TK), _peak(choices.balanced_scores_TK))
    out += _bytes(_differences(_levels(scores_TK, peak)))
    factor_T1 = weights_TK.sum(-1, keepdim=True) / scores_TK.sum(-1, keepdim=True).clamp(min=1e-30)
    most_T1 = weights_TK.amax(-1, keepdim=True)
    steady = bool(((weights_TK - factor_T1 * scores_TK).abs() <= _STEADY * most_T1 + 1e-12).all())
    factors = factor_T1 if steady else _plain(weights_TK / scores_TK.clamp(min=1e-30))
    factor_peak = _peak(factors)
    out += _bytes(_levels(factors, factor_peak).t())
    out += _changes(choices.experts_TK, choices.balanced_TK, choices.balanced_scores_TK, peak, wide)
    return _deflated(out), told | {
        "peak": peak,
        "factor": "token" if steady else "choice",
        "factor_peak": factor_peak,
    }


def spell(packed: bytes) -> str:
    """As letters that can stand in a script element: Python's base 85, a comma for its `<`. A quarter longer.

    >>> spell(bytes([152, 12])), spell(b"")
    ('m,#', '')
    """
    return base64.b85encode(packed).decode("ascii").replace("<", ",")


def _deflated(content: bytes) -> bytes:
    """Nearly all that can be saved are the frequencies of bytes, which differ from column to column. So a table is for
    4096 bytes (a memory level of 6), and short matches are not looked for: a tenth smaller than as zlib does it.
    """
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 6, zlib.Z_FILTERED)
    return deflate.compress(content) + deflate.flush()


def _changes(experts_TK: Tensor, balanced_TK: Tensor, scores_TK: Tensor, peak: float, wide: bool) -> bytes:
    same_TKK = experts_TK[:, :, None] == balanced_TK[:, None, :]
    dropped_TK, new_TK = ~same_TKK.any(2), ~same_TKK.any(1)
    tokens, top_k = experts_TK.shape
    bits_TK = torch.zeros(tokens, -(-top_k // 8) * 8, dtype=torch.uint8)
    bits_TK[:, :top_k] = dropped_TK
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    masks = (bits_TK.unflatten(-1, (-1, 8)) * powers).sum(-1).to(torch.uint8)
    levels_N = _levels(scores_TK, peak)[new_TK].to(torch.int16)
    token_N = new_TK.nonzero()[:, 0]
    below_N = levels_N.clone()
    below_N[1:] = torch.where(token_N[1:] == token_N[:-1], levels_N[:-1] - levels_N[1:], levels_N[1:])
    return _bytes(masks.t()) + _experts(balanced_TK[new_TK], wide) + _bytes(below_N.remainder(256).to(torch.uint8))


def _levels(values: Tensor, peak: float) -> Tensor:
    """Bytes, as the module says."""
    steps = 255 + _OCTAVE * (values.double().clamp(min=1e-300) / peak).log2()
    return steps.round().clamp(0, 255).to(torch.uint8)


def _differences(levels_TK: Tensor) -> Tensor:
    """(K, T)."""
    levels_KT = levels_TK.t().to(torch.int16)
    return torch.cat([levels_KT[:1], levels_KT[:-1] - levels_KT[1:]]).remainder(256).to(torch.uint8)


def _experts(experts: Tensor, wide: bool) -> bytes:
    lower = _bytes((experts % 256).to(torch.uint8))
    return lower + _bytes((experts // 256).to(torch.uint8)) if wide else lower


def _peak(values: Tensor) -> float:
    return max(values.max().item(), 1e-30) if values.numel() else 1.0


def _plain(values: Tensor) -> Tensor:
    """A rule that is not understood may give any number; what cannot stand on the scale is nothing."""
    return values.float().nan_to_num(0, 0, 0).clamp(min=0)


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()
