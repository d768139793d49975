"""`set_step` and `end_step`: numbers, counts, and a warning where the first was forgotten."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sinkroute


class TwoRouters(nn.Module):
    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = sinkroute.create_router("ssr-s", num_experts=4, top_k=2, layer=first)
        self.plain = nn.Linear(3, 3)
        self.second = sinkroute.create_router("softmax", num_experts=4, top_k=1)
        if second is not None:
            self.second.layer = second


def test_copies_of_a_numbered_router_get_numbers_of_their_own():
    first = sinkroute.create_router("ssr-s", num_experts=4, top_k=2)
    sinkroute.set_step(first, 0)
    model = nn.ModuleList([first, copy.deepcopy(first), copy.deepcopy(first)])
    sinkroute.set_step(model, 1)
    assert [router.layer for router in model] == [0, 1, 2]


def test_any_integer_type_counts():
    router = sinkroute.create_router("ssr-s", num_experts=4, top_k=2)
    sinkroute.set_step(router, np.int64(3), torch.tensor(2))
    assert (router.step, router.micro_batch) == (3, 2)
    assert type(router.step) is type(router.micro_batch) is int


def test_set_step_reaches_every_router_and_numbers_them_in_order():
    model = TwoRouters()
    sinkroute.set_step(model, 7, micro_batch=3)
    assert [(r.layer, r.step, r.micro_batch) for r in (model.first, model.second)] == [(0, 7, 3), (1, 7, 3)]


def test_set_step_keeps_a_layer_that_was_given():
    model = TwoRouters(first=12)
    sinkroute.set_step(model, 0)
    assert (model.first.layer, model.second.layer) == (12, 1)


def test_set_step_keeps_the_numbers_of_its_first_call():
    model = TwoRouters()
    sinkroute.set_step(model, 0)
    sinkroute.set_step(model.second, 5)
    assert (model.second.layer, model.second.step, model.first.step) == (1, 5, 0)


def test_set_step_starts_the_micro_batches_of_a_new_step_at_0():
    router = sinkroute.create_router("ssr-s", num_experts=4, top_k=2)
    sinkroute.set_step(router, 1, micro_batch=4)
    sinkroute.set_step(router, 2)
    assert (router.step, router.micro_batch) == (2, 0)


@pytest.mark.parametrize("call", [lambda model: sinkroute.set_step(model, 3), sinkroute.end_step])
def test_a_model_without_routers_is_told_of_once_and_left_alone(call):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"step\(\) found no router in Sequential.*sinkroute\.Router.*patch") as told:
        call(model)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model)
    with pytest.warns(UserWarning, match="found no router"):  # another model
        call(nn.Linear(2, 2))


def test_a_model_with_routers_is_not_told_that_it_has_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkroute.set_step(TwoRouters(), 3)


@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None, torch.tensor(2.0)])
@pytest.mark.parametrize("name", ["step", "micro_batch"])
def test_set_step_refuses_what_is_no_count(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer of 0 or more, got "):
        sinkroute.set_step(TwoRouters(), **{"step": 1, name: value})


def test_set_step_that_is_refused_changes_nothing():
    model = TwoRouters()
    with pytest.raises(ValueError):
        sinkroute.set_step(model, 5, micro_batch=-1)
    assert model.first.step == 0 and not model.first.clock.told


def test_forgetting_set_step_is_told_once_after_64_draws():
    router = sinkroute.create_router("ssr-s", num_experts=4, top_k=2, noise=0)  # without noise: one draw a forward
    logits_TE = torch.zeros(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(63):
            router(logits_TE)
    with pytest.warns(UserWarning, match=r"64 times for step 0.*Call sinkroute\.set_step\(model, step\)"):
        router(logits_TE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(70):
            router(logits_TE)


@pytest.mark.parametrize("silenced_by", ["set_step", "eval", "a router without draws"])
def test_no_warning_where_no_draw_lacks_its_step(silenced_by):
    router = sinkroute.create_router(
        "load-balance" if silenced_by == "a router without draws" else "ssr-s", num_experts=4, top_k=2
    )
    router.train(silenced_by != "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(70):
            if silenced_by == "set_step":
                sinkroute.set_step(router, step)
            router(torch.zeros(1, 4))


def pass_through(router, times, step=None):
    """Passes in training; with `step`, each after `set_step`."""
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(times):
        if step is not None:
            sinkroute.set_step(router, step)
        routes = router(logits_TE)
    return routes


@pytest.mark.parametrize("name", ["global-load-balance", "loss-free", "ssr-s", "noisy"])
def test_a_step_that_is_set_once_for_a_whole_training_is_told_once_and_by_name(name):
    router = sinkroute.create_router(name, num_experts=4, top_k=2)
    sinkroute.set_step(router, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pass_through(router, 64)  # as many micro-batches, or shared layers, may have one key
    with pytest.warns(
        UserWarning, match=r"Router has been trained 65 times for step 7:.*set_step\(model, step\)"
    ) as told:
        pass_through(router, 1000)
    assert len(told) == 1


def test_a_global_load_does_not_grow_for_ever():
    router = sinkroute.create_router("global-load-balance", num_experts=4, top_k=2)
    sinkroute.set_step(router, 0)
    with pytest.warns(UserWarning, match="the load of its global batch begins anew"):
        pass_through(router, 1000)
    assert router._auxiliary._load_E.sum() <= 65 * 12 and len(router._auxiliary._loads) <= 256
    sinkroute.set_step(router, 1)
    assert not router._auxiliary._loads


def test_a_step_that_is_set_anew_for_every_micro_batch_may_have_many():
    # As pipelined schedules do that leave micro_batch at 0.
    router = sinkroute.create_router("global-load-balance", num_experts=4, top_k=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pass_through(router, 300, step=3)
    assert router._auxiliary._load_E.sum() == 300 * 12


def test_a_step_that_never_advances_is_told_too():
    router = sinkroute.create_router("global-load-balance", num_experts=4, top_k=2)
    with pytest.warns(UserWarning, match="trained 4097 times for step 0"):
        pass_through(router, 4100, step=0)
    assert router._auxiliary._load_E.sum() == 4 * 12


@pytest.mark.parametrize("losses", [(), "load-balance"])
def test_a_method_that_knows_no_steps_is_not_told(losses):
    router = sinkroute.create_router("softmax", num_experts=4, top_k=2, losses=losses)
    sinkroute.set_step(router, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pass_through(router, 200)


def test_micro_batches_without_end_leave_a_bounded_memory():
    router = sinkroute.create_router("global-load-balance", num_experts=4, top_k=2)
    with torch.no_grad():
        for part in range(400):
            sinkroute.set_step(router, 0, part)
            pass_through(router, 1)
    assert len(router._auxiliary._loads) == len(router._auxiliary._leaves) == 256


# -- the end of a step -----------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Two routers whose bias moves by 1/8 a step, and one that remembers nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            sinkroute.create_router("loss-free", num_experts=2, top_k=1, update_rate=0.125) for _ in range(2)
        )
        self.third = sinkroute.create_router("softmax", num_experts=2, top_k=1)

    def forward(self, second=1):
        """All tokens want expert 0 of the first router, and `second` of the second router."""
        for router, expert in ((self.first, 0), (self.second, second), (self.third, 0)):
            router(9.0 * nn.functional.one_hot(torch.tensor([expert]), 2))

    def biases(self):
        """In eighths."""
        return (8 * self.first.state.bias_E).tolist(), (8 * self.second.state.bias_E).tolist()


def test_end_step_brings_every_router_up_to_date_with_its_own_load():
    model = Layers()
    sinkroute.set_step(model, 0)
    model()
    assert model.biases() == ([0, 0], [0, 0])
    sinkroute.end_step(model)
    assert model.biases() == ([-1, 1], [1, -1])


def test_a_second_end_of_the_same_step_does_nothing():
    model = Layers()
    sinkroute.set_step(model, 0)
    model()
    for _ in range(3):
        sinkroute.end_step(model)
    sinkroute.set_step(model, 1)
    assert model.biases() == ([-1, 1], [1, -1])


def test_end_step_before_the_first_step_does_nothing():
    model = Layers()
    model()
    with pytest.warns(UserWarning, match="end_step has no step to end: call sinkroute.set_step"):
        sinkroute.end_step(model)
    assert model.biases() == ([0, 0], [0, 0])


def test_a_step_that_is_taken_once_more_counts_once_more():
    # As after a resume from a checkpoint of a step that had ended.
    model = Layers()
    for _ in range(2):
        sinkroute.set_step(model, 0)
        model()
        sinkroute.end_step(model)
    once = Layers()
    sinkroute.set_step(once, 0)
    once()
    sinkroute.end_step(once)
    assert model.biases() == tuple([2 * bias for bias in biases] for biases in once.biases()) != ([0, 0], [0, 0])


def numbered(*layers):
    """Routers of which some are told their layer."""
    return nn.ModuleList(sinkroute.create_router("ssr-l", num_experts=4, top_k=2, layer=layer) for layer in layers)


@pytest.mark.parametrize("layers", [(None, 0), (1, None), (None, None, 2, None), (3, None, None, 3)])
def test_no_router_gets_a_number_that_another_was_given(layers):
    model = numbered(*layers)
    sinkroute.set_step(model, 0)
    own = [router.layer for router in model if not router.layer_is_given]
    assert len(set(own)) == len(own) and not set(own) & set(layers)
    assert [router.layer for router in model if router.layer_is_given] == [x for x in layers if x is not None]


def test_a_router_that_was_numbered_elsewhere_gets_no_number_twice():
    first, second = numbered(None, None)
    sinkroute.set_step(second, 0)
    model = nn.ModuleList([first, second])
    for _ in range(2):
        sinkroute.set_step(model, 0)
        found = [router.layer for router in model]
        assert len(set(found)) == 2
    assert found == [router.layer for router in model]


def test_a_step_that_one_router_refuses_moves_none():
    model = numbered(None, None)
    model.append(sinkroute.create_router("ssr-l", num_experts=4, top_k=2, probability="cosine(1, 0)"))
    with pytest.raises(ValueError, match="total_steps"):
        sinkroute.set_step(model, 3)
    assert [router.step for router in model] == [0, 0, 0]


def test_set_step_ends_the_step_before_but_not_its_own():
    model = Layers()
    sinkroute.set_step(model, 0)
    model()
    sinkroute.set_step(model, 0, micro_batch=1)
    model(second=0)
    model(second=0)
    assert model.biases() == ([0, 0], [0, 0])
    sinkroute.set_step(model, 1)
    assert model.biases() == ([-1, 1], [-1, 1])  # the second router: 1 token for expert 1, then 2 for expert 0


def test_steps_may_go_back():
    model = Layers()
    for step in (5, 6, 3, 4):
        sinkroute.set_step(model, step)
        model()
    sinkroute.end_step(model)
    assert model.biases() == ([-4, 4], [4, -4])


def test_a_step_without_a_forward_pass_moves_nothing():
    model = Layers()
    for step in range(3):
        sinkroute.set_step(model, step)
    assert model.biases() == ([0, 0], [0, 0])


def test_a_resumed_model_ends_the_step_that_it_was_saved_in():
    model, resumed = Layers(), Layers()
    sinkroute.set_step(model, 7)
    model()
    resumed.load_state_dict(model.state_dict())
    sinkroute.set_step(resumed, 8)
    assert resumed.biases() == ([-1, 1], [1, -1])


def test_a_resumed_model_does_not_end_a_step_again():
    model, resumed = Layers(), Layers()
    sinkroute.set_step(model, 7)
    model()
    sinkroute.end_step(model)
    resumed.load_state_dict(model.state_dict())
    sinkroute.end_step(resumed)
    sinkroute.set_step(resumed, 8)
    assert resumed.biases() == ([-1, 1], [1, -1])


def test_routers_of_several_devices_end_a_step_together():
    # Model parallelism in one process; the second device of this machine is made of paper.
    model = Layers()
    sinkroute.set_step(model, 0)
    model()
    second = model.second.state
    second.pending = lambda pending=second.pending: pending().to("meta")
    seen = []
    model.second.end_step = lambda totals: (seen.append(totals.device.type), second.end())
    sinkroute.end_step(model)
    assert model.biases()[0] == [-1, 1] and seen == ["meta"]


def test_the_length_of_training_is_told_once():
    router = sinkroute.create_router("ssr-s", num_experts=4, top_k=2, noise="linear(1, 0)")
    sinkroute.set_step(router, 0, total_steps=10)
    sinkroute.set_step(router, 5)
    assert (router.total_steps, router.noise_now) == (10, 0.5)
    sinkroute.set_step(router, 5, total_steps=20)
    assert (router.total_steps, router.noise_now) == (20, 0.75)


def test_a_schedule_that_spans_a_training_of_unknown_length_is_an_error():
    router = sinkroute.create_router("ssr-s", num_experts=4, top_k=2, noise="linear(1, 0)")
    with pytest.raises(ValueError, match=r"write linear\(1, 0, STEPS\) or tell the length of training"):
        sinkroute.set_step(router, 5)


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_length_of_training_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"^total_steps must be an integer of [01] or more, got "):
        sinkroute.set_step(TwoRouters(), 1, total_steps=value)


# -- a run without plans ---------------------------------------------------------------------------------------------


def planless(name, steps, layers=2, **options):
    """What is said in so many steps of a model whose passes are left out."""
    model = nn.ModuleList(sinkroute.create_router(name, num_experts=4, top_k=2, **options) for _ in range(layers))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            sinkroute.set_step(model, step)
            sinkroute.set_step(model, step, 1)
    return [warning for warning in said if "no plan" in str(warning.message)]


def test_a_model_that_has_made_no_plan_in_a_thousand_steps_is_warned_of_once():
    assert planless("ssr-l", 1000, probability=1e-12) == []
    (warning,) = planless("ssr-l", 1500, probability=1e-12)
    assert str(warning.message).startswith(
        "SSRLinearRouter has made no plan in 1000 training steps: probability=1e-12 is too small"
    )
    assert "such as 0.01, or a router that balances the steps between plans (ssr-dual, ssr-bias)" in str(
        warning.message
    )
    assert warning.filename == __file__


def test_without_a_chance_of_a_plan_nothing_is_warned_of():
    assert planless("ssr-l", 1100, probability=0) == []
    assert planless("ssr-l", 1900, probability="piecewise(0: 0, 1000: 1e-12)") == []
    assert planless("softmax", 1100) == []


def test_ssr_dual_that_waits_for_its_first_plan_in_vain_is_warned_of():
    (warning,) = planless("ssr-dual", 1100)
    assert "see that training passes reach the router" in str(warning.message)


def test_one_plan_in_one_layer_is_enough():
    model = nn.ModuleList(
        sinkroute.create_router("ssr-l", num_experts=4, top_k=2, draw="layer", probability=p) for p in (1.0, 1e-12)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1100):
            sinkroute.set_step(model, step)
            if step == 0:
                model[0](torch.zeros(4, 4))
