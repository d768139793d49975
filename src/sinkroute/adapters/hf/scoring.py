"""How a model's own router makes choices and weights of logits, found out by asking it.

A copy of the router with random weights is given random tokens; what it returns tells which of the rules that
`sinkroute.routing` knows it follows: score function, renormalisation, groups, a correction of the choice, a factor. So
any model whose rule is among these is served, whatever it is called, and one whose rule is not is refused.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sinkroute.adapters._fit import SCORING
from sinkroute.adapters._patched import describe
from sinkroute.adapters.hf.contracts import CONTRACTS, Contract, Decision, Site
from sinkroute.routing.attached import ATTACHED
from sinkroute.routing.scores import GroupScore, Score, limit_to_groups, scores, weigh

__all__ = ["NotARouter", "Scoring", "Source", "Unknown", "read_scoring"]

_TOKENS = 192
# Sums in another order, and the tiny numbers that keep denominators from 0.
_TOLERANCE = 1e-4
# What wrappers and `patch` put into a router.
_BESIDE = ("forward", "_hf_hook", "_old_forward", ATTACHED)


class NotARouter(Exception):
    """The module's outputs are of no known form."""


class Unknown(Exception):
    """A router, but by no known rule."""


@dataclass(frozen=True)
class Source:
    """A tensor (E,) of the model, found anew at each use: moving a model makes new tensors.

    Attributes:
        of: the router (`"host"`) or the module that calls it and hands the tensor on (`"parent"`).
        name: dotted, of the tensor there.
    """

    of: Literal["host", "parent"]
    name: str

    def find(self, site: Site) -> Tensor:
        value: Any = site.host if self.of == "host" else site.parent
        for part in self.name.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class Scoring:
    """A rule from logits to choices and weights.

    Attributes:
        contract: the form of the router's outputs.
        num_experts, top_k: E and K.
        score, norm_topk, groups, top_groups, group_score, route_scale: see `sinkroute.Router`.
        correction: what is added in the choice only, or None.
        correction_on: to what it is added.
        expert_scale: factors of the weights, one per expert, or None.
        probabilities: whether the router returns the softmax in the place of logits.
        normalised: whether the height of the gate's logits is lost: the router returns their softmax or log-softmax.
        gate_weight: W (E, D), where the logits are W x or W x + b, but for what is added to all of a token's, or None.
        gate_bias: that b, or None.
        gate_module: dotted, the part of the router that is given x; "": the router itself, which is given tokens.
    """

    contract: Contract
    num_experts: int
    top_k: int
    score: Score = "softmax"
    norm_topk: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "top2-sum"
    route_scale: float = 1.0
    correction: Source | None = None
    correction_on: Literal["scores", "logits"] = "scores"
    expert_scale: Source | None = None
    probabilities: bool = False
    normalised: bool = False
    gate_weight: Source | None = None
    gate_bias: Source | None = None
    gate_module: str = ""

    def __str__(self) -> str:
        more = [f"{self.correction.name} on {self.correction_on}"] if self.correction else []
        more += [f"scaled by {self.expert_scale.name}"] if self.expert_scale else []
        return describe(self, *more)

    def theirs(self) -> dict[str, Any]:
        """The options of `create_router` that the model decides."""
        return {name: getattr(self, name) for name in SCORING}

    def logits(self, decision: Decision) -> Tensor:
        """(T, E) logits, where the model returns probabilities too."""
        if not self.probabilities:
            return decision.logits_TE
        return decision.logits_TE.clamp(min=torch.finfo(torch.float32).tiny).log()


def read_scoring(site: Site) -> Scoring:
    """The rule of this router.

    Raises:
        NotARouter: its outputs are of no known form.
        Unknown: it follows no known rule; the message says what was seen.
    """
    host = _random_copy(site.host)
    trial = Site(site.path, host, site.parent)
    handed_on = _handed_on(site)
    arguments = {name: value for name, (_, value) in handed_on.items()}
    tokens_TD, outputs = _ask(host, arguments)
    contract = next((contract for contract in CONTRACTS if contract.fits(outputs, trial)), None)
    if contract is None:
        raise NotARouter(f"it returns {_described(outputs)}")
    with torch.no_grad():
        decision = contract.read(outputs, trial)
        rule = _recognise(contract, decision, trial, handed_on)
        logits_TE = rule.logits(decision)
        weight, bias = _gate(logits_TE, tokens_TD, host, rule.normalised)
        if weight is not None:
            return replace(rule, gate_weight=weight, gate_bias=bias)
        return replace(rule, **_gate_within(logits_TE, host, rule.normalised, partial(_ask, host, arguments)))


# -- the trial -------------------------------------------------------------------------------------------------------


def _random_copy(host: nn.Module) -> nn.Module:
    """The router in float32 on the CPU, with random weights; the model's own may be anywhere, or nowhere yet."""
    hooks = {name: value for name, value in vars(host).items() if name.endswith("_hooks") and isinstance(value, dict)}
    # What wrappers hang on a module (its forward, hooks) is not the rule, and may hold the whole model.
    skipped: dict[int, Any] = {id(value): type(value)() for value in hooks.values()}
    skipped |= {id(vars(host)[name]): None for name in _BESIDE if name in vars(host)}
    skipped |= {id(value): None for value in (*host.parameters(), *host.buffers())}
    twin = copy.deepcopy(host, skipped)
    for name in _BESIDE:
        vars(twin).pop(name, None)
    generator = torch.Generator().manual_seed(0)
    for part, source in zip(twin.modules(), host.modules(), strict=True):
        kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for kind in kinds:
            for name in kind:
                value = getattr(source, name)
                if value is not None:
                    kind[name] = _random_like(value, generator, isinstance(value, nn.Parameter))
    return twin.eval()


def _random_like(value: Tensor, generator: torch.Generator, parameter: bool) -> Tensor:
    if not value.is_floating_point():
        drawn = torch.zeros(value.shape, dtype=value.dtype)
    elif value.ndim < 2 or 1 in value.shape:
        # Corrections and scales. Above 0: a choice in some groups by corrected scores below 0 has no one meaning.
        drawn = 0.5 + 0.5 * torch.rand(value.shape, generator=generator)
    else:
        drawn = 1.5 * torch.randn(value.shape, generator=generator) / math.sqrt(value.shape[-1])
    return nn.Parameter(drawn, requires_grad=False) if parameter else drawn


def _handed_on(site: Site) -> dict[str, tuple[Source, Tensor]]:
    """What the router is given beside tokens: argument → where it is from, and a random one. (E,) each."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in list(inspect.signature(type(site.host).forward).parameters)[2:]:
        # Those that are known are handed on under the name that they have in the block.
        value = getattr(site.parent, name, None)
        if isinstance(value, Tensor) and value.ndim == 1:
            found[name] = Source("parent", name), 0.5 + 0.5 * torch.rand(value.shape, generator=generator)
    return found


def _ask(host: nn.Module, arguments: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Random tokens (T, D), and the outputs for them, flat or, where it wants that, in a batch."""
    widths = [value.shape[-1] for value in host.parameters() if value.ndim == 2]
    generator = torch.Generator().manual_seed(2)
    error: Exception | None = None
    for width, flat in itertools.product(dict.fromkeys(widths), (True, False)):
        tokens = torch.randn(_TOKENS, width, generator=generator)
        try:
            with torch.no_grad():
                return tokens, host(tokens.clone() if flat else tokens.view(2, -1, width).clone(), **arguments)
        except Exception as raised:  # whatever a module that was not made for this says
            error = error or raised
    raise NotARouter(f"it cannot be called with tokens alone: {error}")


def _described(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"{tuple(outputs.shape)} {str(outputs.dtype).removeprefix('torch.')}"
    if isinstance(outputs, (tuple, list)):
        return f"{len(outputs)} values: " + ", ".join(map(_described, outputs))
    return type(outputs).__name__


# -- the rule --------------------------------------------------------------------------------------------------------


def _recognise(
    contract: Contract, decision: Decision, trial: Site, handed_on: dict[str, tuple[Source, Tensor]]
) -> Scoring:
    returned_TE, weights_TK, experts_TK = decision
    num_experts, top_k = returned_TE.shape[-1], experts_TK.shape[-1]
    rule = Scoring(contract, num_experts, top_k)
    if (returned_TE >= 0).all() and torch.allclose(returned_TE.sum(-1), torch.ones(len(returned_TE)), atol=1e-4):
        rule = replace(rule, probabilities=True)
    logits_TE = rule.logits(decision)
    if torch.allclose(logits_TE.logsumexp(-1), torch.zeros(()), atol=1e-4):
        rule = replace(rule, normalised=True)
    vectors = dict(handed_on.values()) | {
        Source("host", name): value.flatten()
        for name, value in (*trial.host.named_parameters(), *trial.host.named_buffers())
        if value.numel() == num_experts and value.is_floating_point()
    }
    chooses = [
        candidate
        for candidate, selection_TE in _selections(rule, logits_TE, vectors, trial.host)
        if _same_sets(selection_TE.topk(top_k, dim=-1).indices, experts_TK)
    ]
    if not chooses:
        raise Unknown(f"its choice ({_described(returned_TE)} to {_described(experts_TK)}) follows no known rule")
    for candidate in chooses:
        for score, norm_topk in itertools.product(get_args(Score), (True, False)):
            if candidate.correction_on == "scores" and candidate.correction and score != candidate.score:
                continue
            ratio_TK = weights_TK / weigh(logits_TE, experts_TK, score, norm_topk)
            for source in (None, *vectors):
                scale = _common(ratio_TK if source is None else ratio_TK / vectors[source][experts_TK])
                if scale is not None:
                    return replace(candidate, score=score, norm_topk=norm_topk, route_scale=scale, expert_scale=source)
    raise Unknown("its choice is plain top-k, its weights follow no known rule")


def _gate(
    logits_TE: Tensor, tokens_TD: Tensor, host: nn.Module, normalised: bool
) -> tuple[Source | None, Source | None]:
    """The weight, and the bias if there is one, of which the logits are the linear map of the tokens."""
    parameters = dict(host.named_parameters())
    for name, weight in parameters.items():
        if weight.shape != (logits_TE.shape[-1], tokens_TD.shape[-1]):
            continue
        rest_TE = logits_TE - tokens_TD @ weight.T
        biases = {other: bias for other, bias in parameters.items() if bias.shape == logits_TE.shape[1:]}
        for other, bias in (None, torch.zeros(())), *biases.items():
            left_TE = rest_TE - bias
            if normalised:  # logits are known but for what is added to all of a token's
                left_TE = left_TE - left_TE.mean(-1, keepdim=True)
            if torch.allclose(left_TE, torch.zeros(()), atol=_TOLERANCE):
                return Source("host", name), None if other is None else Source("host", other)
    return None, None


def _gate_within(logits_TE: Tensor, host: nn.Module, normalised: bool, again: Callable[[], Any]) -> dict[str, Any]:
    """The linear gate in a router that makes something of the tokens before it, as fields of `Scoring`."""
    for path, part in list(host.named_modules())[1:]:
        given: list[Tensor] = []
        hook = part.register_forward_pre_hook(lambda _, args, given=given: given.extend(args[:1]))
        again()
        hook.remove()
        if len(given) == 1 and isinstance(given[0], Tensor) and given[0].numel() % len(logits_TE) == 0:
            weight, bias = _gate(logits_TE, given[0].reshape(len(logits_TE), -1), part, normalised)
            if weight is not None:
                return {
                    "gate_module": path,
                    "gate_weight": Source("host", f"{path}.{weight.name}"),
                    "gate_bias": None if bias is None else Source("host", f"{path}.{bias.name}"),
                }
    return {}


def _selections(
    rule: Scoring, logits_TE: Tensor, vectors: dict[Source, Tensor], host: nn.Module
) -> Iterator[tuple[Scoring, Tensor]]:
    """Rules of choice, and what each takes the largest of; the plain one first."""
    sizes = [value for name, value in vars(host).items() if "group" in name and type(value) is int and value >= 1]
    groups = [(1, 1)] + [
        (groups, top)
        for groups, top in itertools.product(sizes, sizes)
        if rule.num_experts % groups == 0 and top < groups and top * (rule.num_experts // groups) >= rule.top_k
    ]
    for (count, top), score in itertools.product(groups, get_args(Score)):
        scores_TE = scores(logits_TE, score)
        values: list[tuple[dict[str, Any], Tensor]] = [({}, scores_TE if count > 1 else logits_TE)]
        for source, value_E in vectors.items():
            values.append(({"correction": source, "correction_on": "scores"}, scores_TE + value_E))
            values.append(({"correction": source, "correction_on": "logits"}, logits_TE + value_E))
        judges = get_args(GroupScore) if count > 1 else ("max",)
        for (told, values_TE), group_score in itertools.product(values, judges):
            limited_TE = limit_to_groups(values_TE, count, top, group_score) if count > 1 else values_TE
            yield replace(rule, score=score, groups=count, top_groups=top, group_score=group_score, **told), limited_TE


def _same_sets(first_TK: Tensor, second_TK: Tensor) -> bool:
    return torch.equal(first_TK.sort(-1).values, second_TK.sort(-1).values)


def _common(ratio_TK: Tensor) -> float | None:
    """What all values are, 1 if they are about that; None: they differ."""
    mean = ratio_TK.mean()
    if mean <= 0 or not ((ratio_TK - mean).abs() <= _TOLERANCE * mean).all():
        return None
    return 1.0 if abs(float(mean) - 1) < _TOLERANCE else float(mean)
