"""Routers that are attached to a module: found by everything that looks for routers, and no part of it."""

import copy

import pytest
import torch
from torch import nn

import sinkroute
from sinkroute.adapters._patched import put_in
from sinkroute.routing.attached import attach, attached, detach, named_routers


def make(name="ssr-l", **options):
    return sinkroute.create_router(name, num_experts=4, top_k=2, **options)


def test_an_attached_router_is_no_part_of_its_host():
    host = nn.Linear(3, 4)
    before = (list(host.state_dict()), list(host.modules()), list(host.parameters()), repr(host))
    attach(host, make("ssr-bias"))
    assert (list(host.state_dict()), list(host.modules()), list(host.parameters()), repr(host)) == before
    assert isinstance(attached(host), sinkroute.Router)


def test_detaching_undoes_it_and_twice_is_once():
    host = nn.Linear(3, 4)
    before = dict(vars(host))
    attach(host, make())
    detach(host)
    detach(host)
    assert attached(host) is None and vars(host) == before


def test_routers_are_named_in_the_order_of_the_model_and_each_once():
    shared = make()
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Sequential(make(), nn.Linear(3, 4)), "c": nn.Linear(3, 4)})
    attach(model["a"], shared)
    attach(model["b"][1], make())
    attach(model["c"], shared)
    assert list(named_routers(model)) == ["a", "b.0", "b.1"]


def test_the_step_reaches_attached_routers_and_numbers_them():
    model = nn.ModuleList([nn.Linear(3, 4), make(), nn.Linear(3, 4)])
    attach(model[0], make())
    attach(model[2], make())
    sinkroute.set_step(model, 7)
    assert [(router.step, router.layer) for router in named_routers(model).values()] == [(7, 0), (7, 1), (7, 2)]


def test_a_step_that_ends_moves_the_state_of_attached_routers():
    host = nn.Linear(3, 4)
    attach(host, make("loss-free", update_rate=0.5))
    sinkroute.set_step(host, 0)
    attached(host)(torch.tensor([[3.0, 2, 1, 0]]))
    sinkroute.end_step(host)
    assert attached(host).state.bias_E.tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_inference_is_set_on_attached_routers():
    host = nn.Linear(3, 4)
    attach(host, make())
    sinkroute.set_inference(host, "sinkhorn")
    assert attached(host).inference == "sinkhorn"


def test_a_monitor_watches_attached_routers_under_the_name_of_the_host():
    model = nn.ModuleDict({"gate": nn.Linear(3, 4)})
    attach(model["gate"], make("softmax"))
    with sinkroute.LoadMonitor(model) as monitor:
        logits_TE = torch.tensor([[3.0, 2, 1, 0]])
        plain = make("softmax")(logits_TE)
        attached(model["gate"])(logits_TE, torch.tensor([True]), plain=None)
        assert plain.load.tolist() == [1, 1, 0, 0]
    assert {path: row["load"] for path, row in monitor.metrics().items()} == {"gate": [1, 1, 0, 0]}


def test_a_copy_of_the_host_has_a_router_of_its_own():
    host = nn.Linear(3, 4)
    attach(host, make("loss-free"))
    other = copy.deepcopy(host)
    assert attached(other) is not attached(host)
    attached(other).state.bias_E.add_(1)
    assert not attached(host).state.bias_E.any()


TAKES_A_MODEL = {
    "patch": sinkroute.patch,
    "the other adapters' patch": lambda model: put_in(model, "softmax", {}, "anybody"),
    "set_step": lambda model: sinkroute.set_step(model, 0),
    "end_step": sinkroute.end_step,
    "set_inference": lambda model: sinkroute.set_inference(model, "none"),
    "no_balancing": lambda model: sinkroute.no_balancing(model).__enter__(),
    "LoadMonitor": sinkroute.LoadMonitor,
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", r"got the str 'mistralai/Mixtral-8x7B-v0.1'; load .*from_pretrained, and pass"),
        (nn.Linear, "got the class Linear; make a model of it, and pass that"),
        ([nn.Linear(2, 2)] * 2, "got a list of 2; call it for each model in it"),
        (None, r"got None \(NoneType\); pass the model that holds the mixture-of-experts layers"),
    ],
)
def test_what_is_no_model_is_told_with_the_cure(name, given, message):
    with pytest.raises(TypeError, match=f"^model must be a torch.nn.Module, {message}"):
        TAKES_A_MODEL[name](given)
