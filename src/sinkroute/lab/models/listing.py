"""What the training presets train, and how large it is: `sinkroute models`.

Models are built on the meta device, where parameters have shapes and no memory: counts are exact and take no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sinkroute.lab.config import Config, StreamConfig, VisionConfig, find_preset, read_yaml, training_presets
from sinkroute.lab.models.registry import make_model
from sinkroute.lab.presets import find_configuration
from sinkroute.lab.screen import Column, ScreenTable

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
    files = {name: find_configuration(name) for name in names}
    files = files or {name: find_preset(name) for name in training_presets()}
    listed = [_listed(name, read_yaml(Config, file)) for name, file in files.items()]
    return sorted(listed, key=lambda model: (model.data, model.total, model.name))


class _NoDraws(TorchFunctionMode):
    """Initial weights are not drawn: on the meta device torch would load its compiler for that, a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("randn", "rand"):
            func = torch.empty
        elif name.endswith(("normal_", "uniform_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _listed(name: str, config: Config) -> ListedModel:
    model = config.model
    with torch.device("meta"), _NoDraws():
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


def model_table(models: Iterable[ListedModel]) -> ScreenTable:
    """For a terminal: with 80 columns the exact counts, with more also kind, data and length of training."""
    counts = [Column(name, matters=2) for name in ("size", "experts", "parameters")]
    counts += [Column("active", matters=1), Column("per MoE", matters=1)]
    table = ScreenTable(
        [
            Column("preset", words=True),
            *counts,
            Column("model", words=True),
            Column("data", words=True),
            Column("steps × tokens"),
        ],
        elsewhere="--json",
    )
    for model in models:
        heads = f" {model.sub_tokens}h" if model.sub_tokens > 1 else ""
        table.add(
            model.name,
            f"{model.layers}×{model.d_model}",
            f"{model.top_k} of {model.experts}{heads}",
            *(f"{number:,}" for number in (model.total, model.active, model.per_moe)),
            model.kind,
            model.data,
            f"{model.steps:,} × {model.tokens_per_step:,}",
        )
    return table
