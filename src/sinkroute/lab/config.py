"""Configurations: settings with their ranges, read strictly from YAML, with overrides on the command line.

A misspelt key is an error that names the nearest right one: a run must not silently use a default.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import BeforeValidator, Field, model_validator

from sinkroute._errors import nearest
from sinkroute.lab.files import write_text
from sinkroute.lab.images.augment import Augment
from sinkroute.lab.settings import (
    Count,
    Flag,
    Key,
    Natural,
    Number,
    Positive,
    Scalar,
    Share,
    from_mapping,
    numeric,
    settings,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "RouterConfig",
    "StreamConfig",
    "TrainConfig",
    "VisionConfig",
    "differences",
    "find_preset",
    "from_mapping",
    "parse_scalar",
    "preset_folder",
    "read_yaml",
    "to_mapping",
    "training_presets",
    "write_yaml",
]

T = TypeVar("T")
Several = Annotated[Count, Field(ge=2)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]


@settings("data")
class DataConfig:
    """What is learnt: a text (`sinkroute.lab.data`) or labelled images (`sinkroute.lab.images`)."""

    name: str = "wikipedia"
    """A text ("wikipedia", "wikitext-103", "enwik8", ...) or, for a "vit", images ("mnist-5k", "imagenet-1k", ...)."""
    path: str | None = None
    """Where it lies; what a package brings along needs none."""
    length: Count = 128
    """Symbols in a training or evaluation window, or in a block of a stream."""
    switch_to: str | None = None
    """Another text, of the same symbols, that training turns to in its midst; valid and test are then of that."""
    switch_at: Natural = 0
    """The first step that reads it, counted from 0."""
    augment: Augment = Field(default_factory=Augment)
    """What is done to training images."""


@settings("model")
class ModelConfig:
    """The compact decoder of today's kind."""

    name: Literal["decoder"] = "decoder"
    """The kind of model."""
    vocab: Several = 256
    """Symbols; 256 for bytes."""
    layers: Count = 4
    """Blocks, each with attention and a mixture of experts."""
    d_model: Count = 128
    """Width."""
    heads: Count = 4
    """Attention heads."""
    d_hidden: Count = 128
    """Hidden width of each expert."""
    experts: Count = 8
    """Experts in a layer."""
    top_k: Count = 2
    """Experts that a token visits."""
    activation: str = "swiglu"
    """Of the experts: swiglu, gelu or relu."""
    shared_hidden: Count | None = None
    """Hidden width of an expert that all tokens visit; None: no such expert."""
    capacity: Positive | None = None
    """In training an expert takes at most so many times its even share of the tokens; None: it takes all."""


@settings("model")
class StreamConfig:
    """The decoder of the paper's family, which reads a text as one stream and remembers what it read."""

    name: Literal["stream"] = "stream"
    """The kind of model."""
    vocab: Several = 256
    """Symbols."""
    layers: Count = 6
    """Blocks, each with attention and a mixture of experts."""
    d_model: Count = 352
    """Width."""
    heads: Count = 8
    """Attention heads."""
    span: Count = 1024
    """Symbols that a symbol sees, all of them before itself."""
    d_hidden: Count = 352
    """Hidden width of each expert."""
    experts: Count = 16
    """Experts in a layer."""
    top_k: Count = 2
    """Experts that a token, or a sub-token, visits."""
    sub_tokens: Count = 1
    """Heads of the mixture (MH-MoE): parts of a token that visit experts by themselves; 1: a plain mixture."""
    dense_blocks: Flag = False
    """Whether a block with a dense layer follows each block with a mixture, as in GLaM."""
    dropout: Fraction = 0.1
    """In attention, inside the experts and behind the mixture."""
    capacity: Positive | None = None
    """In training an expert takes at most so many times its even share of the tokens; None: it takes all."""


@settings("model")
class VisionConfig:
    """A vision transformer whose later feed-forward layers are mixtures of experts."""

    name: Literal["vit"] = "vit"
    """The kind of model."""
    image_size: Count = 224
    """Side of the images in pixels; others are resized."""
    channels: Count = 3
    """1 for grey images, 3 for colour."""
    classes: Several = 1000
    """Classes to tell apart."""
    patch: Count = 16
    """Side of a patch in pixels."""
    layers: Count = 12
    """Blocks."""
    d_model: Count = 192
    """Width."""
    heads: Count = 3
    """Attention heads."""
    d_hidden: Count = 768
    """Hidden width of the dense feed-forward layers and of each expert."""
    moe_from: Natural = 6
    """Blocks from this one on, counted from 0, have a mixture instead of a dense feed-forward layer."""
    experts: Count = 8
    """Experts in a layer."""
    top_k: Count = 2
    """Experts that a token visits."""
    drop_path: Fraction = 0.1
    """Share of the samples that skip the last block while training; earlier blocks less, in proportion to depth."""


@settings("router")
class RouterConfig:
    """How tokens choose experts."""

    name: str = "ssr-s"
    """A router, see `sinkroute routers`; its options (`sinkroute routers NAME`) as --router.options.OPTION VALUE."""
    options: Annotated[dict[Key, Scalar | None], tyro.conf.Suppress] = Field(default_factory=dict)
    """Its options. Which there are depends on the router, so `sinkroute train` reads them itself."""

    @staticmethod
    def misplaced(key: object) -> str:
        """What an error says of an unknown key that stands at the wrong level."""
        from sinkroute.routing.registry import list_routers, router_options

        if not any(key in router_options(router) for router in list_routers()):
            return ""
        return f". {key!r} belongs under options: router: {{name: ..., options: {{{key}: ...}}}}"


@settings("train")
class TrainConfig:
    """The training run: AdamW (Adam with a weight decay of 0), linear warm-up, then a cosine or a constant rate."""

    steps: Count = 600
    """Optimiser steps."""
    batch: Count = 16
    """Sequences or images per optimiser step, over all processes and micro-batches."""
    accumulation: Count = 1
    """Micro-batches into which a step's batch is cut, one after the other."""
    lr: Positive = 3e-3
    """Peak learning rate."""
    warmup: Natural = 40
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after warm-up."""
    final_lr: Share = 0.05
    """Learning rate at the end of a cosine, as a share of the peak."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """On matrices; gains have none."""
    beta2: Fraction = 0.98
    """AdamW's second decay rate."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; None: as it comes."""
    average: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Decay of a running average of the weights, which is then evaluated; None: no average."""
    precision: Annotated[Literal["no", "bf16"], BeforeValidator(lambda it: "no" if it is False else it)] = "no"
    """Autocast; routing stays in float32."""  # YAML 1.1 reads a bare no as False
    workers: Natural = 0
    """Processes that read and prepare data, beside each training process."""
    log_every: Count = 10
    """Steps between lines of log.jsonl."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints stay on disk."""
    sharded_checkpoints: Flag = False
    """With FSDP2, each process writes its part of a checkpoint: for a model that fits no single one."""
    timeout_minutes: Positive = 10.0
    """How long a process waits for the others in a step before it gives them up. What one of them does alone (reading
    data, evaluating, writing a checkpoint) has no limit."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these: tensorboard, wandb, trackio."""


def _mild_swaps() -> dict[str, dict[str, bool | int | float | str]]:
    return {"word-swap": {"rate": 0.025}}


@settings("eval")
class EvalConfig:
    """What is measured when training is over."""

    batch: Count = 64
    """Windows, streams or images in a forward pass."""
    exact: Flag = True
    """Whether a stream is evaluated to its last symbol; False drops the tail that does not fill the batch, as the
    paper's family does."""
    limit: Count | None = None
    """At most so many symbols from the head of the split, or images from all over it; None: all of it."""
    every: Natural = 0
    """Steps between evaluations during training; 0: none."""
    inference: tuple[Literal["noise", "sinkhorn", "both"], ...] = ()
    """What else an SSR router may do when serving, measured beside plain top-k."""
    attacks: Annotated[dict[Key, dict[Key, Scalar]], tyro.conf.Suppress] = Field(default_factory=_mild_swaps)
    """Attacks, with their options; `word-swap@5%` is a name for another `word-swap`."""


@settings()
class Config:
    """One training run."""

    label: str = ""
    """What tables and figures call it; empty: the router's name."""
    seed: Natural = 0
    """Of initial weights, data order and the routers' draws."""
    data: DataConfig = Field(default_factory=DataConfig)
    # Told apart by their name; the command line takes the kind that the preset has.
    model: Annotated[
        ModelConfig | StreamConfig | VisionConfig,
        BeforeValidator(lambda model: {"name": "decoder"} | model if isinstance(model, dict) else model),
        Field(discriminator="name"),
        tyro.conf.AvoidSubcommands,
    ] = Field(default_factory=ModelConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        to, at, train = self.data.switch_to, self.data.switch_at, self.train
        if train.batch % train.accumulation:
            raise ValueError(
                f"train.batch={train.batch} must be a multiple of train.accumulation={train.accumulation}: "
                "the batch is cut into equal micro-batches"
            )
        if to is None and at:
            raise ValueError(f"data.switch_at={at} needs data.switch_to, the text that training turns to")
        if to is not None and isinstance(self.model, VisionConfig):
            raise ValueError(f"data.switch_to={to!r} is for texts, and a 'vit' learns images; leave it out")
        if to is not None and not 0 < at < train.steps:
            raise ValueError(
                f"data.switch_at must be above 0 and below train.steps={train.steps}, got {at}; it is the first "
                f"step that reads {to!r}"
            )
        return self


def to_mapping(config: Any) -> dict[str, Any]:
    """Settings as plain mappings, lists and scalars."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def parse_scalar(text: str) -> Any:
    """A word of a command line as YAML would read it.

    >>> [parse_scalar(text) for text in ("1e-3", "4", "true", "both")]
    [0.001, 4, True, 'both']
    """
    return numeric(yaml.safe_load(text))


def read_yaml(cls: type[T], path: Path) -> T:
    """Settings from a YAML file (safe load).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, nothing at all, an unknown key, a wrong value; the message names the file.
    """
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = nearest(path, _presets())
        cure = " Pass" if hint else "; pass"
        raise FileNotFoundError(
            f"no configuration at {path}{hint}{cure} a YAML file or a preset: {', '.join(_presets())}"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; pass a YAML file or a preset: {', '.join(_presets())}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if mapping is None:
        raise ValueError(f"{path} is empty; write what is not as by default, such as train: {{steps: 100}}, or {{}}")
    try:
        return from_mapping(cls, mapping)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_yaml(config: Any, path: Path) -> None:
    """Write settings as YAML, keys in the order of its fields; wholly or not at all."""
    write_text(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True), path)


def preset_folder() -> Path:
    """`experiments/`: inside the installed package, or at the root of the checkout."""
    package = Path(__file__).parents[1]
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parents[1] / "experiments"


def _presets() -> list[str]:
    return sorted(path.stem for path in preset_folder().glob("*.yaml"))


def training_presets() -> list[str]:
    """The presets that `sinkroute train` takes; others compare several methods.

    >>> "wikipedia-ssr" in training_presets(), "demo" in training_presets()
    (True, False)
    """
    folder = preset_folder()
    return [
        name
        for name in _presets()
        if "methods" not in yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    ]


def find_preset(name: str) -> Path:
    """A configuration file: the preset of that name, or else the path itself (`./demo` for a file of that name)."""
    preset = preset_folder() / f"{name}.yaml"
    return preset if os.sep not in name and preset.is_file() else Path(name)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The dotted keys in which two configurations differ, as words.

    >>> differences(Config(), Config(seed=1))
    ['seed: 0 → 1']
    """
    if dataclasses.is_dataclass(old):
        old, new = to_mapping(old), to_mapping(new)
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where}: {old!r} → {new!r}"]
