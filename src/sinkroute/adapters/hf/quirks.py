"""What models of transformers have beside their routers: losses that do not see our choices, kernels that skip them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["is_half", "own_coefficients", "refuse_kernels", "scale_of", "silence", "with_loss"]

# As models call the coefficient of the balancing loss that they compute.
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def own_coefficients(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Owner, name and value of each coefficient, not 0, of the model's own balancing loss.

    Owners are the modules that have it; where there is none, the configurations that are asked for it.
    """
    owners: list[Any] = [part for part in model.modules() if any(name in vars(part) for name in _COEFFICIENTS)]
    if not owners:
        configs = [part.config for part in model.modules() if hasattr(part, "config")]
        configs += [text for config in configs if (text := getattr(config, "text_config", None)) is not None]
        owners = list({id(config): config for config in configs}.values())
    found = [(owner, name, vars(owner).get(name)) for owner in owners for name in _COEFFICIENTS]
    return [(owner, name, value) for owner, name, value in found if isinstance(value, (int, float)) and value]


def silence(outputs: Any) -> None:
    """Make the balancing loss in a model's outputs 0: some trainers weigh and add it themselves."""
    if isinstance(getattr(outputs, "aux_loss", None), Tensor):
        outputs.aux_loss = torch.zeros_like(outputs.aux_loss, requires_grad=False)


def with_loss(outputs: Any, shown: Tensor) -> Any:
    """A model's `outputs` with this number in their loss; None: they stay, or were changed in place."""
    if isinstance(outputs, tuple):  # return_dict=False: a loss comes first
        loss = outputs[0]
        if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
            return loss + shown.to(loss.device, loss.dtype), *outputs[1:]
    elif isinstance(loss := getattr(outputs, "loss", None), Tensor):
        outputs.loss = loss + shown.to(loss.device, loss.dtype)
    return None


def is_half(model: nn.Module) -> bool:
    """Whether a model is trained in float16, whose losses are scaled."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return False
    kind = parameter.device.type
    is_cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return parameter.dtype == torch.float16 or is_cast


def scale_of(optimizer: Any) -> Callable[[], float] | None:
    """What tells by how much losses are scaled before their backward pass, from an optimizer that accelerate wrapped.

    None: they are not. A `GradScaler` is that of accelerate; DeepSpeed's optimizers have a loss scale.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        return cast(Callable[[], float], scaler.get_scale)
    inner: Any = getattr(optimizer, "optimizer", None)
    if isinstance(getattr(inner, "loss_scale", None), (int, float)):
        return lambda: float(inner.loss_scale)
    return None


def refuse_kernels(model: nn.Module) -> None:
    """Kernels that compute router and experts in one, past the router.

    Raises:
        ValueError: the model has them.
    """
    method = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "quant_method", None)
    fused = next((type(part).__name__ for part in model.modules() if "mxfp4" in type(part).__name__.lower()), None)
    if fused or "mxfp4" in str(method).lower():
        raise ValueError(
            f"{type(model).__name__} has mxfp4 experts ({fused or method}), whose kernel routes by itself and never "
            "calls the router; load it with Mxfp4Config(dequantize=True)"
        )
    if getattr(model, "use_kernels", False):
        raise ValueError(
            f"{type(model).__name__} runs kernels from the hub (use_kernels=True), some of which route by themselves "
            "and never call the router; load it with use_kernels=False"
        )
