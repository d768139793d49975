"""What an inspection found, as numbers: of each layer, of the checkpoint, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sinkroute.lab.inspect.choices import Choices
from sinkroute.routing.metrics import DEAD, coefficient_of_variation, load_entropy, max_violation

__all__ = ["NEAR_DEAD", "Alternative", "Audit", "Layer", "Pictures", "Setting", "mean"]

FORMAT = 2  # 1: only experts without any token were dead
# Of the mean load: an expert with less is near-dead.
NEAR_DEAD = 0.1


@dataclass(frozen=True)
class Alternative:
    """What another routing of the same logits would do, batch by batch.

    Attributes:
        tokens_moved: share of the tokens whose set of experts is another.
        choices_moved: share of the choices that go to an expert that the model did not choose.
        score_lost: 1 − (score of the experts chosen) / (score of those that the model chose), both summed over tokens.
            Below 0 where the model does not choose the best scores itself (a correction bias, a limit to groups).
        load: (E,) int64, over the whole text.
        max_vio_batch: MaxVio of single batches, mean.
    """

    tokens_moved: float
    choices_moved: float
    score_lost: float
    load: Tensor
    max_vio_batch: float

    @property
    def max_vio(self) -> float:
        return max_violation(self.load).item()

    def json(self) -> dict[str, Any]:
        return {
            "tokens_moved": self.tokens_moved,
            "choices_moved": self.choices_moved,
            "score_lost": self.score_lost,
            "max_vio": self.max_vio,
            "max_vio_batch": self.max_vio_batch,
            "load": self.load.tolist(),
        }


@dataclass(frozen=True)
class Layer:
    """A router.

    Attributes:
        path: in the model.
        router: its class.
        rule: how it chooses and weighs; None where that is not understood.
        reason: why not; None where it is.
        top_k, load: K and (E,) int64; None where not even its choices can be read.
        tokens: that it saw and that are counted.
        gate_entropy: of a token's scores, over ln E, mean; 1 is undecided, 0 is sure.
        max_vio_batch: MaxVio of single batches, mean.
        alternatives: by name; empty where the rule is not understood.
        choices: of the tokens that the viewer shows; None where there are no such tokens.
        kept_in: the tensor of the model that would hold what the recommended router learns: its correction bias, or its
            gate; None where it has neither.
    """

    path: str
    router: str
    rule: str | None
    reason: str | None
    tokens: int = 0
    top_k: int | None = None
    load: Tensor | None = None
    gate_entropy: float | None = None
    max_vio_batch: float | None = None
    alternatives: dict[str, Alternative] = field(default_factory=dict)
    choices: Choices | None = None
    kept_in: str | None = None

    @property
    def max_vio(self) -> float | None:
        return None if self.load is None else max_violation(self.load).item()

    @property
    def dead(self) -> list[int]:
        """Experts with less than a hundredth of the mean load (`sinkroute.routing.metrics.DEAD`)."""
        return self._below(0, DEAD)

    @property
    def unseen(self) -> list[int]:
        """Those of the dead that no token chose."""
        return [] if self.load is None else torch.nonzero(self.load == 0).flatten().tolist()

    @property
    def near_dead(self) -> list[int]:
        """Experts that are not dead, but are chosen less than a tenth as often as the mean."""
        return self._below(DEAD, NEAR_DEAD)

    def _below(self, least: float, most: float) -> list[int]:
        return [expert for expert, share in enumerate(self.relative()) if least <= share < most]

    def relative(self) -> list[float]:
        """Load over mean load."""
        if self.load is None:
            return []
        mean = max(self.load.double().mean().item(), 1e-9)
        return (self.load.double() / mean).tolist()

    def json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "path": self.path,
            "router": self.router,
            "rule": self.rule,
            "reason": self.reason,
            "tokens": self.tokens,
        }
        if self.load is None:
            return out
        return out | {
            "experts": len(self.load),
            "top_k": self.top_k,
            "max_vio": self.max_vio,
            "max_vio_batch": self.max_vio_batch,
            "entropy": load_entropy(self.load).item(),
            "cv": coefficient_of_variation(self.load).item(),
            "dead": self.dead,
            "unseen": self.unseen,
            "near_dead": self.near_dead,
            "gate_entropy": self.gate_entropy,
            "load": self.load.tolist(),
            "kept_in": self.kept_in,
            "alternatives": {name: other.json() for name, other in self.alternatives.items()},
        }


@dataclass(frozen=True)
class Setting:
    """How it was measured.

    Attributes:
        tokens: of the text that are counted.
        windows, length, batch: windows, tokens in each (BOS included), and windows in a batch.
        bos: whether each window starts with a symbol of the tokenizer's, which is not counted.
        by_layer: whether one layer at a time was in memory.
        held_mb: hidden states of all windows, which are kept while a layer is exchanged; 0 if not by layer.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    text: str
    tokens: int
    windows: int
    length: int
    batch: int
    bos: bool
    by_layer: bool
    held_mb: float


@dataclass(frozen=True)
class Pictures:
    """The images whose patches the viewer shows.

    Attributes:
        pixels: (N, C, H, W) uint8.
        side: patches in a row, and rows of them; before the patches of an image stands its class token.
    """

    pixels: Tensor
    side: int


@dataclass(frozen=True)
class Audit:
    """An inspection.

    Attributes:
        checkpoint_mb: None where its files are not in a folder that can be looked into.
        words: the text of the tokens that the viewer shows, or where in an image they are; () without a viewer.
        pictures: those images; None for a text.
    """

    setting: Setting
    layers: list[Layer]
    seconds: float
    peak_memory_mb: float
    checkpoint_mb: float | None
    words: tuple[str, ...] = ()
    pictures: Pictures | None = None

    @property
    def of_images(self) -> bool:
        """Whether a run was inspected on its images, which are its windows, and no text."""
        return self.setting.text.endswith("validation images")

    @property
    def read(self) -> list[Layer]:
        """Layers with a load."""
        return [layer for layer in self.layers if layer.load is not None]

    def mean(self, name: str, value: str) -> float | None:
        """Mean of an alternative's value over the layers that have it."""
        found = [getattr(layer.alternatives[name], value) for layer in self.layers if name in layer.alternatives]
        return mean(found) if found else None

    def json(self) -> dict[str, Any]:
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.alternatives))
        vio = [layer.max_vio for layer in self.read if layer.max_vio is not None]
        values = ("tokens_moved", "choices_moved", "score_lost", "max_vio", "max_vio_batch")
        return {
            "format": FORMAT,
            **vars(self.setting),
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
            "checkpoint_mb": self.checkpoint_mb,
            "summary": {
                "layers": len(self.layers),
                "read": len(self.read),
                "understood": sum(layer.rule is not None for layer in self.layers),
                "experts": sum(len(layer.load) for layer in self.read if layer.load is not None),
                "dead": sum(len(layer.dead) for layer in self.read),
                "unseen": sum(len(layer.unseen) for layer in self.read),
                "near_dead": sum(len(layer.near_dead) for layer in self.read),
                "max_vio_mean": sum(vio) / len(vio) if vio else None,
                "max_vio_worst": max(vio, default=None),
                "alternatives": {name: {value: self.mean(name, value) for value in values} for name in names},
            },
            "layers": [layer.json() for layer in self.layers],
        }


def mean(values: Sequence[float]) -> float:
    """0 of nothing."""
    return sum(values) / len(values) if values else 0.0
