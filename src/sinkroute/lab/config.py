"""Configurations: dataclasses, read strictly from YAML, with overrides on the command line.

A misspelt key is an error that names the nearest right one: a run must not silently use a default.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from sinkroute._errors import nearest, unknown_name
from sinkroute.lab.images.augment import Augment

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
Scalar = bool | int | float | str


@dataclass
class DataConfig:
    """What is learnt: a text (`sinkroute.lab.data`) or labelled images (`sinkroute.lab.images`)."""

    name: str = "wikipedia"
    """A text ("wikipedia", "wikitext-103", "enwik8", ...) or, for a "vit", images ("mnist-5k", "imagenet-1k", ...)."""
    path: str | None = None
    """Where it lies; what a package brings along needs none."""
    length: int = 128
    """Symbols in a training or evaluation window, or in a block of a stream."""
    switch_to: str | None = None
    """Another text, of the same symbols, that training turns to in its midst; valid and test are then of that."""
    switch_at: int = 0
    """The first step that reads it, counted from 0."""
    augment: Augment = field(default_factory=Augment)
    """What is done to training images."""


@dataclass
class ModelConfig:
    """The compact decoder of today's kind."""

    name: Literal["decoder"] = "decoder"
    """The kind of model."""
    vocab: int = 256
    """Symbols; 256 for bytes."""
    layers: int = 4
    """Blocks, each with attention and a mixture of experts."""
    d_model: int = 128
    """Width."""
    heads: int = 4
    """Attention heads."""
    d_hidden: int = 128
    """Hidden width of each expert."""
    experts: int = 8
    """Experts in a layer."""
    top_k: int = 2
    """Experts that a token visits."""
    activation: str = "swiglu"
    """Of the experts: swiglu, gelu or relu."""
    shared_hidden: int | None = None
    """Hidden width of an expert that all tokens visit; None: no such expert."""
    capacity: float | None = None
    """In training an expert takes at most so many times its even share of the tokens; None: it takes all."""


@dataclass
class StreamConfig:
    """The decoder of the paper's family, which reads a text as one stream and remembers what it read."""

    name: Literal["stream"] = "stream"
    """The kind of model."""
    vocab: int = 256
    """Symbols."""
    layers: int = 6
    """Blocks, each with attention and a mixture of experts."""
    d_model: int = 352
    """Width."""
    heads: int = 8
    """Attention heads."""
    span: int = 1024
    """Symbols that a symbol sees, all of them before itself."""
    d_hidden: int = 352
    """Hidden width of each expert."""
    experts: int = 16
    """Experts in a layer."""
    top_k: int = 2
    """Experts that a token, or a sub-token, visits."""
    sub_tokens: int = 1
    """Heads of the mixture (MH-MoE): parts of a token that visit experts by themselves; 1: a plain mixture."""
    dense_blocks: bool = False
    """Whether a block with a dense layer follows each block with a mixture, as in GLaM."""
    dropout: float = 0.1
    """In attention, inside the experts and behind the mixture."""
    capacity: float | None = None
    """In training an expert takes at most so many times its even share of the tokens; None: it takes all."""


@dataclass
class VisionConfig:
    """A vision transformer whose later feed-forward layers are mixtures of experts."""

    name: Literal["vit"] = "vit"
    """The kind of model."""
    image_size: int = 224
    """Side of the images in pixels; others are resized."""
    channels: int = 3
    """1 for grey images, 3 for colour."""
    classes: int = 1000
    """Classes to tell apart."""
    patch: int = 16
    """Side of a patch in pixels."""
    layers: int = 12
    """Blocks."""
    d_model: int = 192
    """Width."""
    heads: int = 3
    """Attention heads."""
    d_hidden: int = 768
    """Hidden width of the dense feed-forward layers and of each expert."""
    moe_from: int = 6
    """Blocks from this one on, counted from 0, have a mixture instead of a dense feed-forward layer."""
    experts: int = 8
    """Experts in a layer."""
    top_k: int = 2
    """Experts that a token visits."""
    drop_path: float = 0.1
    """Share of the samples that skip the last block while training; earlier blocks less, in proportion to depth."""


@dataclass
class RouterConfig:
    """How tokens choose experts."""

    name: str = "ssr-s"
    """A router, see `sinkroute routers`; its options (`sinkroute routers NAME`) as --router.options.OPTION VALUE."""
    options: Annotated[dict[str, Scalar | None], tyro.conf.Suppress] = field(default_factory=dict)
    """Its options. Which there are depends on the router, so `sinkroute train` reads them itself."""


@dataclass
class TrainConfig:
    """The training run: AdamW (Adam with a weight decay of 0), linear warm-up, then a cosine or a constant rate."""

    steps: int = 600
    """Optimiser steps."""
    batch: int = 16
    """Sequences or images per optimiser step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches into which a step's batch is cut, one after the other."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int = 40
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after warm-up."""
    final_lr: float = 0.05
    """Learning rate at the end of a cosine, as a share of the peak."""
    weight_decay: float = 0.1
    """On matrices; gains have none."""
    beta2: float = 0.98
    """AdamW's second decay rate."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None: as it comes."""
    average: float | None = None
    """Decay of a running average of the weights, which is then evaluated; None: no average."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast; routing stays in float32."""
    workers: int = 0
    """Processes that read and prepare data, beside each training process."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay on disk."""
    sharded_checkpoints: bool = False
    """With FSDP2, each process writes its part of a checkpoint: for a model that fits no single one."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others in a step before it gives them up. What one of them does alone (reading
    data, evaluating, writing a checkpoint) has no limit."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also log to these: tensorboard, wandb, trackio."""


@dataclass
class EvalConfig:
    """What is measured when training is over."""

    batch: int = 64
    """Windows, streams or images in a forward pass."""
    exact: bool = True
    """Whether a stream is evaluated to its last symbol; False drops the tail that does not fill the batch, as the
    paper's family does."""
    limit: int | None = None
    """At most so many symbols from the head of the split, or images from all over it; None: all of it."""
    every: int = 0
    """Steps between evaluations during training; 0: none."""
    inference: tuple[Literal["noise", "sinkhorn", "both"], ...] = ()
    """What else an SSR router may do when serving, measured beside plain top-k."""
    attacks: Annotated[dict[str, dict[str, Scalar]], tyro.conf.Suppress] = field(
        default_factory=lambda: {"word-swap": {"rate": 0.025}}
    )
    """Attacks, with their options; `word-swap@5%` is a name for another `word-swap`."""


@dataclass
class Config:
    """One training run."""

    label: str = ""
    """What tables and figures call it; empty: the router's name."""
    seed: int = 0
    """Of initial weights, data order and the routers' draws."""
    data: DataConfig = field(default_factory=DataConfig)
    # Told apart by their name; the command line takes the kind that the preset has.
    model: Annotated[ModelConfig | StreamConfig | VisionConfig, tyro.conf.AvoidSubcommands] = field(
        default_factory=ModelConfig
    )
    router: RouterConfig = field(default_factory=RouterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        for section, name, least in (
            ("data", "length", 1),
            ("train", "steps", 1),
            ("train", "batch", 1),
            ("train", "accumulation", 1),
            ("train", "warmup", 0),
            ("train", "log_every", 1),
            ("train", "checkpoint_every", 1),
            ("train", "keep_checkpoints", 1),
            ("train", "workers", 0),
            ("eval", "batch", 1),
            ("eval", "every", 0),
        ):
            value = getattr(getattr(self, section), name)
            if value < least:
                raise ValueError(f"{section}.{name} must be {least} or more, got {value}")
        for name in ("lr", "clip", "timeout_minutes"):
            value = getattr(self.train, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"train.{name} must be a finite number above 0, got {value}")
        if self.train.average is not None and not 0 < self.train.average < 1:
            raise ValueError(f"train.average must be above 0 and below 1, got {self.train.average}")
        for name, below in (("weight_decay", math.inf), ("final_lr", 1 + 1e-9), ("beta2", 1)):
            value = getattr(self.train, name)
            if not 0 <= value < below:
                raise ValueError(f"train.{name} must be 0 or more and below {below:g}, got {value}")
        if self.eval.limit is not None and self.eval.limit < 1:
            raise ValueError(f"eval.limit must be 1 or more, got {self.eval.limit}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        self._check_switch()
        if self.train.batch % self.train.accumulation:
            raise ValueError(
                f"train.batch={self.train.batch} must be a multiple of train.accumulation={self.train.accumulation}: "
                "the batch is cut into equal micro-batches"
            )

    def _check_switch(self) -> None:
        to, at = self.data.switch_to, self.data.switch_at
        if to is None:
            if at:
                raise ValueError(f"data.switch_at={at} needs data.switch_to, the text that training turns to")
            return
        if isinstance(self.model, VisionConfig):
            raise ValueError(f"data.switch_to={to!r} is for texts, and a 'vit' learns images; leave it out")
        if not 0 < at < self.train.steps:
            raise ValueError(
                f"data.switch_at must be above 0 and below train.steps={self.train.steps}, got {at}; it is the first "
                f"step that reads {to!r}"
            )


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain mappings, lists and scalars."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def from_mapping(cls: type[T], mapping: Any, where: str = "") -> T:
    """A dataclass from nested mappings; keys that are missing keep their defaults.

    Raises:
        ValueError: an unknown key or a value of another type, with its dotted name.

    >>> from_mapping(TrainConfig, {"lr": "1e-3"}).lr  # YAML 1.1 reads 1e-3 as a string
    0.001
    >>> from_mapping(Config, {"train": {"stepps": 5}})
    Traceback (most recent call last):
    ValueError: unknown key in train 'stepps'; did you mean 'steps'? Known: ...
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{where or 'configuration'} must be a mapping of keys to values, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in hints:
            raise unknown_name(f"key in {where or 'configuration'}", key, hints)
        values[key] = _convert(hints[key], value, f"{where}.{key}" if where else str(key))
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if dataclasses.is_dataclass(args[0]):
            return _convert(_named(args, value, where), value, where)
        return _numeric(value) if type(value) in args else _convert(args[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if origin is Literal:
        # YAML 1.1 reads a bare `no` as False.
        value = "no" if value is False and "no" in args else value
        if value not in args:
            raise unknown_name(f"value of {where}:", value, map(str, args))
        return value
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(args[1], part, f"{where}.{key}") for key, part in value.items()}
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_convert(args[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(origin or hint, "__name__", str(hint))
    raise ValueError(f"{where} must be {wanted}, got {value!r} ({type(value).__name__})")


def _named(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Which of several dataclasses a mapping is meant for: the one with its `name`, without a name the first."""
    names = {kind.name: kind for kind in kinds}
    name = str(value.get("name", kinds[0].name)) if isinstance(value, dict) else kinds[0].name
    if name not in names:
        raise unknown_name(f"value of {where}.name:", name, names)
    return names[name]


def _numeric(value: Any) -> Any:
    """A string that is a number, as that number: YAML 1.1 reads 1e-3 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_scalar(text: str) -> Any:
    """A word of a command line as YAML would read it.

    >>> [parse_scalar(text) for text in ("1e-3", "4", "true", "both")]
    [0.001, 4, True, 'both']
    """
    return _numeric(yaml.safe_load(text))


def read_yaml(cls: type[T], path: Path) -> T:
    """A dataclass from a YAML file (safe load).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, an unknown key, a wrong value; the message names the file.
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
    try:
        return from_mapping(cls, {} if mapping is None else mapping)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_yaml(config: Any, path: Path) -> None:
    """Write a dataclass as YAML, keys in the order of its fields; wholly or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(draft, path)


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
