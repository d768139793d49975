"""What `sinkroute bench` can be told. (Without torch: it is read before torch is loaded.)"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Bench"]


@dataclass
class Bench:
    """Time and memory of every router's forward and backward pass, relative to plain top-k (softmax).

    Sizes that are in the file already are not measured again.
    """

    sizes: tuple[str, ...] = ()
    """Sizes TOKENSxEXPERTSxTOP_K, such as 4096x16x2; by default 4k, 32k, 128k x 16, 64, 256 x 1, 2, 8."""
    routers: tuple[str, ...] = ()
    """Routers beside softmax; by default all."""
    quick: bool = False
    """Three sizes, a few seconds each, for a first impression."""
    seconds: float = 12.0
    """How long the timing of a size may take (where passes are long it takes longer, for a few of each router)."""
    repeats: int = 5
    """Repeats; each gives one ratio per router."""
    threads: int = 1
    """Threads of torch."""
    seed: int = 0
    """Of the logits and of the order of calls."""
    out: str = "runs/bench/routing.json"
    """Where the figures are written, as JSON."""
    fresh: bool = False
    """Forget what is in the file."""
