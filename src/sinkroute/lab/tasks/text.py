"""Language modelling: what windows and streams of a text have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from sinkroute.lab.attacks import attack_text
from sinkroute.lab.config import Config, ModelConfig, StreamConfig
from sinkroute.lab.data import Corpus
from sinkroute.lab.evaluation import Evaluation
from sinkroute.lab.tasks.base import Task

__all__ = ["TextTask", "language_loss"]


class TextTask(Task):
    """Predict the next symbol.

    Raises:
        ValueError: a text with more symbols than the model has; one text where the configuration asks for two.
    """

    name = "text"

    def __init__(self, config: Config, corpus: Corpus) -> None:
        super().__init__(config)
        assert isinstance(config.model, (ModelConfig, StreamConfig))
        if config.model.vocab < corpus.symbols:
            raise ValueError(
                f"model.vocab must be {corpus.symbols:,} or more, got {config.model.vocab:,}: "
                f"so many symbols has the text {corpus.name!r}"
            )
        if (corpus.first is None) != (config.data.switch_to is None):
            raise ValueError(
                f"data.switch_to={config.data.switch_to!r}, but the data are {corpus.name!r}; load them with "
                "load_data(config)"
            )
        self.corpus = corpus
        vocabulary = corpus.vocabulary
        of_bytes = vocabulary is None or vocabulary.byte_values is not None
        self.metric = "bits_per_byte" if of_bytes else "perplexity"
        self.items_each = config.data.length

    def in_turn(self, read: Callable[[np.ndarray, int], Dataset[dict[str, Tensor]]]) -> Dataset[dict[str, Tensor]]:
        """`read(text, steps)` of the training text; where training turns to another, of one and then of the other."""
        steps, at = self.config.train.steps, self.config.data.switch_at
        if self.corpus.first is None:
            return read(self.corpus.train, steps)
        return ConcatDataset([read(self.corpus.first, at), read(self.corpus.train, steps - at)])

    def text(self, split: str, attack: tuple[str, Mapping[str, Any]] | None) -> tuple[np.ndarray, int]:
        """A split, attacked or not, and the symbol that stands before it."""
        before = int((self.corpus.train if split == "valid" else self.corpus.valid)[-1])
        text = getattr(self.corpus, split)[: self.config.eval.limit]
        if attack is not None:
            name, options = attack
            text = attack_text(name, text, seed=self.config.seed, vocabulary=self.corpus.vocabulary, **options)
        return text, before

    def check_attack(self, name: str, options: Mapping[str, Any]) -> None:
        head = self.corpus.valid[:64]
        attack_text(name, head, seed=self.config.seed, vocabulary=self.corpus.vocabulary, **options)

    def quality(self, found: Evaluation) -> dict[str, float]:
        if self.metric == "bits_per_byte":
            return {"bytes": found.count, "bits_per_byte": found.bits, "perplexity": found.perplexity}
        return {"symbols": found.count, "perplexity": found.perplexity, "bits_per_symbol": found.bits}


def language_loss(scores_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32."""
    return F.cross_entropy(scores_BLV.flatten(0, 1).float(), targets_BL.flatten())
