"""The zoo is whole and alive: every router class of the installed transformers, in a model that trains through it."""

import ast
import collections
import inspect
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from .zoo import (
    EXPERTS,
    FAMILIES,
    LISTED,
    NOT_ROUTERS,
    SIZES,
    UNBUILDABLE,
    VERSION,
    _chooses_experts,
    _discover,
    router_classes,
)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def routers_of(model, family):
    return {name: module for name, module in model.named_modules() if type(module).__name__ == family.router_class}


def tensors(output):
    return [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]


def test_the_zoo_is_of_the_locked_transformers():
    lock = (Path(__file__).parents[3] / "requirements" / "locked.txt").read_text()
    assert f"\ntransformers=={VERSION} " in lock, "update VERSION and what is listed in zoo.py, and docs/families.md"


def test_every_router_class_of_transformers_is_in_the_zoo_and_no_other():
    if transformers.__version__ != VERSION:
        pytest.skip(f"the zoo is of transformers {VERSION}, this is {transformers.__version__}")
    listed = [family.router_class for family in LISTED] + [*UNBUILDABLE, *NOT_ROUTERS]
    assert collections.Counter(list(router_classes())) == collections.Counter(listed)


def test_a_router_that_nobody_has_listed_gets_a_family_by_itself():
    family = _discover("mixtral", "MixtralTopKRouter")
    assert family.loss(family.build()(**family.inputs())).isfinite()
    assert (family.name, family.router_class) == ("mixtral", "MixtralTopKRouter")


@pytest.mark.parametrize(
    ("module", "router_class", "why"),
    [
        ("mixtral", "OlmoeTopKRouter", "no model of its module holds it"),
        ("nowhere", "NowhereRouter", "ModuleNotFoundError: .*nowhere"),
        ("mixtral", "MixtralTopKRouter", "MixtralForCausalLM: ValueError: larger than 10"),
    ],
)
def test_why_a_router_that_nobody_has_listed_gets_none_is_told(monkeypatch, module, router_class, why):
    if "larger" in why:
        monkeypatch.setitem(SIZES, "vocab_size", 10**6)
    assert re.search(why, _discover(module, router_class))


def test_names_differ():
    assert len({family.name for family in LISTED}) == len(LISTED)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class Some(nn.Module):\n def forward(self, x):\n  return self.experts(x, self.gate(x).topk(2))", True),
        ("class Some(nn.Module):\n def forward(self, x, num_experts):\n  return torch.argmax(x)", False),
        ("class Some(nn.Module):\n def forward(self, x):\n  return self.experts(x)", False),
        ("class SomeIndexer(nn.Module):\n def forward(self, x):\n  return x.topk(2)", False),
        ("class SomeRouter(nn.Module):\n def forward(self, x):\n  return self.layer(x)", True),
        ("class SomeRouterLM(SomePreTrainedModel):\n def forward(self, x):\n  return x.router.topk(2)", False),
    ],
)
def test_a_class_is_found_by_its_name_or_by_a_choice_of_experts(source, found):
    (class_,) = ast.parse(source).body
    assert _chooses_experts(class_) is found


@every_family
def test_no_weight_is_left_to_chance_or_zero(family):
    torch.manual_seed(3)
    first = family.build().state_dict()
    torch.manual_seed(4)
    # What nobody initialises becomes NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        second = family.build().state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name, tensor in first.items() if not tensor.any()] == []


@every_family
def test_building_leaves_the_global_generator_alone(family):
    state = torch.random.get_rng_state()
    family.build()
    assert torch.equal(torch.random.get_rng_state(), state)


@every_family
def test_a_step_goes_through_every_router_and_is_finite(family):
    model = family.build()
    calls = collections.Counter()
    for name, router in routers_of(model, family).items():
        router.register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    loss = family.loss(model(**family.inputs()))
    loss.backward()
    assert model.training
    assert loss.ndim == 0 and loss.isfinite()
    assert len(calls) >= 2 and set(calls.values()) == {1}
    assert calls.keys() == routers_of(model, family).keys()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    for name, router in routers_of(model, family).items():
        assert any(p.grad is not None and p.grad.any() for p in router.parameters()), name


@every_family
def test_tokens_want_different_experts(family):
    model = family.build().eval()
    outputs = {}
    for name, router in routers_of(model, family).items():
        router.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: tensors(output)}))
    with torch.no_grad():
        model(**family.inputs())
    for name, output in outputs.items():
        (scores, *_) = [x for x in output if x.is_floating_point() and EXPERTS // 2 <= x.shape[-1] <= EXPERTS + 2]
        assert len(scores.argmax(-1).unique()) >= 3, name


@every_family
def test_whether_an_attention_mask_is_taken_is_told_truly(family):
    model = family.build().eval()
    assert family.takes_attention_mask == ("attention_mask" in inspect.signature(model.forward).parameters)
    if family.takes_attention_mask:
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, -3:] = 0
        with torch.no_grad():
            assert family.loss(model(**family.inputs(), attention_mask=mask)).isfinite()
