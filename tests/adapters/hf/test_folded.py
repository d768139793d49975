"""`sinkroute.patch(model)` without a name: the recommended router balances the gate that serves, in every family."""

import warnings

import pytest
import torch

import sinkroute

pytest.importorskip("transformers")

from .families import many
from .zoo import FAMILIES, HIDDEN

FAMILY = {family.name: family for family in FAMILIES}
# One of each way: a weight, a bias, a part of the router, a correction bias with groups, groups without one.
QUICK = ["mixtral", "gpt_oss", "gemma4", "deepseek_v3", "mistral4", "ernie4_5_moe"]
# Their routers are not taken over (docs/families.md says why).
REFUSED = {"deepseek_v4.hash", "doge", "nllb_moe"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def skewed(name):
    """A model whose linear gates prefer the last experts, by up to 4 in the logits of the mean token."""
    family = FAMILY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = family.build()
    handle = sinkroute.patch(model, "softmax")
    for seat in handle._seats:
        site, scoring, seen = seat.site, seat.scoring, []
        if scoring.gate_weight is None:
            continue
        gate = site.host.get_submodule(scoring.gate_module)  # layer by layer: one changes what the next is given
        hook = gate.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        )
        model.eval()(**batch(family, 0))
        hook.remove()
        mean_D, weight_ED = seen[0].flatten(0, -2).mean(0), scoring.gate_weight.find(site)
        weight_ED += torch.outer(torch.linspace(0, 4, len(weight_ED)), mean_D / mean_D.square().sum())
    handle.remove()
    return model.train()


def batch(family, seed):
    given = many(family, 16, 48, seed=100 + seed)
    if "inputs_embeds" in given:  # drawn about 0, with nothing in common that a gate without a bias could go by
        given["inputs_embeds"] += torch.linspace(-2, 2, HIDDEN)
    return given


def served(model, family):
    """MaxVio of the worst layer in `eval()`, over 4 batches that no step has seen: of one, chance gives up to 0.4."""
    with sinkroute.LoadMonitor(model) as monitor, torch.no_grad():
        for seed in range(50, 54):
            model.eval()(**batch(family, seed))
    model.train()
    return max(row["max_vio_global"] for row in monitor.metrics("eval").values())


def trained(model, family, steps):
    """Steps of which nothing but the routers learns. (With gradients on: without, a pass is not one of training.)"""
    for step in range(steps):
        sinkroute.set_step(model, step)
        model(**batch(family, 2 + step))
    sinkroute.end_step(model)


def balances(name):
    family, model = FAMILY[name], skewed(name)
    handle = sinkroute.patch(model)
    before = served(model, family)
    trained(model, family, 20)
    after = served(model, family)
    handle.remove()
    sinkroute.patch(model, "softmax")  # to count: it is the model itself that is balanced
    assert served(model, family) == after
    assert after < 0.5 < before


@pytest.mark.parametrize("name", QUICK)
def test_a_skewed_gate_serves_balanced_within_20_steps(name):
    balances(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILY if name not in REFUSED and name not in QUICK])
def test_a_skewed_gate_of_every_family_serves_balanced_within_20_steps(name):
    balances(name)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma4"])
def test_what_is_folded_is_served_by_the_model_alone_and_saved_with_it(name, tmp_path):
    family, model = FAMILY[name], skewed(name)
    names, inputs = set(model.state_dict()), family.inputs()
    handle = sinkroute.patch(model)
    trained(model, family, 3)
    with torch.no_grad():
        found = model.eval()(**inputs).logits
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, found)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, found)


def test_a_gate_in_bfloat16_is_balanced():
    family, model = FAMILY["mixtral"], skewed("mixtral").bfloat16()
    sinkroute.patch(model)
    trained(model, family, 20)
    assert served(model, family) < 0.5


def test_a_frozen_gate_is_refused_with_the_cure():
    model = FAMILY["mixtral"].build().requires_grad_(False)
    with pytest.raises(ValueError, match=r"'ssr-dual' moves weight of .* which is frozen; let it be trained and saved"):
        sinkroute.patch(model)
