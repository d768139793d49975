"""By which rule a mixture layer of the lab routes when it serves, in the terms of Hugging Face's configurations.

    s = score(z),   z = W x;    choose the K largest of s + b;    weigh by s, normalised or not, times a scale

Whatever does not follow this rule is refused with the reason: an export that is nearly the model is another model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sinkroute._errors import SinkrouteError
from sinkroute.moe import MoE
from sinkroute.routing import Router
from sinkroute.routing.routers.loss_free import LossFreeRouter
from sinkroute.routing.routers.quantile import QuantileRouter
from sinkroute.routing.routers.ssr import SSRRouter
from sinkroute.routing.routers.ssr_bias import SSRBiasRouter
from sinkroute.routing.scores import Score

__all__ = ["ExportError", "Serving", "serving_rule"]


class ExportError(SinkrouteError):
    """A model that no Hugging Face architecture computes, or a folder that cannot be written; the message says why."""


@dataclass(frozen=True)
class Serving:
    """The rule of one layer.

    Attributes:
        gate_ED: W, (E, D).
        bias_E: b, (E,) float32, in the choice only; None: the rule has none.
        score: `"softmax"` or `"sigmoid"`.
        normalise: whether weights are over the sum of the chosen.
        scale: factor of all weights.
        groups, top_groups: a token chooses in `top_groups` of `groups`, judged by their two best; 1 and 1: no groups.
    """

    gate_ED: Tensor
    bias_E: Tensor | None
    score: Score
    normalise: bool
    scale: float
    groups: int
    top_groups: int


def serving_rule(layer: MoE, name: str) -> Serving:
    """The rule of a layer in `eval()`.

    Args:
        layer: of the trained model.
        name: of its router, for messages.

    Raises:
        ExportError: it follows another rule.

    >>> rule = serving_rule(MoE(8, 4, 4, 2, router="ssr-s"), "ssr-s")
    >>> rule.gate_ED.shape, rule.bias_E, rule.score, rule.normalise
    (torch.Size([4, 8]), None, 'softmax', True)
    """
    router, gate = layer.router, layer.gate
    if not isinstance(gate, nn.Linear):
        raise ExportError(
            f"router {name!r} cannot be exported: its gate, {type(gate).__name__}, is no linear map of the token, and "
            "the gates of Hugging Face's mixture models are"
        )
    bias_E = _bias_of_choice(router, name)
    if gate.bias is not None and gate.bias.any():
        raise ExportError(
            f"router {name!r} cannot be exported: its gate has a bias (ssr-fold keeps its potentials there), and no "
            "gate in Hugging Face's mixture models of this shape has one; loss-free balances and can be exported"
        )
    groups, top_groups = router.groups, router.top_groups
    if groups == router.num_experts:
        groups = top_groups = 1  # the best of groups of one expert are the best experts
    elif top_groups == groups:
        groups = top_groups = 1
    elif router.group_score != "top2-sum":
        raise ExportError(
            f"router {name!r} cannot be exported with group_score={router.group_score!r}: Hugging Face's models with "
            "plain attention judge groups by their two best experts (top2-sum)"
        )
    # Some gates give more numbers than logits: what follows is for training.
    gate_ED = gate.weight.detach()[: router.num_experts]
    return Serving(gate_ED, bias_E, router.score, router.norm_topk, router.route_scale, groups, top_groups)


def _loss_free_bias(router: LossFreeRouter, name: str) -> Tensor | None:
    return router.state.bias_E


def _quantile_bias(router: QuantileRouter, name: str) -> Tensor | None:
    if router.scope == "batch":
        return router.state.bias_E
    raise ExportError(_LOGIT_BIAS.format(name=name, cure='scope="batch" adds it to scores, and can be exported'))


def _ssr_bias(router: SSRBiasRouter, name: str) -> Tensor | None:
    _no_inference_mode(router, name)
    if router.serve_with == "plain" or not router.state.bias_E.any():
        return None
    if router.bias_on == "scores":
        return router.state.bias_E
    raise ExportError(
        _LOGIT_BIAS.format(
            name=name,
            cure='bias_on="scores" can be exported; serve_with="plain" leaves it out, and loads are unbalanced then',
        )
    )


def _no_inference_mode(router: SSRRouter, name: str) -> None:
    if router.inference != "none":
        raise ExportError(
            f"router {name!r} cannot be exported with inference={router.inference!r}: Hugging Face's models serve by "
            'plain top-k, which is inference="none"'
        )


_LOGIT_BIAS = (
    "router {name!r} cannot be exported: in serving its bias is added to the logits, for the choice alone, and the "
    "correction bias of Hugging Face's models to the scores; {cure}"
)

# The routers whose `serve` is not the plain top-k of the base class, and what they add to the scores.
_SERVING_BIAS: dict[type[Router], Callable[[Any, str], Tensor | None]] = {
    LossFreeRouter: _loss_free_bias,
    QuantileRouter: _quantile_bias,
    SSRBiasRouter: _ssr_bias,
    SSRRouter: _no_inference_mode,
}


def _bias_of_choice(router: Router, name: str) -> Tensor | None:
    for known, bias in _SERVING_BIAS.items():
        # A subclass that overrides how it serves is not known, whatever it descends from.
        same = type(router).serve is known.serve
        if isinstance(router, known) and same:
            return bias(router, name)
    if type(router).serve is Router.serve:
        return None
    raise ExportError(
        f"router {name!r} cannot be exported: it serves by a rule of its own, no top-k of a linear gate's scores"
    )
