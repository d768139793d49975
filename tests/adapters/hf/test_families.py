"""Every mixture-of-experts family of the installed transformers: patched, or refused with a reason."""

import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import sinkroute
from sinkroute.routing.attached import named_routers
from sinkroute.routing.routes import Routes

pytest.importorskip("transformers")

import transformers

from .families import many, page, reason
from .zoo import FAMILIES, TOP_K, VERSION, newcomers

REFUSED = {
    "deepseek_v4.hash": "missing 1 required positional argument: 'input_ids'",
    "doge": "it holds no mixture of experts that sinkroute knows how to find",
    "nllb_moe": "it returns 3 values: (192, 8) int64, (192, 8) float32, (192, 8) float32",
}
PATCHED = [family for family in FAMILIES if family.name not in REFUSED]
every_family = pytest.mark.parametrize("family", PATCHED, ids=lambda family: family.name)
BRAIN_FLOAT = [  # one of every contract, score and kind of correction
    "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "dbrx", "gemma4", "inkling", "jetmoe", "kolibri1",
    "llama4", "longcat_flash", "phimoe", "switch_transformers", "zaya",
]  # fmt: skip
QUIET = {"noise": 0.0}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(model, family, inputs=None):
    """Loss and gradients of a training step."""
    torch.manual_seed(5)
    model.train().zero_grad()
    loss = family.loss(model(**inputs or family.inputs()))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@functools.cache
def unpatched_step(family, dtype=torch.float32):
    return step(family.build().to(dtype), family)


def answer(model, family):
    torch.manual_seed(5)
    with torch.no_grad():
        output = model.eval()(**family.inputs())
    return output["logits" if "logits" in output else "last_hidden_state"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def hosts(model, family):
    return [(path, part) for path, part in model.named_modules() if type(part).__name__ == family.router_class]


def load(output, host):
    """How often each expert was chosen, by what the model's router returns, in words of that model."""
    if isinstance(output, torch.Tensor):  # DBRX: its block takes the largest
        return output.topk(TOP_K).indices.flatten().bincount(minlength=output.shape[-1])
    if len(output) == 5:  # JetMoE: how many come to each expert
        return torch.tensor(output[3])
    if len(output) == 2:  # Llama 4: scores, 0 where not chosen
        return (output[0] != 0).sum(0)
    if not output[0].is_floating_point() and output[0].shape == output[2].shape:  # Switch: one-hot
        return output[0].flatten(0, -2).sum(0)
    logits, weights, experts = output[:3] if output[0].is_floating_point() else output[::-1]
    if type(host).__name__ == "ZayaRouter":  # the last one is no expert: weight 0, and the first is named
        experts = experts.masked_fill(weights == 0, logits.shape[-1] - 1)
    return experts.flatten().bincount(minlength=logits.shape[-1])


def max_violations(family, router, **options):
    """Of every layer, on a batch that is skewed towards some experts: a constant is added to what the routers see."""
    model = family.build()
    sinkroute.patch(model, router, **options)
    sinkroute.set_step(model, 0)
    loads = []
    for _, host in hosts(model, family):
        host.register_forward_pre_hook(_skew)
        host.register_forward_hook(lambda host, _, output: loads.append(load(output, host)))
    gradients = step(model, family, many(family))
    return torch.tensor([load_E.max() / load_E.float().mean() - 1 for load_E in loads]), gradients, model


def _skew(host, args):
    direction_D = torch.randn(args[0].shape[-1], generator=torch.Generator().manual_seed(3))
    return (args[0] + 2 * direction_D, *args[1:])


# -- all of them -----------------------------------------------------------------------------------------------------


def test_these_families_are_refused():
    for family in FAMILIES:
        if family.name in REFUSED:
            model = family.build()
            with pytest.raises(ValueError, match=type(model).__name__) as error:
                sinkroute.patch(model, "ssr-l")
            assert REFUSED[family.name] in reason(str(error.value))
            assert named_routers(model) == {}


@every_family
def test_every_layer_is_taken_over(family):
    model = family.build()
    handle = sinkroute.patch(model, "ssr-l")
    assert handle.refused == {}
    assert {path for path, _ in hosts(model, family)} <= handle.scorings.keys() == named_routers(model).keys()


@every_family
def test_a_step_by_plans_balances_loads_and_trains(family):
    plain, _, _ = max_violations(family, "softmax")
    ours, gradients, model = max_violations(family, "ssr-l", probability=1.0, **QUIET)
    assert plain.max() > 1.2
    # Zaya's logits are so far apart that a plan of that regularisation leaves a few tokens no choice.
    assert ours.max() < (1.5 if family.name == "zaya" else 0.6)
    assert ours.mean() < plain.mean() / 4
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(name in gradients for name, p in model.named_parameters() if "expert" in name and p.ndim >= 3)


@every_family
def test_steps_between_sinkhorn_steps_are_the_models_own_to_the_last_bit(family):
    model = family.build()
    sinkroute.patch(model, "ssr-l", probability=0.0, **QUIET)
    sinkroute.set_step(model, 0)
    assert_same(step(model, family), unpatched_step(family))


@every_family
def test_eval_is_the_models_own_to_the_last_bit_and_so_is_what_is_left_by_remove(family):
    model = family.build()
    before, config = answer(model, family), model.config.to_dict()
    handle = sinkroute.patch(model, "ssr-l", probability=1.0, noise=0.5)
    sinkroute.set_step(model, 0)
    assert torch.equal(answer(model, family), before)
    assert not torch.equal(step(model, family)["loss"], unpatched_step(family)["loss"])
    with sinkroute.LoadMonitor(model):  # it asks routers in eval(), too
        assert torch.equal(answer(model, family), before)
    handle.remove()
    assert_same(step(model, family), unpatched_step(family))
    assert model.config.to_dict() == config
    assert [part for part in model.modules() if any("sinkroute" in name for name in vars(part))] == []


@every_family
def test_nothing_is_added_to_the_model(family):
    def content(model):
        return [list(dict(names())) for names in (model.named_parameters, model.named_buffers, model.named_modules)]

    model = family.build()
    before, state = content(model), {name: value.clone() for name, value in model.state_dict().items()}
    handle = sinkroute.patch(model, "ssr-l", probability=1.0)
    sinkroute.set_step(model, 0)
    step(model, family)
    assert content(model) == before
    assert_same(model.state_dict(), state)
    handle.remove()
    assert content(model) == before
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize("family", [f for f in PATCHED if f.name in BRAIN_FLOAT], ids=lambda family: family.name)
def test_the_same_in_bf16(family):
    model = family.build().bfloat16()
    before = answer(model, family)
    handle = sinkroute.patch(model, "ssr-l", probability=0.0, **QUIET)
    sinkroute.set_step(model, 0)
    assert_same(step(model, family), unpatched_step(family, torch.bfloat16))
    handle.remove()
    sinkroute.patch(model, "ssr-l", probability=1.0, noise=0.5)
    sinkroute.set_step(model, 0)
    planned = step(model, family)
    assert all(value.isfinite().all() for value in planned.values())
    assert not torch.equal(planned["loss"], unpatched_step(family, torch.bfloat16)["loss"])
    assert torch.equal(answer(model, family), before)


# -- those that a newer transformers brings ----------------------------------------------------------------------------


def test_routers_that_nobody_has_listed_keep_the_contract():
    """They are reported, as a warning or as an expected failure: a release of somebody else's is no fault of ours."""
    failed = {}
    for name, family in newcomers().items():
        try:
            if isinstance(family, str):
                raise ValueError(family)
            test_every_layer_is_taken_over(family)
            test_steps_between_sinkhorn_steps_are_the_models_own_to_the_last_bit(family)
            test_eval_is_the_models_own_to_the_last_bit_and_so_is_what_is_left_by_remove(family)
            test_nothing_is_added_to_the_model(family)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            warnings.warn(f"{name} is new in transformers {transformers.__version__}: taken over", stacklevel=1)
    if failed:
        pytest.xfail(f"new in transformers {transformers.__version__}, and not taken over or not tried: {failed}")


# -- rules -----------------------------------------------------------------------------------------------------------


class Forced(TorchFunctionMode):
    """In it, these are the K largest of E."""

    def __init__(self, experts_TK, num_experts):
        super().__init__()
        self.experts_TK, self.shape, self.times = experts_TK, (len(experts_TK), num_experts), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function not in (torch.topk, torch.Tensor.topk) or args[0].flatten(0, -2).shape != self.shape:
            return result
        if result.indices.shape[-1] != self.experts_TK.shape[-1]:
            return result
        self.times += 1
        chosen = self.experts_TK.view(result.indices.shape)
        return torch.return_types.topk((args[0].gather(-1, chosen), chosen))


def first_call(family, router="softmax", **options):
    """A patched model's first router, what it is called with, and what it returns by itself."""
    model = family.build()
    handle = sinkroute.patch(model, router, **options)
    seat = handle._seats[0]
    calls = []
    hook = seat.site.host.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    with torch.no_grad():
        model.train()(**family.inputs())
    hook.remove()
    handle.remove()
    args, kwargs = calls[0]
    return seat, args, kwargs


# Where the top K is not taken by the router itself, or weighs by the largest score, whatever is chosen.
NOT_FORCED = ("dbrx", "phimoe", "switch_transformers")


@pytest.mark.parametrize("family", [f for f in PATCHED if f.name not in NOT_FORCED], ids=lambda family: family.name)
def test_weights_of_any_choice_are_those_of_the_models_own_rule(family):
    seat, args, kwargs = first_call(family)
    host, scoring, router = seat.site.host, seat.scoring, seat.router
    with torch.no_grad():
        unforced = host(*args, **kwargs)
        decision = scoring.contract.read(unforced, seat.site)
        tokens, experts = decision.logits_TE.shape
        # Any experts of the model's own group of experts: outside it they have no weight.
        draws_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1))
        size = experts // scoring.groups
        draws_TE[torch.arange(experts) // size != decision.experts_TK[:, :1] // size] = -1
        forced_TK = draws_TE.topk(scoring.top_k).indices
        with Forced(forced_TK, experts) as forced:
            theirs = host(*args, **kwargs)
        assert forced.times == 1
        router.is_plain = lambda: False
        router.route = lambda logits_TE, mask: Routes(forced_TK, router.weigh(logits_TE, forced_TK))
        ours = seat(host, args, kwargs, unforced)
    if scoring.contract.name == "sorted":  # with places in another order, among equals
        theirs, ours = (scoring.contract.read(outputs, seat.site) for outputs in (theirs, ours))
    for one, other in zip(theirs, ours, strict=True):
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [f for f in PATCHED if f.name != "phimoe"], ids=lambda family: family.name)
def test_a_router_that_does_nothing_gives_the_models_own_loss_and_gradients(family):
    model = family.build()
    sinkroute.patch(model, "softmax")
    for router in named_routers(model).values():
        router.is_plain = lambda: False  # so that our rule chooses and weighs
    ours, theirs = step(model, family), unpatched_step(family)
    assert ours.keys() == theirs.keys()
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5 * float(scale))


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_of_families_is_up_to_date():
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    assert f"transformers {VERSION}:" in text
    if transformers.__version__ != VERSION:
        pytest.skip(f"docs/families.md is of transformers {VERSION}, this is {transformers.__version__}")
    assert text == page(), "run python -m tests.adapters.hf.families > docs/families.md"


@pytest.mark.parametrize("name", ["README.md", "docs/huggingface.md", "CHANGELOG.md"])
def test_texts_name_as_many_router_classes_as_the_page(name):
    root = Path(__file__).parents[3]
    counts = re.compile(r"(\d+) of (?:the )?(\d+) router classes")
    (of_page,) = counts.findall((root / "docs" / "families.md").read_text())
    text = (root / name).read_text()
    assert set(counts.findall(text)) == {of_page}
    assert f"transformers {VERSION.rpartition('.')[0]}" in text
