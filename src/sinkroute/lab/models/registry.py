"""The kinds of models, by the `name` of their configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sinkroute.lab.config import Config
from sinkroute.lab.models.decoder import Decoder
from sinkroute.lab.models.sparse import SparseModel
from sinkroute.lab.models.stream import StreamDecoder
from sinkroute.lab.models.vision import VisionTransformer

__all__ = ["MODELS", "make_model"]

MODELS: dict[str, Callable[[Any, Any], SparseModel]] = {
    "decoder": Decoder,
    "stream": StreamDecoder,
    "vit": VisionTransformer,
}
"""Name -> class; made of (its configuration, the router's)."""


def make_model(config: Config) -> SparseModel:
    """The model of a configuration, with initial weights that depend on the seed alone.

    The global generator is left as it was. Routers' draws are keyed by the seed too, unless their options say
    otherwise. Under `with torch.device("meta")` it has shapes and no memory.

    >>> with torch.device("meta"):
    ...     make_model(Config()).count_parameters().total
    1905792
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MODELS[config.model.name](config.model, config.router)
    if "seed" not in config.router.options:
        for layer in model.moe_layers:
            layer.router.seed = config.seed
    return model
