"""A router of sinkroute in the place of a transformers model's own, in training; `eval()` stays the model's.

The model's router goes on computing its logits; a forward hook replaces its choice and weights by ours.
Nothing is added to the model's parameters, buffers, modules or `state_dict`, and what records `router_logits` goes on.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.find import find_routers
from sinkroute.adapters.hf.handle import Handle
from sinkroute.adapters.hf.quirks import refuse_kernels
from sinkroute.adapters.hf.seat import fit_to_site
from sinkroute.routing.attached import attached, require_model
from sinkroute.routing.registry import RECOMMENDED

__all__ = ["patch"]


def patch(
    model: nn.Module,
    router: str = RECOMMENDED,
    *,
    keep_aux_loss: bool | None = None,
    show_aux_loss: bool = False,
    **options: Any,
) -> Handle:
    """Route a Hugging Face transformers model by a router of sinkroute, in place.

    In training every mixture-of-experts layer is routed by `router`, with the model's own logits, score function,
    renormalisation, groups, correction bias and scaling. `eval()` is the model's own code, to the last bit, with what
    the router has moved of it: a correction bias, or the gate. No parameter, buffer, key of the `state_dict` or field
    of the configuration is added: what is saved is a plain checkpoint.

    Patch before wrapping (DistributedDataParallel, FSDP, `torch.compile`), and call `sinkroute.set_step(model, step)`
    before every training step, or use `sinkroute.adapters.hf.RouterCallback` with transformers' `Trainer`. A padding
    mask is read off the `attention_mask` of each pass; what is masked is in no load, plan or loss. A router's losses
    attach their gradient to the routing weights, each pass weighed by 1 / `micro_batches` of `set_step`. A pass without
    a graph (`torch.no_grad`, `generate`) is not one of the training; `sinkroute.no_balancing` says so of others.

    Args:
        model: a model of transformers, or a part of one that has `attention_mask` among its arguments.
        router: a name of `sinkroute.list_routers()`; without one the recommended router, `"ssr-dual"`. What a router
            adds before its top-k goes where the model serves from: into its correction bias (`"ssr-dual"`,
            `"ssr-bias"`, `"loss-free"`, ...), or into its linear gate, if it is a bias of logits (`"ssr-dual"`,
            `"ssr-bias"`, `"ssr-fold"`, ...). Others serve as plain top-k (`"ssr-l"`, `"ssr-s"`; losses; `"softmax"`,
            which only counts).
        keep_aux_loss: whether the model's own balancing loss stays. It is computed from the logits and knows nothing
            of the choices that the router makes. None: off in training passes, unless the router is `"softmax"`.
        show_aux_loss: whether `outputs.loss` shows the routers' losses, too. They are trained by in any case: their
            gradient is attached to the routing weights, and this adds none.
        options: the router's own, such as `probability`; not those that the model decides (`score`, `norm_topk`, ...).

    Returns:
        A handle: `handle.remove()` undoes it all, `print(handle)` shows what was found, `handle.state_dict()` holds
        what routers remember between steps.

    Raises:
        TypeError: no model, such as the name of one.
        ValueError: a model without a router that can be taken over (the message says why for each), one that is
            patched already, or a router that the model could not serve with, as where the gate is frozen.

    >>> import sinkroute, transformers
    >>> config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    >>> model = transformers.MixtralForCausalLM(config)
    >>> handle = sinkroute.patch(model)
    >>> print(handle)  # doctest: +NORMALIZE_WHITESPACE
    ssr-dual in 1 of 1 layers of MixtralForCausalLM; its own balancing loss (router_aux_loss_coef) is off; its
      potentials are folded into the gate
      1 × model.layers.*.mlp.gate  MixtralTopKRouter  softmax, top 2 of 4, renormalised
    >>> handle.remove()
    """
    require_model(model)
    if any(attached(part) is not None for part in model.modules()):
        raise ValueError(
            "model is patched already; call handle.remove() of that patch first (a copy of a patched model has no "
            "handle: copy before you patch)"
        )
    refuse_kernels(model)
    known, refused = find_routers(model)
    if not known:
        raise ValueError(_nothing_to_patch(model, refused))
    # First, so that a model is not left half patched.
    routers = {site: fit_to_site(router, site, scoring, options) for site, scoring in known.items()}
    keeps = router == "softmax" if keep_aux_loss is None else keep_aux_loss
    handle = Handle(model, router, refused, keeps, show_aux_loss)
    for site, scoring in known.items():
        handle.take(site, scoring, routers[site])
    handle.watch()
    try:
        handle.require_saved()
    except ValueError:
        handle.remove()
        raise
    if handle.switched_off and getattr(getattr(model, "config", None), "output_router_logits", False):
        warnings.warn(
            f"{type(model).__name__}'s own balancing loss ({handle.switched_off}) is switched off while "
            f"{router!r} routes it: it does not see the router's choices. keep_aux_loss=True keeps it.",
            stacklevel=2,
        )
    return handle


def _nothing_to_patch(model: nn.Module, refused: dict[Site, str]) -> str:
    if any(hasattr(weight, "ds_id") and weight.numel() == 0 for weight in model.parameters()):
        return (
            f"the weights of model {type(model).__name__} are parts already, by DeepSpeed's ZeRO-3, so that its rule "
            "cannot be read; make and patch the model before TrainingArguments(deepspeed=...), HfDeepSpeedConfig or "
            "zero.Init, and let the engine shard it"
        )
    if not refused:
        return (
            f"model {type(model).__name__} holds no mixture of experts that sinkroute knows how to find: no small "
            "module beside a module of experts; pass a mixture-of-experts model of transformers"
        )
    reasons = "; ".join(f"{site.block}: {reason}" for site, reason in refused.items())
    return f"model {type(model).__name__} has no router that sinkroute can take over. {reasons}"
