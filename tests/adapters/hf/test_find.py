"""Routers are found by what stands beside them and by what they return, not by their names."""

import pytest
import torch
from torch import nn

from sinkroute.adapters.hf.find import find_routers

pytest.importorskip("transformers")

from .zoo import FAMILIES

FAMILY = {family.name: family for family in FAMILIES}


class Experts(nn.Module):
    def __init__(self, experts, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width, width))

    def forward(self, x_TD, experts_TK, weights_TK):
        y_TKD = torch.einsum("td,tkde->tke", x_TD, self.weight[experts_TK])
        return (y_TKD * weights_TK[..., None]).sum(1)


class Chooser(nn.Linear):
    """A router that is called nothing of the kind."""

    top_k = 2

    def forward(self, x_TD):
        logits_TE = super().forward(x_TD)
        weights_TK, experts_TK = logits_TE.softmax(-1).topk(self.top_k)
        return logits_TE, weights_TK, experts_TK


class Square(Chooser):
    """One whose weights follow a rule that is not known."""

    def forward(self, x_TD):
        logits_TE, weights_TK, experts_TK = super().forward(x_TD)
        return logits_TE, weights_TK.square(), experts_TK


class Worst(Chooser):
    """One whose choice follows a rule that is not known."""

    def forward(self, x_TD):
        logits_TE, weights_TK, experts_TK = super().forward(-x_TD)
        return -logits_TE, weights_TK, experts_TK


class Block(nn.Module):
    def __init__(self, chooser, experts=8, width=16):
        super().__init__()
        self.chooser, self.experts = chooser, Experts(experts, width)
        self.shared = nn.Linear(width, width)
        self.weight_of_shared = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_TD):
        _, weights_TK, experts_TK = self.chooser(x_TD)
        return self.experts(x_TD, experts_TK, weights_TK)


def found(model):
    known, refused = find_routers(model)
    return {site.path: str(rule) for site, rule in known.items()}, {site.path: why for site, why in refused.items()}


def test_a_router_needs_no_name_of_one():
    assert found(nn.Sequential(Block(Chooser(16, 8)))) == ({"0.chooser": "softmax, top 2 of 8"}, {})


def test_experts_one_by_one_are_experts():
    block = Block(Chooser(16, 8))
    block.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
    assert found(block)[0] == {"chooser": "softmax, top 2 of 8"}


def test_where_there_are_no_experts_there_is_no_router():
    block = Block(Chooser(16, 8))
    block.experts = nn.Linear(16, 16)
    assert found(block) == ({}, {})


@pytest.mark.parametrize(("kind", "why"), [(Square, "weights follow no"), (Worst, "follows no known rule")])
def test_a_router_of_another_rule_is_left_alone_with_a_reason(kind, why):
    known, refused = found(Block(kind(16, 8)))
    assert known == {} and why in refused["chooser"]


def test_a_gate_that_returns_logits_alone_is_named_if_it_is_called_so():
    block = Block(nn.Linear(16, 8, bias=False))
    assert found(block) == ({}, {})  # nothing says that it is one
    block.gate = block.chooser
    del block.chooser
    assert "it returns (192, 8) float32" in found(block)[1]["gate"]


def test_a_router_that_two_blocks_share_is_found_once():
    first, second = Block(Chooser(16, 8)), Block(Chooser(16, 8))
    second.chooser = first.chooser
    assert list(found(nn.Sequential(first, second))[0]) == ["0.chooser"]


def test_layers_that_differ_are_asked_apart():
    first, second = Block(Chooser(16, 8)), Block(Chooser(16, 8))
    second.chooser.top_k = 3
    rules = found(nn.Sequential(first, second))[0]
    assert list(rules.values()) == ["softmax, top 2 of 8", "softmax, top 3 of 8"]


NOT_FOUND = {"doge"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_of_every_family_routers_are_found_and_nothing_else(family):
    model = family.build()
    routers = {path for path, part in model.named_modules() if type(part).__name__ == family.router_class}
    known, refused = found(model)
    assert known.keys() | refused.keys() == (set() if family.name in NOT_FOUND else routers)


def test_searching_changes_nothing():
    model = FAMILY["gemma4"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        find_routers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
