"""What is compared: numbers of `result.json` by their dotted key, and the words for what a run is measured in.

Bytes are measured in bits, words in perplexity, images in errors; all three are better when lower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sinkroute.lab.log import number

__all__ = ["METRICS", "Metric", "Quality", "capital", "dig", "metric_of", "number_at"]


@dataclass(frozen=True)
class Quality:
    """What a kind of task is measured in; lower is better.

    Attributes:
        key: in results and logs, under the name of a split.
        name: in sentences.
        heading: over a column.
        sign: behind a value in a sentence.
        digits: behind the point.
        curve: what the training curve shows.
        of_loss: a training loss in nats as a point of that curve.
        logarithmic: whether the curve of a whole run falls too far for a linear axis.
        item: one of the things that are predicted.
        token: what experts are chosen for.
        model: what learns it.
        subject: what it learns.
        progress: how far it is, as a question.
        about: what it means.
    """

    key: str
    name: str
    heading: str
    sign: str
    digits: int
    curve: str
    of_loss: Callable[[float], float]
    logarithmic: bool
    item: str
    token: str
    model: str
    subject: str
    progress: str
    about: str

    @property
    def title(self) -> str:
        """On an axis: the name with its unit."""
        return f"{self.name} in{self.sign}" if self.sign else self.name

    @property
    def drawn(self) -> bool:
        """Whether the training curve shows the quality itself, so that validation values belong beside it."""
        return self.curve == self.name

    def text(self, value: float) -> str:
        """A value as it is printed.

        >>> METRICS["bits_per_byte"].text(3.14159)
        '3.142'
        """
        return f"{value:.{self.digits}f}"


METRICS = {
    quality.key: quality
    for quality in (
        Quality(
            "bits_per_byte", "bits per byte", "bits/byte", "", 3,
            curve="bits per byte", of_loss=lambda nats: nats / math.log(2), logarithmic=False,
            item="byte", token="byte", model="byte-level language model", subject="the text",
            progress="learns to predict the next byte",
            about="Mean of −log₂ of the probability that the model gave to the byte that came. 8 is guessing, 0 is "
            "certainty.",
        ),
        Quality(
            "perplexity", "perplexity", "perplexity", "", 2,
            curve="perplexity", of_loss=lambda nats: math.exp(min(nats, 700.0)), logarithmic=True,
            item="word", token="word", model="word-level language model", subject="the text",
            progress="learns to predict the next word",
            about="e to the power of the mean of −ln of the probability that the model gave to the word that came: "
            "between how many words the model wavers, as it were.",
        ),
        Quality(
            "error", "error", "error %", " %", 2,
            curve="training loss in nats", of_loss=lambda nats: nats, logarithmic=False,
            item="image", token="patch", model="image classifier", subject="the images",
            progress="learns to tell the classes apart",
            about="Images whose class the model got wrong, in per cent of all.",
        ),
    )
}  # fmt: skip
"""By their key in results."""

# Last part of a dotted key → (decimals, name in a heading).
_KINDS = {key: (quality.digits, quality.heading) for key, quality in METRICS.items()} | {
    "bits_per_symbol": (3, "bits/symbol"),
    "max_vio": (2, "MaxVio"),
    "max_vio_batch": (2, "MaxVio (batches)"),
    "ms_per_step": (1, "ms/step (wall)"),
    "peak_memory_mb": (0, "peak MB"),
    "dead": (1, "dead experts"),
    "sinkhorn_steps": (0, "Sinkhorn steps"),
    "dropped": (4, "share dropped"),
    "steps_to_balance": (1, "steps to balance"),
    "censored": (2, "share never balanced"),
}
_HIGHER = ("entropy", "tokens_per_second")
# Neither few nor many is better, or the machine has its say in it.
_UNRANKED = ("sinkhorn_steps", "ms_per_step", "tokens_per_second", "seconds")
_ABOUT = {
    "train.max_vio": "Mean over steps and layers, last quarter of training.",
    "serving.max_vio": "Over the whole validation set, mean over layers.",
    "serving.dead": "Experts with under 1 % of a fair share in serving, over all layers.",
    "sinkhorn_steps": "Training steps that ran Sinkhorn.",
    "train.ms_per_step": "Wall time of a training step, as the machine was: times of runs are not compared.",
    "train.peak_memory_mb": "Peak memory while training.",
}


@dataclass(frozen=True)
class Metric:
    """A number of `result.json`, by its dotted key, with its heading and the decimals that are shown."""

    key: str
    title: str
    digits: int
    lower_is_better: bool

    @classmethod
    def of(cls, key: str) -> Metric:
        """
        >>> Metric.of("attacked.word-swap@2.5%.perplexity").title
        'word-swap@2.5% perplexity'
        >>> Metric.of("inference.noise.serving.max_vio").title
        'inference by noise: serving MaxVio'
        >>> Metric.of("switch.steps_to_balance").title
        'after the switch: steps to balance'
        """
        *where, last = key.split(".")
        digits, name = _KINDS.get(last, (3, last.replace("_", " ")))
        prefix = ""
        if where[:1] == ["inference"] and len(where) > 1:
            prefix, where = f"inference by {where[1]}: ", where[2:]
        if where[:1] == ["attacked"]:
            where = where[1:]
        place = {"train": "training", "switch": "after the switch:"}.get(".".join(where), ".".join(where))
        if last in ("ms_per_step", "peak_memory_mb", "dead"):
            place = ""
        return cls(key, f"{prefix}{place} {name}".replace("  ", " ").strip(), digits, last not in _HIGHER)

    @property
    def ranked(self) -> bool:
        """Whether a lower (or higher) value is called better at all; times of runs are not."""
        return self.key.rpartition(".")[2] not in _UNRANKED

    @property
    def timed(self) -> bool:
        """Whether it is a wall time, which says as much of the machine as of the method."""
        return self.key.rpartition(".")[2] in ("ms_per_step", "tokens_per_second", "seconds")

    @property
    def about(self) -> str:
        """What it means, in a sentence; its key where there is none."""
        return _ABOUT.get(self.key, self.key)


def capital(text: str) -> str:
    """A text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def dig(result: Any, key: str) -> Any:
    """A value by its dotted key, of which a part may itself have dots (an attack at a rate of 2.5 %); None without.

    >>> dig({"attacked": {"word-swap@2.5%": {"error": 3}}}, "attacked.word-swap@2.5%.error")
    3
    """
    if not key:
        return result
    if not isinstance(result, Mapping):
        return None
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        head = ".".join(parts[:count])
        if head in result and (found := dig(result[head], ".".join(parts[count:]))) is not None:
            return found
    return None


def number_at(result: Any, key: str) -> float | None:
    """A number of a result, which may be nan; None without one."""
    return number(dig(result, key))


def metric_of(result: Mapping[str, Any] | None, evaluated: Mapping[str, Any], model: Mapping[str, Any]) -> Quality:
    """What a run is measured in.

    Args:
        result: content of `result.json`; None while the run is unfinished. Results from before there was a choice have
            no "metric" and are in bits per byte.
        evaluated: a log line of kind "eval"; empty without one.
        model: of the run's configuration. It decides where nothing was measured yet: more than the 256 symbols that
            bytes have are words.

    Raises:
        ValueError: a metric that there is not.

    >>> metric_of({"metric": "error"}, {}, {}).title
    'error in %'
    >>> metric_of(None, {}, {"name": "stream", "vocab": 50000}).name
    'perplexity'
    """
    if result is not None:
        key = result.get("metric", "bits_per_byte")
        if key not in METRICS:
            raise ValueError(f"'metric' must be one of {', '.join(METRICS)}; received {key!r}")
        return METRICS[key]
    known = next((key for key in METRICS if key in evaluated), None)
    if known is None:
        vocabulary = model.get("vocab", 256)
        words = isinstance(vocabulary, int) and vocabulary > 256
        known = "error" if model.get("name") == "vit" else "perplexity" if words else "bits_per_byte"
    return METRICS[known]
