"""Random draws: functions of their key, deaf to everything else."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sinkroute
from sinkroute.routing.draws import normal_like, uniform

KEYS = st.lists(st.integers(0, 2**40) | st.text(max_size=5), min_size=1, max_size=4)


class TwoRouters(nn.Module):
    def __init__(self, first=None, second=None):
        super().__init__()
        self.first = sinkroute.create_router("ssr-s", num_experts=4, top_k=2, layer=first)
        self.plain = nn.Linear(3, 3)
        self.second = sinkroute.create_router("softmax", num_experts=4, top_k=1)
        if second is not None:
            self.second.layer = second


@given(KEYS)
def test_uniform_lies_from_0_up_to_but_without_1(key):
    assert 0 <= uniform(*key) < 1


def test_uniform_draws_are_spread_evenly():
    draws = [uniform("branch", 0, step) for step in range(4000)]
    tenths = [sum(low <= 10 * draw < low + 1 for draw in draws) for low in range(10)]
    # 400 expected in each tenth, standard deviation √(4000 · 0.1 · 0.9) = 19.0; five of them.
    assert all(abs(count - 400) < 95 for count in tenths)


def test_uniform_tells_the_parts_of_a_key_apart():
    assert (
        len({uniform("a", 1, 23), uniform("a", 12, 3), uniform("a", 123), uniform("a1", 23), uniform("a", 23, 1)}) == 5
    )


def test_normal_numbers_are_standard_normal():
    sample = normal_like(torch.empty(200, 500, dtype=torch.float64), "noise", 1)
    # 1e5 numbers: the mean is off by 1/√1e5 = 0.0032 (one standard deviation), the deviation by 0.0022, and the share
    # within ±1 of 0.6827 by 0.0015; five of each.
    assert abs(sample.mean()) < 0.016 and abs(sample.std() - 1) < 0.012
    assert abs((sample.abs() < 1).double().mean() - 0.6827) < 0.0075


def test_neighbouring_keys_give_unrelated_noise():
    reference = torch.empty(20_000)
    one, other = normal_like(reference, "noise", 5), normal_like(reference, "noise", 6)
    # The correlation of independent samples has standard deviation 1/√20000 = 0.0071; five of them.
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.036


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_form_of_its_reference_and_repeats(dtype):
    reference = torch.empty(3, 4, dtype=dtype)
    noise = normal_like(reference, "noise", 7)
    assert noise.shape == (3, 4) and noise.dtype == dtype
    assert torch.equal(noise, normal_like(reference, "noise", 7))


def test_draws_neither_read_nor_move_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = normal_like(torch.empty(5), "noise", 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(normal_like(torch.empty(5), "noise", 3), first)


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


def test_set_step_leaves_a_model_without_routers_alone():
    sinkroute.set_step(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None, torch.tensor(2.0)])
@pytest.mark.parametrize("name", ["step", "micro_batch"])
def test_set_step_refuses_what_is_no_count(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer of 0 or more, got "):
        sinkroute.set_step(TwoRouters(), **{"step": 1, name: value})


def test_set_step_that_is_refused_changes_nothing():
    model = TwoRouters()
    with pytest.raises(ValueError):
        sinkroute.set_step(model, 5, micro_batch=-1)
    assert model.first.step == 0 and not model.first.step_was_set


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
    if silenced_by == "set_step":
        sinkroute.set_step(router, 0)
    router.train(silenced_by != "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(70):
            router(torch.zeros(1, 4))


def test_a_draw_is_the_same_in_every_process():
    # Python salts its own hash of strings per process, and a resume would change the routes. By hand:
    # int.from_bytes(blake2b(b"('branch', 0, 7)", digest_size=8).digest(), "little") // 2**11 / 2**53
    assert uniform("branch", 0, 7) == 0.34800474648185054
