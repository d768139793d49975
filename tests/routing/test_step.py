"""`set_step`: numbers, counts, and a warning where it was forgotten."""

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
