"""Windows of a text in random order, each by itself: for decoders that have no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sinkroute.lab.config import Config
from sinkroute.lab.data import Corpus, Windows
from sinkroute.lab.evaluation import Evaluation, evaluate_text
from sinkroute.lab.models import SparseModel
from sinkroute.lab.tasks.base import Watch
from sinkroute.lab.tasks.text import TextTask, language_loss

__all__ = ["WindowTask"]


class WindowTask(TextTask):
    """Predict the next symbol from those before it in a window of `data.length`."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        super().__init__(config, corpus)
        length, batch = config.data.length, config.train.batch
        self.items = self.in_turn(lambda text, steps: Windows(text, length, config.seed, steps * batch))

    def loss(self, model: Any, batch: Mapping[str, Tensor], step: int, part: int) -> Tensor:
        return language_loss(model(batch["inputs"]), batch["targets"])

    def evaluate(
        self,
        model: SparseModel,
        split: str,
        attack: tuple[str, Mapping[str, Any]] | None = None,
        on_batch: Watch | None = None,
    ) -> Evaluation:
        text, before = self.text(split, attack)
        return evaluate_text(
            model, text, length=self.config.data.length, batch=self.config.eval.batch, before=before, on_batch=on_batch
        )
