"""A model that is too large for the memory: made without weights, which are read for one layer at a time.

What is in memory is one layer (two to three times, while experts that lie one by one in the shards are stacked) and the
hidden states of all windows. What stands beside the layers, such as the embedding of tokens, is read too; on a CPU it
is mapped, so that only what is used takes memory. Each weight is read once.

Reading follows transformers' own loader (`convert_and_load_state_dict_in_model`), which knows what checkpoints call
their tensors and how experts that lie there one by one are stacked; it is given one layer's tensors at a time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sinkroute.lab.inspect.loading import (
    checkpoint_files,
    explained,
    model_class,
    quietly,
    refuse_quantized,
    require_complete,
    require_fitting,
)
from sinkroute.lab.inspect.text import InspectError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["LayeredCheckpoint", "layers_of"]


class LayeredCheckpoint:
    """A model whose parts come and go.

    Attributes:
        model: in `eval()`, its parameters on the meta device, its buffers on `device`.
        device: where parts are run.

    Raises:
        InspectError: no folder of safetensors, a quantised one, or one whose model cannot be made.
    """

    def __init__(self, folder: str, config: PretrainedConfig, device: torch.device) -> None:
        from accelerate import init_empty_weights

        refuse_quantized(config)
        self._folder, self.device = folder, device
        self._files = checkpoint_files(folder) or []
        self._dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _stored_dtype(self._files)
        # Buffers are made for real: positions and the like are computed, not read.
        with explained(f"{folder!r} cannot be loaded"), init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = model_class(config)._from_config(config, dtype=self._dtype)
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._names = {part: name for name, part in self.model.named_modules()}
        self._mapping, self._targets = _conversion(self.model, self._files)

    def read_all_but(self, left_out: Iterable[nn.Module]) -> None:
        """Read what is in no part that is left out, to stay. (On a CPU what is not used takes no memory: it is mapped.)

        Raises:
            InspectError: some weights are missing or do not fit.
        """
        outside = {name for part in left_out for name in self._stored(part)}
        self._read({name for name in self._stored(self.model) if name not in outside})

    def enter(self, part: nn.Module) -> Callable[[], None]:
        """Read a part's weights; returns what lets go of them again.

        Raises:
            InspectError: some are missing or do not fit.
        """
        self._read(self._stored(part))

        def leave() -> None:
            for module in part.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            _return_memory()

        return leave

    def _read(self, names: set[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        # A tensor of the checkpoint may become several of the model's, of which one is known: take all of the module.
        modules = {name.rpartition(".")[0] for name in names}
        wanted = {source for source, target in self._targets.items() if target.rpartition(".")[0] in modules}
        with explained(f"{self._folder!r} cannot be loaded"), quietly(), _open(self._files, wanted) as tensors:
            told, _ = convert_and_load_state_dict_in_model(
                self.model,
                tensors,
                LoadStateDictConfig(
                    device_map={"": self.device},
                    dtype=self._dtype,
                    dtype_plan=self.model._get_dtype_plan(self._dtype),
                    weight_mapping=self._mapping,
                ),
            )
        require_fitting(self._folder, [*told.conversion_errors, *(name for name, *_ in told.mismatched_keys)])
        require_complete(self._folder, names & told.missing_keys)

    def _stored(self, part: nn.Module) -> set[str]:
        """What a checkpoint holds of a part: parameters, tied ones once, and buffers that are kept."""
        all_names = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        once = {name for name, _ in part.named_parameters()}
        prefix = f"{self._names[part]}." if self._names[part] else ""
        return {prefix + name for name in part.state_dict() if name in once or name not in all_names}


def layers_of(model: nn.Module, routers: Iterable[str]) -> list[nn.Module]:
    """What stands in the lists that hold routers: the layers of the model, those without a router among them.

    Args:
        routers: their paths.

    Raises:
        InspectError: a router is in no list.
    """
    layers: dict[nn.Module, None] = {}
    for path in routers:
        names = path.split(".")
        above = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        stack = next((module for module in above if isinstance(module, nn.ModuleList)), None)
        if stack is None:
            raise InspectError(f"{path} is in no list of layers, so that --by-layer cannot be; leave it out")
        layers |= dict.fromkeys(stack)
    return list(layers)


def _conversion(model: PreTrainedModel, files: list[Path]) -> tuple[list[Any], dict[str, str]]:
    """How transformers reads this model's checkpoints, and where each of their tensors goes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = model.state_dict()
    targets = {}
    for file in files:
        with _open([file], None) as tensors:
            for source in tensors:
                target, _ = rename_source_key(source, renamings, converters, model.base_model_prefix, names)
                if target not in names and source in names:
                    target = source  # a rule for checkpoints of another form
                targets[source] = target
    return list(mapping), targets


@contextmanager
def _open(files: list[Path], wanted: set[str] | None) -> Iterator[dict[str, object]]:
    """Tensors by name, not read yet; None: all. Closed again, or what was read would stay mapped."""
    from safetensors import safe_open

    with ExitStack() as stack:
        found: dict[str, object] = {}
        for file in files:
            opened = stack.enter_context(safe_open(str(file), framework="pt"))
            names = opened.keys()
            found |= {name: opened.get_slice(name) for name in names if wanted is None or name in wanted}
        yield found


def _return_memory() -> None:
    """Hand freed memory back to the system: glibc keeps what lies between blocks in use, here a part of every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """Of the first tensor of floats."""
    from safetensors import safe_open

    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                kind = opened.get_slice(name).get_dtype()
                if kind in _DTYPES:
                    return _DTYPES[kind]
    return torch.float32


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
