"""Routers by name, and what is said about names that are wrong."""

import pytest
import torch

import sinkroute
from sinkroute.routing.registry import ROUTERS, router_options


@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_a_name_makes_a_router_with_its_sizes(name):
    router = sinkroute.create_router(name, num_experts=5, top_k=3)
    assert type(router) is ROUTERS[name] and isinstance(router, sinkroute.Router)
    assert (router.num_experts, router.top_k) == (5, 3)
    assert router.eval()(torch.zeros(2, 5)).experts.shape == (2, 3)


@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_every_listed_option_is_taken(name):
    defaults = sinkroute.create_router(name, num_experts=4, top_k=2)
    options = {option: getattr(defaults, option, None) for option in router_options(name)}
    router = sinkroute.create_router(name, num_experts=4, top_k=2, **options)
    assert {option: getattr(router, option) for option in options} == options


def test_options_reach_the_router():
    router = sinkroute.create_router(
        "ssr-l", num_experts=4, top_k=2, reg=0.7, probability=0.2, noise=2.0, noise_scale="absolute", draw="layer"
    )
    assert (router.reg, router.probability, router.noise_std, router.draw) == (0.7, 0.2, 2.0, "layer")


def test_the_two_forms_of_ssr_differ_in_cost_and_default_reg():
    linear, softmax = (sinkroute.create_router(name, num_experts=4, top_k=2) for name in ("ssr-l", "ssr-s"))
    assert (linear.cost, linear.reg, softmax.cost, softmax.reg) == ("linear", 0.5, "softmax", 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sinkroute.create_router("ssr_s", num_experts=4, top_k=2),
            r"unknown router 'ssr_s'; did you mean 'ssr-s'",
        ),
        (lambda: sinkroute.create_router("quux", num_experts=4, top_k=2), r"unknown router 'quux'\. Known: .*z-loss"),
        (
            lambda: sinkroute.create_router("ssr-s", num_experts=4, top_k=2, probabilty=0.1),
            r"unknown option of router 'ssr-s': 'probabilty'; did you mean 'probability'\?",
        ),
        (
            lambda: sinkroute.create_router("softmax", num_experts=4, top_k=2, noise=0.1),
            r"unknown option of router 'softmax': 'noise'.* Known: .*norm_topk",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("softmax", {"top_k": 0}, r"top_k must be between 1 and num_experts=4, got 0"),
        ("softmax", {"top_k": 5}, r"top_k must be between 1 and num_experts=4, got 5.*twice"),
        ("softmax", {"num_experts": 0}, r"num_experts must be an integer of 1 or more, got 0"),
        ("load-balance", {"coefficient": -0.1}, r"coefficient must be .*0 or more, got -0\.1; 0\.01 is"),
        ("load-balance", {"coefficient": float("nan")}, r"coefficient must be .*got nan"),
        ("z-loss", {"coefficient": -1}, r"coefficient must be .*0 or more, got -1; 0\.001 is"),
        ("z-loss", {"coefficient": float("inf")}, r"coefficient must be .*got inf"),
        ("sinkhorn", {"reg": 0}, r"reg must be a finite number above 0, got 0; 1\.0 is"),
        ("sinkhorn", {"reg": float("nan")}, r"reg must be a finite number above 0, got nan"),
        ("sinkhorn", {"reg": float("inf")}, r"reg must be a finite number above 0, got inf"),
        ("sinkhorn", {"tol": 0.0}, r"tol must be a finite number above 0, got 0\.0"),
        ("ssr-s", {"reg": -1.0}, r"reg must be a finite number above 0, got -1\.0; try 0\.5 .* 0\.1"),
        ("ssr-l", {"reg": float("nan")}, r"reg must be .*got nan"),
        ("ssr-l", {"reg": float("inf")}, r"reg must be .*got inf"),
        ("ssr-s", {"probability": 1.5}, r"probability must be between 0 and 1, got 1\.5; it is a share"),
        ("ssr-s", {"probability": -0.1}, r"probability must be .*got -0\.1"),
        ("ssr-s", {"probability": float("nan")}, r"probability must be .*got nan"),
        ("ssr-s", {"noise": -0.3}, r"noise must be a finite number of 0 or more, got -0\.3"),
        ("ssr-s", {"noise": float("inf")}, r"noise must be .*got inf"),
        ("ssr-s", {"noise_branch": "softmx"}, r"unknown noise_branch 'softmx'; did you mean 'softmax'"),
        ("ssr-s", {"noise_scale": "relative"}, r"unknown noise_scale 'relative'.* Known: absolute, per-expert"),
        ("ssr-s", {"plan_gradient": "weight"}, r"unknown plan_gradient 'weight'; did you mean 'weights'"),
        ("ssr-s", {"draw": "batch"}, r"unknown draw 'batch'.* Known: layer, step"),
        ("ssr-s", {"tol": -1e-4}, r"tol must be .*got -0\.0001"),
        ("ssr-s", {"max_passes": 0}, r"max_passes must be an integer of 1 or more, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_when_the_router_is_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        sinkroute.create_router(name, **{"num_experts": 4, "top_k": 2} | options)


def test_a_type_that_is_no_number_is_refused_when_the_router_is_made():
    with pytest.raises(TypeError, match=r"max_passes must be an int or None, got 10\.5"):
        sinkroute.create_router("ssr-s", num_experts=4, top_k=2, max_passes=10.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": None}, r'losses must be names, such as \["z-loss"\], or name → coefficient, got None'),
        ({"losses": 5}, r"losses must be names.*got 5"),
        ({"norm_topk": "no"}, r"norm_topk must be True, False or None, got 'no'"),
        ({"layer": 1.5}, r"layer must be an int or None, got 1\.5"),
        ({"process_group": 7}, r'process_group must be a ProcessGroup, "world", .* or None, got 7'),
    ],
)
def test_an_option_of_a_wrong_type_is_named(options, message):
    with pytest.raises(TypeError, match=message):
        sinkroute.create_router("softmax", num_experts=4, top_k=2, **options)


def test_a_route_scale_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="route_scale must be a finite number, got nan"):
        sinkroute.create_router("softmax", num_experts=4, top_k=2, route_scale=float("nan"))
