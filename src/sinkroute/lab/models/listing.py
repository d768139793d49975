"""What the training presets train, and how large it is: `sinkroute models`.

Models are built on the meta device, where parameters have shapes and no memory: counts are exact and take no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from sinkroute.lab.config import Config, StreamConfig, VisionConfig, find_preset, read_yaml, training_presets
from sinkroute.lab.models.registry import make_model

__all__ = ["ListedModel", "list_models", "model_table"]


@dataclass(frozen=True)
class ListedModel:
    """A preset's model.

    Attributes:
        name: of the preset.
        kind: of the model.
        data: that it is trained on.
        layers, d_model, experts, top_k: as in its configuration; with dense blocks there are twice as many blocks.
        sub_tokens: into which a mixture cuts a token (MH-MoE); 1: none.
        total: parameters.
        active: parameters that one token meets. A look-up table is met as a whole, as is usual in such counts.
        per_moe: parameters of one mixture, its gate included (for MH-MoE also its split and merge).
        steps: of the optimiser.
        tokens_per_step: symbols, or patches and class tokens.
    """

    name: str
    kind: str
    data: str
    layers: int
    d_model: int
    experts: int
    top_k: int
    sub_tokens: int
    total: int
    active: int
    per_moe: int
    steps: int
    tokens_per_step: int

    def json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return asdict(self)


def list_models(names: Sequence[str] = ()) -> list[ListedModel]:
    """The models of presets or YAML files, by data and size; of all training presets if none is named.

    Raises:
        FileNotFoundError: no such preset, and no such file.
        ValueError: a configuration that cannot be read, or sizes that do not fit each other.

    >>> [(model.name, model.total, model.per_moe) for model in list_models(["wikitext103-medium"])]
    [('wikitext103-medium', 215679863, 3981840)]
    """
    listed = [_listed(name, read_yaml(Config, find_preset(name))) for name in names or training_presets()]
    return sorted(listed, key=lambda model: (model.data, model.total, model.name))


def _listed(name: str, config: Config) -> ListedModel:
    model = config.model
    with torch.device("meta"):
        parameters = make_model(config).count_parameters()
    tokens = config.data.length
    if isinstance(model, VisionConfig):
        tokens = 1 + (model.image_size // model.patch) ** 2
    return ListedModel(
        name=name,
        kind=model.name,
        data=config.data.name,
        layers=model.layers,
        d_model=model.d_model,
        experts=model.experts,
        top_k=model.top_k,
        sub_tokens=model.sub_tokens if isinstance(model, StreamConfig) else 1,
        **parameters._asdict(),
        steps=config.train.steps,
        tokens_per_step=config.train.batch * tokens,
    )


def model_table(models: Iterable[ListedModel], width: int = 80) -> Table:
    """For a terminal of so many columns: with 80 the exact counts, with 124 also kind, data and length of training."""
    wide = width >= 124
    table = Table(box=None, pad_edge=False)
    for column in ("preset", "size", "experts"):
        table.add_column(column, no_wrap=True)
    for column in ("parameters", "active", "per MoE"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("model", "data", "steps × tokens") if wide else ():
        table.add_column(column, no_wrap=True)
    for model in models:
        heads = f" {model.sub_tokens}h" if model.sub_tokens > 1 else ""
        row = [escape(model.name), f"{model.layers}×{model.d_model}", f"{model.top_k} of {model.experts}{heads}"]
        row += [f"{number:,}" for number in (model.total, model.active, model.per_moe)]
        if wide:
            row += [model.kind, escape(model.data), f"{model.steps:,} × {model.tokens_per_step:,}"]
        table.add_row(*row)
    return table
