"""A text read as streams, block after block, by a model that remembers: as the paper's family does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sinkroute.lab.config import Config
from sinkroute.lab.data import Corpus, Streams, stream_evaluation
from sinkroute.lab.evaluation import Evaluation, Score, serving_mode
from sinkroute.lab.models import SparseModel
from sinkroute.lab.tasks.base import Watch
from sinkroute.lab.tasks.text import TextTask, language_loss

__all__ = ["StreamTask"]


class StreamTask(TextTask):
    """Predict the next symbol from all before it that the model remembers, in blocks of `data.length`."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        super().__init__(config, corpus)
        train = config.train
        length = config.data.length
        self.items = self.in_turn(lambda text, steps: Streams(text, length, train.batch, config.seed, steps))
        # Of each micro-batch: its rows are other streams than those of the others.
        self._memory: dict[int, Tensor] = {}

    def loss(self, model: Any, batch: Mapping[str, Tensor], step: int, part: int) -> Tensor:
        memory_NBSD = self._memory.get(part)
        if memory_NBSD is not None:
            memory_NBSD = memory_NBSD.to(batch["inputs"].device)
            memory_NBSD = memory_NBSD.masked_fill(batch["fresh"][None, :, None, None], 0.0)
        scores_BLV, self._memory[part] = model(batch["inputs"], memory_NBSD)
        return language_loss(scores_BLV, batch["targets"])

    def carried(self) -> dict[str, Tensor]:
        return {f"memory-{part}": memory_NBSD.transpose(0, 1) for part, memory_NBSD in self._memory.items()}

    def carry_on(self, carried: Mapping[str, Tensor]) -> None:
        self._memory = {
            int(name.removeprefix("memory-")): memory_BNSD.transpose(0, 1) for name, memory_BNSD in carried.items()
        }

    def evaluate(
        self,
        model: SparseModel,
        split: str,
        attack: tuple[str, Mapping[str, Any]] | None = None,
        on_batch: Watch | None = None,
    ) -> Evaluation:
        text, before = self.text(split, attack)
        config = self.config
        device = next(model.parameters()).device
        blocks = stream_evaluation(text, config.data.length, config.eval.batch, before, exact=config.eval.exact)
        score, memory_NBSD = Score(), None
        with serving_mode(model) as serving:
            for number, block in enumerate(blocks):
                serving.begin_pass(number)
                inputs_BL, targets_BL, mask_BL = (block[key].to(device) for key in ("inputs", "targets", "mask"))
                mask = None if bool(block["mask"].all()) else mask_BL
                scores_BLV, memory_NBSD = model(inputs_BL, memory_NBSD, mask)
                score.add(scores_BLV, targets_BL, mask)
                score.add_loads(serving.loads())
                if on_batch is not None:
                    on_batch(number + 1, len(blocks))
        return score.found()
