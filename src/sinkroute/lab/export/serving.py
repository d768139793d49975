"""By which rule a mixture layer of the lab routes when it serves, in the terms of Hugging Face's configurations.

    s = score(z),   z = W x;    choose the K largest of s + b;    weigh by s, normalised or not, times a scale

Whatever does not follow this rule is refused with the reason: an export that is nearly the model is another model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from sinkroute._errors import SinkrouteError
from sinkroute.moe import MoE
from sinkroute.routing import Router
from sinkroute.routing.scores import Score
from sinkroute.routing.serving import Serving

__all__ = ["ExportError", "ServingRule", "serving_rule"]


class ExportError(SinkrouteError):
    """A model that no Hugging Face architecture computes, or a folder that cannot be written; the message says why."""


@dataclass(frozen=True)
class ServingRule:
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


def serving_rule(layer: MoE, name: str) -> ServingRule:
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
    return ServingRule(gate_ED, bias_E, router.score, router.norm_topk, router.route_scale, groups, top_groups)


def _bias_of_choice(router: Router, name: str) -> Tensor | None:
    """(E,) what is added to the scores before the choice, or None.

    Raises:
        ExportError: the router serves by another rule.
    """
    serving = router.serving()
    if _is_known(serving):
        return serving.bias_E
    if serving is not None:
        assert serving.bias_E is not None
        if not serving.bias_E.any():
            return None
        reason = (
            ": in serving its bias is added to the logits, for the choice alone, and the correction bias of Hugging "
            "Face's models to the scores"
        )
    elif router.inference != "none":
        reason = f" with inference={router.inference!r}: Hugging Face's models serve by plain top-k"
    else:
        reason = ": it serves by another rule than the top-k of a linear gate's scores"
    cures = " or ".join(_cures(router)) or 'a method that serves by that rule, such as "ssr-s",'
    raise ExportError(f"router {name!r} cannot be exported{reason}; {cures} can be exported")


def _is_known(serving: Serving | None) -> TypeGuard[Serving]:
    """Whether Hugging Face's models serve so: by nothing but the scores, or by a bias that is added to them."""
    return serving is not None and (serving.plain or serving.on == "scores")


def _cures(router: Router) -> Iterator[str]:
    """The values of one option with which the method would serve by a known rule."""
    kind: Any = type(router)
    if _is_known(kind(router.num_experts, router.top_k, **vars(router.options)).serving()):
        yield 'inference="none"'  # it was set later, by sinkroute.set_inference
        return
    for option, words in get_type_hints(kind.Options).items():
        for word in get_args(words) if get_origin(words) is Literal else ():
            with contextlib.suppress(ValueError):  # one that does not go with the others
                options = replace(router.options, **{option: word})
                if _is_known(kind(router.num_experts, router.top_k, **vars(options)).serving()):
                    yield f'{option}="{word}"'
