"""What routers of transformers' models return, and how to put other choices in its place.

    triple    logits (T, E), weights (T, K), experts (T, K)          nearly all of transformers 5
    reversed  experts (T, K), weights (T, K), logits (T, E)          Granite and Aria of transformers 5.20
    dense     scores (T, E), 0 where not chosen, and logits (T, E)   Llama 4
    sorted    pairs of token and expert, by expert, and logits       JetMoE
    one-hot   choice (..., E), 0 beyond capacity, weight, logits     Switch Transformers
    joint     a triple whose weights share their sum with (T, S)     Inkling
              weights of S shared experts
    skipping  a triple in which expert E, which does nothing, is     Zaya
              given as expert 0 with weight 0; and (B, L, D) states
    mixed     a triple whose weights SparseMixer makes, by drawing   PhiMoE
    logits    logits (T, E), from which the block chooses            DBRX

A contract is one class and a line in `CONTRACTS`. It is recognised by the shapes and values of a trial's outputs, not
by the name of a model.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CONTRACTS", "Contract", "Decision", "Site"]


class Site(NamedTuple):
    """Where a router is.

    Attributes:
        path: of the router in the model.
        host: the model's own router.
        parent: the module that calls it.
    """

    path: str
    host: nn.Module
    parent: nn.Module

    @property
    def block(self) -> str:
        return f"{self.path} ({type(self.host).__name__} in {type(self.parent).__name__})"


class Decision(NamedTuple):
    """What a router of a model decided, in whatever form it says so.

    Attributes:
        logits_TE: (T, E) float, or what the model returns in their place.
        weights_TK: (T, K) float.
        experts_TK: (T, K) int64.
    """

    logits_TE: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


class Contract(Protocol):
    """One form of a router's outputs.

    Attributes:
        name: of the form.
        any_width: whether a token may be given more experts than K.
    """

    name: str
    any_width: bool

    def fits(self, outputs: Any, site: Site) -> bool:
        """Whether these are outputs of this form, from a trial with several tokens."""

    def read(self, outputs: Any, site: Site) -> Decision:
        """The decision in them."""

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        """Outputs with this decision in place of the model's own, in its shapes and dtypes."""


class Triple:
    name = "triple"
    any_width = True

    def fits(self, outputs: Any, site: Site) -> bool:
        if not (_are_tensors(outputs, 3) and outputs[1].shape == outputs[2].shape):
            return False
        logits, weights, experts = outputs
        return (
            _is_float(logits, weights)
            and experts.dtype in (torch.int32, torch.int64)
            and logits.ndim >= 2
            and experts.ndim >= 2
            and experts.shape[-1] <= logits.shape[-1]
            and len(_rows(experts)) == len(_rows(logits))
            and bool(((experts >= 0) & (experts < logits.shape[-1])).all())
        )

    def read(self, outputs: Any, site: Site) -> Decision:
        logits, weights, experts = map(_rows, outputs)
        return Decision(logits, weights, experts.long())

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        logits, weights, experts = outputs
        shape = (*experts.shape[:-1], experts_TK.shape[-1])
        return logits, weights_TK.to(weights.dtype).view(shape), experts_TK.to(experts.dtype).view(shape)


class Reversed:
    name = "reversed"
    any_width = True

    def fits(self, outputs: Any, site: Site) -> bool:
        # As many experts as there are would be a choice (T, E) of zeros and ones: NLLB's.
        return (
            _are_tensors(outputs, 3)
            and Triple().fits(outputs[::-1], site)
            and outputs[0].shape[-1] < outputs[2].shape[-1]
        )

    def read(self, outputs: Any, site: Site) -> Decision:
        return Triple().read(outputs[::-1], site)

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        return Triple().write(outputs[::-1], weights_TK, experts_TK, site)[::-1]


class Dense:
    name = "dense"
    any_width = True

    def fits(self, outputs: Any, site: Site) -> bool:
        if not (_are_tensors(outputs, 2) and _is_float(*outputs)):
            return False
        scores, logits = outputs
        if scores.shape != logits.shape or scores.ndim != 2 or (logits == 0).any():
            return False
        chosen_T = (scores != 0).sum(-1)
        return bool((chosen_T == _top_k(site)).all())

    def read(self, outputs: Any, site: Site) -> Decision:
        scores_TE, logits_TE = outputs
        return Decision(logits_TE, *scores_TE.topk(_top_k(site), dim=-1))

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        scores_TE, logits_TE = outputs
        # Added: a place that is filled up names an expert again, with weight 0.
        chosen_TE = torch.zeros_like(scores_TE).scatter_add(-1, experts_TK, weights_TK.to(scores_TE.dtype))
        return chosen_TE, logits_TE


class Sorted:
    name = "sorted"
    any_width = False

    def fits(self, outputs: Any, site: Site) -> bool:
        if not (isinstance(outputs, tuple) and len(outputs) == 5 and isinstance(outputs[3], list)):
            return False
        places, tokens, weights, sizes, logits = outputs
        return (
            _are_tensors((places, tokens, weights, logits), 4)
            and places.ndim == tokens.ndim == weights.ndim == 1
            and logits.shape[-1] == len(sizes)
            and sum(sizes) == len(places) == len(weights)
        )

    def read(self, outputs: Any, site: Site) -> Decision:
        places_R, _, weights_R, sizes, logits_TE = outputs
        ids_E = torch.arange(len(sizes), device=places_R.device)
        experts_R = ids_E.repeat_interleave(torch.tensor(sizes, device=places_R.device), output_size=len(places_R))
        shape = (len(logits_TE), -1) if len(logits_TE) else (0, 1)
        # Place r of the flattened (T, K) stands at position i with places[i] == r.
        weights_TK = torch.zeros_like(weights_R).scatter(0, places_R, weights_R).view(shape)
        return Decision(logits_TE, weights_TK, torch.zeros_like(experts_R).scatter(0, places_R, experts_R).view(shape))

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        weights_R, sizes, logits_TE = outputs[2:]
        places_R = experts_TK.flatten().argsort(stable=True)
        tokens_R = places_R // experts_TK.shape[-1]
        sorted_R = weights_TK.to(weights_R.dtype).flatten()[places_R]
        load_E = torch.bincount(experts_TK.flatten(), minlength=len(sizes))
        return places_R, tokens_R, sorted_R, load_E.tolist(), logits_TE


class OneHot:
    name = "one-hot"
    any_width = False

    def fits(self, outputs: Any, site: Site) -> bool:
        if not (_are_tensors(outputs, 3) and outputs[0].shape == outputs[2].shape):
            return False
        chosen, weights, logits = outputs
        return (
            not chosen.is_floating_point()
            and _is_float(weights, logits)
            and weights.shape == (*logits.shape[:-1], 1)
            and bool((chosen.sum(-1) <= 1).all())
            and hasattr(site.host, "expert_capacity")
        )

    def read(self, outputs: Any, site: Site) -> Decision:
        _, weights, logits = map(_rows, outputs)
        return Decision(logits, weights, logits.argmax(-1, keepdim=True))  # those beyond capacity were chosen, too

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        chosen, weights, logits = outputs
        ours = F.one_hot(experts_TK.view(logits.shape[:-1]), logits.shape[-1])
        # As the model does: what comes late in its sequence and finds an expert full is dropped.
        capacity: Any = site.host.expert_capacity
        ours = ours * (ours.cumsum(-2) <= capacity)
        return ours.to(chosen.dtype), weights_TK.to(weights.dtype).view(weights.shape), logits


class Joint:
    """w_k = c · s_k / Σ s and γ_j = c · s_j / Σ s, the sum over the chosen and the shared experts."""

    name = "joint"
    any_width = True

    def fits(self, outputs: Any, site: Site) -> bool:
        if not (_are_tensors(outputs, 4) and Triple().fits(outputs[:3], site)):
            return False
        weights, shared = outputs[1], outputs[3]
        if not (_is_float(shared) and shared.shape[:-1] == weights.shape[:-1]):
            return False
        total_T = weights.sum(-1) + shared.sum(-1)
        return bool((shared > 0).all()) and torch.allclose(total_T, total_T[:1], rtol=1e-4)

    def read(self, outputs: Any, site: Site) -> Decision:
        logits, weights, experts = map(_rows, outputs[:3])
        return Decision(logits, weights / weights.sum(-1, keepdim=True), experts.long())

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        logits_TE, theirs_TK, chosen_TK = map(_rows, outputs[:3])
        shared_TS = _rows(outputs[3]).float()
        # Σ s_j of the shared experts, which are not returned, from what their weights are beside the others'.
        routed_T1, rest_T1 = theirs_TK.float().sum(-1, keepdim=True), shared_TS.sum(-1, keepdim=True)
        scores_TE = torch.sigmoid(logits_TE.float())
        shared_T1 = scores_TE.gather(-1, chosen_TK).sum(-1, keepdim=True) * rest_T1 / routed_T1
        ours_T1 = scores_TE.gather(-1, experts_TK).sum(-1, keepdim=True)
        share_T1 = ours_T1 / (ours_T1 + shared_T1)
        weights_TK = (routed_T1 + rest_T1) * share_T1 * weights_TK
        shared_TS = (routed_T1 + rest_T1) * (1 - share_T1) * shared_TS / rest_T1
        written = Triple().write(outputs[:3], weights_TK, experts_TK, site)
        return *written, shared_TS.to(outputs[3].dtype).view(outputs[3].shape)


class Skipping:
    name = "skipping"
    any_width = True

    def fits(self, outputs: Any, site: Site) -> bool:
        if not (_are_tensors(outputs, 4) and Triple().fits(outputs[:3], site)):
            return False
        logits, weights, experts = outputs[:3]
        return logits.shape[-1] == getattr(site.host, "num_experts", 0) + 1 and bool((experts[weights == 0] == 0).all())

    def read(self, outputs: Any, site: Site) -> Decision:
        logits_TE, weights_TK, experts_TK = Triple().read(outputs[:3], site)
        last = logits_TE.shape[-1] - 1
        skips_TK = weights_TK == 0
        experts_TK = experts_TK.masked_fill(skips_TK, last)
        return Decision(logits_TE, torch.where(skips_TK, logits_TE.softmax(-1)[:, -1:], weights_TK), experts_TK)

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        skips_TK = experts_TK == outputs[0].shape[-1] - 1
        weights_TK, experts_TK = weights_TK.masked_fill(skips_TK, 0), experts_TK.masked_fill(skips_TK, 0)
        return *Triple().write(outputs[:3], weights_TK, experts_TK, site), outputs[3]


class Mixed:
    """SparseMixer (arXiv 2409.12136) gives weights about 1 and computes their gradient itself. The choice is ours, then
    it goes by the chosen experts alone: the weights of a plan are not used."""

    name = "mixed"
    any_width = False

    def fits(self, outputs: Any, site: Site) -> bool:
        return hasattr(sys.modules[type(site.host).__module__], "sparsemixer") and Triple().fits(outputs, site)

    def read(self, outputs: Any, site: Site) -> Decision:
        logits_TE, _, experts_TK = Triple().read(outputs, site)
        return Decision(logits_TE, logits_TE.gather(-1, experts_TK).softmax(-1), experts_TK)

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        logits_TE = outputs[0]
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(-1, experts_TK, True)
        host: Any = site.host
        mix = vars(sys.modules[type(host).__module__])["sparsemixer"]
        weights, experts = mix(
            logits_TE.masked_fill(~chosen_TE, -1e4),
            jitter_eps=host.router_jitter_noise,
            training=True,
            top_k=experts_TK.shape[-1],
        )
        weights = weights * (weights_TK.sum(-1, keepdim=True) != 0)  # padding has no weight
        # A gradient of 0: a loss's own may come in by those weights.
        return logits_TE, weights + 0 * weights_TK.to(weights.dtype), experts


class Logits:
    """The block makes a softmax of what it gets, takes the top k and renormalises: the logarithms of weights, and
    nearly nothing elsewhere, make it choose those experts with these weights."""

    name = "logits"
    any_width = False

    def fits(self, outputs: Any, site: Site) -> bool:
        return (
            isinstance(outputs, Tensor)
            and outputs.ndim == 2
            and hasattr(site.parent, "route_tokens_to_experts")
            and getattr(site.parent, "moe_normalize_expert_weights", None) == 1
        )

    def read(self, outputs: Any, site: Site) -> Decision:
        with torch.no_grad():
            weights_TK, experts_TK = site.parent.route_tokens_to_experts(outputs)  # type: ignore[operator]
        return Decision(outputs, weights_TK, experts_TK)

    def write(self, outputs: Any, weights_TK: Tensor, experts_TK: Tensor, site: Site) -> Any:
        smallest = torch.finfo(torch.float32).tiny
        logits_TE = torch.full_like(outputs, -1e4, dtype=torch.float32)
        return logits_TE.scatter(-1, experts_TK, weights_TK.float().clamp(min=smallest).log()).to(outputs.dtype)


CONTRACTS: tuple[Contract, ...] = (
    Mixed(),
    Triple(),
    Reversed(),
    Dense(),
    Sorted(),
    OneHot(),
    Joint(),
    Skipping(),
    Logits(),
)


def _top_k(site: Site) -> int:
    top_k = getattr(site.host, "top_k", None)
    return top_k if isinstance(top_k, int) else 0


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _are_tensors(outputs: Any, count: int) -> bool:
    return isinstance(outputs, tuple) and len(outputs) == count and all(isinstance(x, Tensor) for x in outputs)


def _is_float(*values: Tensor) -> bool:
    return all(value.is_floating_point() for value in values)
