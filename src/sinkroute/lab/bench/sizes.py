"""The sizes of routing problems, and the logits that are routed."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["GRID", "QUICK", "Size"]


class Size(NamedTuple):
    """A routing problem: T tokens choose K of E experts.

    >>> str(Size.parse("4096x16x2"))
    '4096x16x2'
    """

    tokens: int
    experts: int
    top_k: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """The size that is written so.

        Raises:
            ValueError: the text is not TxExK, or K is above E.
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"a size must be TOKENSxEXPERTSxTOP_K, such as 4096x16x2, got {text!r}")
        size = cls(*map(int, parts))
        if size.top_k > size.experts:
            raise ValueError(f"a token cannot visit an expert twice: top_k must be at most experts, got {text!r}")
        return size

    def __str__(self) -> str:
        return f"{self.tokens}x{self.experts}x{self.top_k}"

    def logits(self, width: int, seed: int, device: torch.device) -> Tensor:
        """(T, width) logits as gates give them: unit-variance Gaussians, with some experts better liked than others
        (a Gaussian offset of unit variance per expert). A gate that gives more than E numbers gives the same first."""
        generator = torch.Generator().manual_seed(seed)
        offset_E = torch.randn(self.experts, generator=generator)
        parts = [torch.randn(self.tokens, self.experts, generator=generator) for _ in range(width // self.experts)]
        return torch.cat([parts[0] + offset_E, *parts[1:]], dim=1).to(device)


GRID = tuple(itertools.starmap(Size, itertools.product((4096, 32768, 131072), (16, 64, 256), (1, 2, 8))))
QUICK = (Size(4096, 16, 2), Size(4096, 64, 8), Size(32768, 64, 2))
