"""A checkpoint's tokenizer, configuration and weights, by transformers' own means.

Nothing of a checkpoint is run: `trust_remote_code` is never set, and weights are read from safetensors only (a torch
pickle can run anything). A name that is no folder is a repository of the Hugging Face hub, which transformers then
downloads; for a folder nothing is looked up. What the libraries raise over a broken checkpoint is of many kinds, few of
which name it: `explained` makes one error of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkroute._errors import SinkrouteError
from sinkroute.adapters.hf.find import find_routers
from sinkroute.lab.inspect.text import InspectError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "checkpoint_files",
    "explained",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_class",
    "quietly",
    "refuse_dense",
    "refuse_quantized",
    "require_complete",
    "require_fitting",
]


@contextmanager
def explained(failure: str) -> Iterator[None]:
    """Raises:
    InspectError: `failure` and the cause, in place of whatever is raised inside; our own errors pass.
    """
    try:
        yield
    except SinkrouteError:
        raise
    except Exception as error:  # of transformers, safetensors, quantisers, torch: there is no common base
        raise InspectError(f"{failure}: {_cause(error)}") from error


def load_config(model: str) -> PretrainedConfig:
    """Raises:
    InspectError: there is no such checkpoint, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    if not _is_folder(model) and (model.startswith((".", "~", os.sep)) or model.count("/") != 1):
        raise InspectError(f"there is no folder {model!r}; MODEL is a folder of a checkpoint or a hub id (OWNER/NAME)")
    if _is_folder(model) and not Path(model, "config.json").is_file():
        raise InspectError(f"{model!r} has no config.json, so it is no Hugging Face checkpoint")
    where = "" if _is_folder(model) else " (there is no folder of that name, so it was looked up on the hub)"
    with explained(f"the configuration of {model!r} cannot be read{where}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(model, **_source(model))
        # A checkpoint may name kernels here, which are code that transformers would fetch and run.
        config._attn_implementation = None
        config._experts_implementation = None
    return config


def load_tokenizer(model: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Raises:
    InspectError: there is none, or it is another model's.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **_source(model))
        tokenizer("a")
    except Exception as error:  # whatever the libraries say where files are missing
        raise InspectError(
            f"{model!r} has no tokenizer that can be loaded, and a text has to become tokens ({_cause(error)}); "
            "put the tokenizer's files beside the model's: tokenizer.save_pretrained(MODEL)"
        ) from error
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        used = max(tokenizer.get_vocab().values())
        if used >= vocabulary:
            raise InspectError(
                f"the tokenizer of {model!r} gives ids up to {used}, and the model has {vocabulary}: "
                "it is another model's"
            )
    return tokenizer


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint is loaded as: a causal language model where there is one, else what its config names.

    Raises:
        InspectError: it is an encoder-decoder, or names no class of the installed transformers.
    """
    import transformers

    if getattr(config, "is_encoder_decoder", False):
        raise InspectError(
            f"{type(config).__name__} is of an encoder-decoder, which takes two texts; inspect takes models of one"
        )
    known: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in known:
        causal: type[PreTrainedModel] = known[type(config)]
        return causal
    name = next(iter(config.architectures or ()), None)
    named = getattr(transformers, name, None) if name else None
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        raise InspectError(
            f"transformers {transformers.__version__} has no model class for {type(config).__name__} "
            f"(architectures: {config.architectures}); code of a checkpoint is never run"
        )
    return named


def refuse_dense(model: str, config: PretrainedConfig) -> None:
    """Look for routers in the model that the configuration describes, made without weights.

    Raises:
        InspectError: there is none, or such a model cannot be made.
    """
    from accelerate import init_empty_weights

    with explained(f"{model!r} cannot be loaded"), init_empty_weights(include_buffers=False):
        network = model_class(config)._from_config(config)
    if not any(find_routers(network)):
        raise InspectError(
            f"{type(network).__name__} holds no mixture of experts that sinkroute knows how to find (no small module "
            f"beside a module of experts), and of {model!r} no weight was read; name a mixture-of-experts checkpoint"
        )


def load_model(model: str, config: PretrainedConfig) -> PreTrainedModel:
    """The whole model, in its own dtype: on the accelerators that there are, else on the CPU.

    Raises:
        InspectError: it cannot be read, some weights are missing or do not fit, or the memory does not suffice.
    """
    files = checkpoint_files(model)
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are told, and refused below by name
    if torch.accelerator.is_available():
        options["device_map"] = "auto"
    elif files is not None:
        _require_memory(model, sum(file.stat().st_size for file in files))
    if _quantization(config) == "mxfp4":
        from transformers.utils.quantization_config import Mxfp4Config

        # Its kernel routes by itself and never calls the router.
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    with explained(f"{model!r} cannot be loaded"), quietly():
        loaded: Any = model_class(config).from_pretrained(model, config=config, **_source(model), **options)
    network, told = loaded
    require_fitting(model, [name for name, *_ in told["mismatched_keys"]])
    require_complete(model, told["missing_keys"])
    found: PreTrainedModel = network.eval()
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own bars, of which there would be one for every layer."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def checkpoint_files(model: str) -> list[Path] | None:
    """The safetensors that hold a folder's weights; None for a repository of the hub.

    Raises:
        InspectError: a folder without any, without some, or with one that is damaged.
    """
    from safetensors import safe_open

    if not _is_folder(model):
        return None
    index, whole = Path(model, "model.safetensors.index.json"), Path(model, "model.safetensors")
    if index.is_file():
        with explained(f"the index of {model!r}, {index.name}, cannot be read"):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [Path(model, name) for name in sorted(names)]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise InspectError(f"{model!r} lacks {absent[0]}, one of {len(files)} files that its index names")
    else:
        files = [whole] if whole.is_file() else []
    if not files:
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in Path(model).glob(kind))
        raise InspectError(
            f"{model!r} has no safetensors"
            + (f" but torch pickles ({pickles[0]}, ...), which can run anything and are not read" if pickles else "")
            + "; save it again with transformers' save_pretrained"
        )
    for file in files:
        with explained(f"{file} is no whole file of safetensors; copy or download it again"), safe_open(file, "pt"):
            pass
    return files


def require_complete(model: str, missing: set[str] | list[str]) -> None:
    """Raises:
    InspectError: weights of layers are missing. They would be drawn at random, and so would their routes.
    """
    absent = sorted(missing)
    if absent:
        raise InspectError(
            f"{model!r} lacks {len(absent)} of its weights ({', '.join(absent[:3])}{', ...' * (len(absent) > 3)}); "
            "they would be random, and the routes with them"
        )


def require_fitting(model: str, troubles: Sequence[str]) -> None:
    """Raises:
    InspectError: weights have other shapes than the configuration gives the model.
    """
    if troubles:
        raise InspectError(
            f"the weights of {model!r} do not fit the model that its config.json describes: "
            f"{', '.join(sorted(troubles)[:3])}{', ...' * (len(troubles) > 3)}"
        )


def refuse_quantized(config: PretrainedConfig) -> None:
    """Raises:
    InspectError: the weights are quantised, and not to be read one by one.
    """
    method = _quantization(config)
    if method is not None:
        raise InspectError(
            f"the checkpoint is quantised ({method}), which --by-layer does not read; "
            "leave --by-layer out, or save it dequantised first"
        )


def _quantization(config: PretrainedConfig) -> str | None:
    told = getattr(config, "quantization_config", None)
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _require_memory(model: str, size: int) -> None:
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    free = psutil.virtual_memory().available
    if size > free:
        raise InspectError(
            f"the weights of {model!r} take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free; "
            "--by-layer has one layer in memory at a time"
        )


def _source(model: str) -> dict[str, Any]:
    return {"trust_remote_code": False, "local_files_only": _is_folder(model)}


def _is_folder(model: str) -> bool:
    return Path(model).is_dir()


def _cause(error: BaseException) -> str:
    """The kind of an error, for many say little more, and what it says up to its first full line."""
    first, _, rest = str(error).strip().partition("\n")
    said = f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first
    return f"{type(error).__name__}: {said}".removesuffix(": ")
