"""A router's rule, found by asking it: hand-made routers of every rule, and configurations of real ones."""

import itertools

import pytest
import torch
from torch import nn

from sinkroute.adapters.hf.contracts import Site
from sinkroute.adapters.hf.scoring import NotARouter, Source, Unknown, read_scoring
from sinkroute.routing.scores import limit_to_groups

pytest.importorskip("transformers")

from .zoo import FAMILIES

FAMILY = {family.name: family for family in FAMILIES}
SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}


class Gate(nn.Module):
    """A router of any rule."""

    def __init__(self, score="softmax", norm=False, scale=1.0, bias=None, scaled=False, groups=(1, 1), top_k=2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 16))
        self.score, self.norm, self.scale, self.top_k = score, norm, scale, top_k
        self.bias_on, self.scaled = bias, scaled
        self.n_group, self.topk_group = groups
        if bias:
            self.register_buffer("bias", torch.zeros(8))
        if scaled:
            self.factor = nn.Parameter(torch.ones(8))

    def forward(self, hidden):
        logits = nn.functional.linear(hidden.reshape(-1, 16).float(), self.weight.float())
        scores = SCORES[self.score](logits)
        chosen_by = {None: scores, "scores": scores, "logits": logits}[self.bias_on]
        if self.bias_on:
            chosen_by = chosen_by + self.bias
        if self.topk_group < self.n_group:
            chosen_by = limit_to_groups(chosen_by, self.n_group, self.topk_group, "top2-sum")
        experts = chosen_by.topk(self.top_k).indices
        weights = scores.gather(-1, experts)
        if self.norm:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scaled:
            weights = weights * self.factor[experts]
        return logits, weights * self.scale, experts


def read(gate):
    return read_scoring(Site("gate", gate, nn.Module()))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("bias", "groups"), [(None, (1, 1)), ("scores", (1, 1)), ("logits", (1, 1)), (None, (4, 2)), ("scores", (4, 2))]
)
def test_every_rule_is_told_from_every_other(score, norm, scale, bias, groups):
    rule = read(Gate(score, norm, scale, bias, groups=groups))
    assert (rule.score, rule.norm_topk, rule.num_experts, rule.top_k) == (score, norm, 8, 2)
    assert rule.route_scale == pytest.approx(scale, rel=1e-4)
    assert (rule.groups, rule.top_groups) == groups
    assert rule.correction == (Source("host", "bias") if bias else None)
    assert bias is None or rule.correction_on == bias
    assert rule.expert_scale is None


@pytest.mark.parametrize(("score", "norm"), list(itertools.product(SCORES, [True, False])))
def test_factors_of_experts_are_found(score, norm):
    rule = read(Gate(score, norm, scaled=True))
    assert rule.expert_scale == Source("host", "factor") and rule.correction is None
    assert (rule.score, rule.norm_topk) == (score, norm)


@pytest.mark.parametrize("score", SCORES)
def test_one_expert_per_token_is_read_as_renormalised_where_its_weight_is_1(score):
    assert read(Gate(score, True, top_k=1)).norm_topk
    rule = read(Gate(score, False, top_k=1))
    assert (rule.score, rule.norm_topk) == (score, False)


def test_all_experts_per_token():
    rule = read(Gate(top_k=8))
    assert (rule.top_k, rule.norm_topk) in ((8, False), (8, True))  # a softmax over all is the same


def test_weights_of_the_trial_are_its_own():
    gate = Gate(bias="scores")
    gate.bias.fill_(float("nan"))
    nn.init.constant_(gate.weight, float("inf"))
    assert read(gate).correction is not None
    assert gate.bias.isnan().all() and gate.weight.isinf().all()


@pytest.mark.parametrize("kind", ["meta", "bfloat16", "frozen", "training"])
def test_a_gate_is_asked_wherever_and_whatever_it_is(kind):
    gate = Gate("sigmoid", True, bias="scores")
    gate = {
        "meta": lambda: gate.to("meta"),
        "bfloat16": gate.bfloat16,
        "frozen": lambda: gate.requires_grad_(False),
        "training": gate.train,
    }[kind]()
    assert (read(gate).score, read(gate).norm_topk) == ("sigmoid", True)


def test_hooks_and_wrappers_are_not_a_part_of_the_rule():
    gate = Gate()
    gate.register_forward_hook(lambda *_: pytest.fail("the trial called a hook of the model"))
    gate.register_forward_pre_hook(lambda *_: pytest.fail("the trial called a hook of the model"))
    own = gate.forward
    gate.forward = lambda hidden: pytest.fail("the trial called the model's own")
    assert read(gate).score == "softmax"
    gate.forward = own


def test_reading_twice_reads_the_same():
    gate = Gate("sigmoid", True, 1.5, "scores", groups=(2, 1))
    assert read(gate) == read(gate)


def test_a_module_of_other_outputs_is_no_router():
    with pytest.raises(NotARouter, match=r"it returns \(192, 8\) float32"):
        read(nn.Linear(16, 8))


def test_a_module_that_wants_more_than_tokens_says_so():
    class Hash(Gate):
        def forward(self, hidden, input_ids):
            return super().forward(hidden)

    with pytest.raises(NotARouter, match=r"cannot be called with tokens alone: .*input_ids"):
        read(Hash())


@pytest.mark.parametrize("score", ["softmax", "log_softmax", None])
def test_it_is_seen_whether_the_height_of_the_logits_is_lost(score):
    class Normalised(Gate):
        def forward(self, hidden):
            logits, weights, experts = super().forward(hidden)
            return getattr(logits, score)(-1) if score else logits, weights, experts

    found = read(Normalised())
    assert found.normalised == (score is not None) and found.probabilities == (score == "softmax")


def test_random_choices_are_of_no_rule():
    class Random(Gate):
        def forward(self, hidden):
            logits, weights, experts = super().forward(hidden)
            return logits, weights, (experts + 1) % 8

    with pytest.raises(Unknown, match="follows no known rule"):
        read(Random())


@pytest.mark.parametrize(
    ("name", "attribute", "value", "field", "expected"),
    [
        ("olmoe", "norm_topk_prob", True, "norm_topk", True),
        ("qwen3_moe", "norm_topk_prob", True, "norm_topk", True),
        ("deepseek_v3", "norm_topk_prob", False, "norm_topk", False),
        ("deepseek_v3", "routed_scaling_factor", 1.0, "route_scale", 1.0),
        ("deepseek_v3", "top_k", 3, "top_k", 3),
        ("deepseek_v3", "topk_group", 2, "groups", 1),
        ("deepseek_v2", "topk_method", "greedy", "groups", 1),
    ],
)
def test_what_a_router_is_configured_to_is_honoured(name, attribute, value, field, expected):
    model = FAMILY[name].build()
    block = model.model.layers[0].mlp
    assert hasattr(block.gate, attribute)
    before = getattr(read_scoring(Site("gate", block.gate, block)), field)
    setattr(block.gate, attribute, value)
    after = getattr(read_scoring(Site("gate", block.gate, block)), field)
    assert after == pytest.approx(expected) and before != after
