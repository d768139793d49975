"""What runs are measured in, with the words that go with it: bytes in bits, words in perplexity, images in errors.

All of them are better when lower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METRICS", "Metric", "capital", "metric_of"]


@dataclass(frozen=True)
class Metric:
    """A measure of quality, lower is better.

    Attributes:
        key: in results and logs.
        name: in sentences.
        unit: over a column of the table.
        sign: behind a value in a sentence.
        difference: behind a difference of two values in a sentence.
        amount: a value in words, in validation.
        digits: behind the point.
        curve: what the training curve shows.
        of_loss: a training loss in nats as a point of that curve.
        logarithmic: whether the curve of a whole run falls too far for a linear axis.
        item: one of the things that are predicted.
        token: what experts are chosen for.
        model: what learns it.
        subject: what it learns.
        progress: how far it is, as a question.
    """

    key: str
    name: str
    unit: str
    sign: str
    difference: str
    amount: str
    digits: int
    curve: str
    of_loss: Callable[[float], float]
    logarithmic: bool
    item: str
    token: str
    model: str
    subject: str
    progress: str

    @property
    def title(self) -> str:
        """On an axis: the name with its unit."""
        return f"{self.name} in{self.sign}" if self.sign else self.name

    @property
    def drawn(self) -> bool:
        """Whether the training curve shows the metric itself, so that validation values belong beside it."""
        return self.curve == self.name

    def text(self, value: float) -> str:
        """A value as it is printed.

        >>> METRICS["bits_per_byte"].text(3.14159)
        '3.142'
        """
        return f"{value:.{self.digits}f}"


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))


def _itself(nats: float) -> float:
    return nats


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            key="bits_per_byte",
            name="bits per byte",
            unit="bits/byte",
            sign="",
            difference="",
            amount="{} validation bits per byte",
            digits=3,
            curve="bits per byte",
            of_loss=_bits,
            logarithmic=False,
            item="byte",
            token="byte",
            model="byte-level language model",
            subject="the text",
            progress="learns to predict the next byte",
        ),
        Metric(
            key="perplexity",
            name="perplexity",
            unit="perplexity",
            sign="",
            difference="",
            amount="a validation perplexity of {}",
            digits=2,
            curve="perplexity",
            of_loss=_perplexity,
            logarithmic=True,
            item="word",
            token="word",
            model="word-level language model",
            subject="the text",
            progress="learns to predict the next word",
        ),
        Metric(
            key="error",
            name="error",
            unit="error in %",
            sign=" %",
            difference=" points",
            amount="a validation error of {}",
            digits=2,
            curve="training loss in nats",
            of_loss=_itself,
            logarithmic=False,
            item="image",
            token="patch",
            model="image classifier",
            subject="the images",
            progress="learns to tell the classes apart",
        ),
    )
}
"""By their key in results."""


def capital(text: str) -> str:
    """A text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def metric_of(result: Mapping[str, Any] | None, evaluated: Mapping[str, Any], model: Mapping[str, Any]) -> Metric:
    """The metric of a run.

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
