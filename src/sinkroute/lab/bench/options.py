"""What `sinkroute bench` can be told. (Without torch: it is read before torch is loaded.)"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Bench", "Mixture"]


@dataclass(frozen=True)
class Mixture:
    """The model to which `--simulate` scales measured loads; experts and top-k come with them."""

    layers: int = 16
    """Layers, each with a mixture; every one is the mean of the measured ones."""
    d_model: int = 2048
    """Width."""
    d_hidden: int = 1024
    """Hidden width of an expert."""
    matrices: int = 3
    """Of an expert: 3 with a gate, such as SwiGLU, or 2."""
    tokens: int = 16384
    """Of a rank in a step."""
    length: int = 4096
    """Of a sequence."""
    vocab: int = 50304
    """Of the output."""
    bytes: int = 2
    """Of a number."""
    capacity: float | None = None
    """Of an expert, relative to its share; what is above it is dropped."""
    plan_over_ranks: bool = False
    """Plans are of the tokens of all ranks that share the experts; each pass of the solver is a call then."""

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "d_hidden", "matrices", "tokens", "length", "vocab", "bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"mixture.{name} must be 1 or more, got {getattr(self, name)}")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"mixture.capacity must be above 0, got {self.capacity:g}")


@dataclass
class Bench:
    """Time and memory of every router's forward and backward pass, relative to plain top-k (softmax).

    What is in the file already is not measured again: routers and sizes of several calls come together in one file.
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
    simulate: tuple[str, ...] = ()
    """Measure nothing here: from the loads of runs (folders, kept studies, a LoadMonitor's log) the time of a training
    step on many ranks, and the loss at equal time."""
    machine: str = "h100-node"
    """For --simulate: h100-node, h200-node, or this-machine, which is measured."""
    ranks: tuple[int, ...] = (8, 64, 512, 4096)
    """For --simulate."""
    mixture: Mixture = field(default_factory=Mixture)
    """For --simulate."""
