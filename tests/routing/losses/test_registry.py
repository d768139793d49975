"""Losses by name: how they are asked for, and that any router takes any of them."""

import pytest
import torch

import sinkroute
from sinkroute.routing.losses.global_load_balance import global_load_balance_loss
from sinkroute.routing.losses.gshard import gshard_loss
from sinkroute.routing.losses.importance import importance_loss
from sinkroute.routing.losses.load_balance import load_balance_loss
from sinkroute.routing.losses.registry import LOSSES, read_losses
from sinkroute.routing.losses.z_loss import z_loss

# What each is of routes: on one process and without set_step, the global load is this batch's.
FUNCTIONS = {
    "load-balance": lambda z, routes: load_balance_loss(z, routes.load),
    "gshard": lambda z, routes: gshard_loss(z, routes.experts),
    "global-load-balance": lambda z, routes: load_balance_loss(z, routes.load),
    "importance": lambda z, routes: importance_loss(z),
    "z-loss": lambda z, routes: z_loss(z),
}
PUBLISHED = {"load-balance": 0.01, "gshard": 0.01, "global-load-balance": 0.01, "importance": 0.005, "z-loss": 1e-3}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make(name, top_k=2, **options):
    return sinkroute.create_router(name, num_experts=6, top_k=top_k, **options)


# -- any router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("softmax", {}, id="softmax"),
        pytest.param("softmax", {"groups": 3, "top_groups": 2}, id="softmax in groups"),
        pytest.param("loss-free", {}, id="loss-free"),
        pytest.param("sinkhorn", {}, id="sinkhorn"),
        pytest.param("ssr-l", {"probability": 0.0, "noise": 1.0}, id="ssr-l by softmax"),
        pytest.param("ssr-l", {"probability": 1.0, "noise": 1.0}, id="ssr-l by plan"),
        pytest.param("ssr-s", {"probability": 1.0}, id="ssr-s by plan"),
        pytest.param("ssr-b", {"probability": 1.0}, id="ssr-b by plan"),
    ],
)
def test_any_router_takes_any_loss_of_its_logits_and_its_choices(name, options, loss):
    ours, theirs = random(30, 6).requires_grad_(), random(30, 6).requires_grad_()
    routes = make(name, losses=[loss], **options)(ours)
    expected = PUBLISHED[loss] * FUNCTIONS[loss](theirs, routes)
    torch.testing.assert_close(routes.aux_loss, expected)
    (routes.aux_loss + 0 * routes.weights.sum()).backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["softmax", "load-balance", "noisy", "v-moe-noise", "gshard", "ssr-l"])
def test_losses_add_up_with_each_other_and_with_those_of_the_method(name):
    logits_TE = random(30, 6)
    own = make(name)(logits_TE).aux_loss
    total = make(name, losses={"z-loss": 0.5, "importance": 2.0})(logits_TE).aux_loss
    expected = 0.5 * z_loss(logits_TE) + 2.0 * importance_loss(logits_TE) + (0 if own is None else own)
    if name == "v-moe-noise":  # has the importance loss itself: it was given another coefficient
        expected = expected - 0.005 * importance_loss(logits_TE)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_of_the_logits_only_where_the_gate_gives_more(loss):
    logits_TX = random(30, 12)  # of "noisy": logits, and widths of their noise
    total, own = (make("noisy", losses=losses)(logits_TX) for losses in ({loss: 1.0}, {}))
    torch.testing.assert_close(total.aux_loss - own.aux_loss, FUNCTIONS[loss](logits_TX[:, :6], own))


def test_a_loss_asked_for_replaces_the_coefficient_of_the_method_that_has_it():
    logits_TE = random(30, 6)
    routes = make("load-balance", losses={"load-balance": 0.5})(logits_TE)
    torch.testing.assert_close(routes.aux_loss, 0.5 * load_balance_loss(logits_TE, routes.load))


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_is_in_no_loss(loss):
    logits_TE, mask = random(9, 6), torch.arange(9) % 3 != 1
    garbage = torch.where(mask[:, None], logits_TE, float("nan"))
    padded = make("softmax", losses=[loss])(garbage, mask).aux_loss
    torch.testing.assert_close(padded, make("softmax", losses=[loss])(logits_TE[mask]).aux_loss)


@pytest.mark.parametrize("loss", sorted({"load-balance", "gshard", "global-load-balance", "importance"}))
def test_the_score_of_the_router_reaches_the_loss(loss):
    logits_TE = random(20, 6)
    shares_TE = torch.sigmoid(logits_TE) / torch.sigmoid(logits_TE).sum(1, keepdim=True)
    routes = make("softmax", score="sigmoid", losses={loss: 1.0})(logits_TE)
    # The softmax of their logarithms are the shares.
    torch.testing.assert_close(routes.aux_loss, FUNCTIONS[loss](shares_TE.log(), routes))


def test_no_loss_is_none_and_none_is_computed_when_serving():
    assert make("softmax")(random(4, 6)).aux_loss is None
    assert make("softmax", losses=list(LOSSES)).eval()(random(4, 6)).aux_loss is None


def test_the_global_loss_is_a_function_of_its_inputs_alone():
    assert LOSSES["global-load-balance"].function is global_load_balance_loss


# -- how they are asked for ------------------------------------------------------------------------------------------


def test_every_loss_has_its_published_coefficient():
    assert {name: loss.coefficient for name, loss in LOSSES.items()} == PUBLISHED


@pytest.mark.parametrize(
    "losses",
    [
        {"z-loss": 0.001, "load-balance": 0.02},
        {"z-loss": None, "load-balance": 0.02},
        "z-loss, load-balance: 0.02",
        " z-loss:1e-3 ,load-balance : 2e-2, ",
    ],
)
def test_losses_can_be_written_as(losses):
    assert read_losses(losses) == {"z-loss": 0.001, "load-balance": 0.02}
    assert list(read_losses(losses)) == ["z-loss", "load-balance"]


@pytest.mark.parametrize("losses", [["z-loss", "gshard"], ("z-loss", "gshard"), "z-loss, gshard"])
def test_names_alone_have_the_published_coefficient(losses):
    assert read_losses(losses) == {"z-loss": 0.001, "gshard": 0.01}


@pytest.mark.parametrize("losses", [(), [], {}, "", " "])
def test_nothing_is_no_loss(losses):
    assert read_losses(losses) == {}


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (["z-los"], ValueError, r"unknown loss 'z-los'; did you mean 'z-loss'\?"),
        ("balance: 0.1", ValueError, r"unknown loss 'balance'.*Known: .*gshard"),
        (
            {"z-loss": -0.1},
            ValueError,
            r"coefficient of z-loss must be .*0 or more, got -0\.1; 0\.001 is the",
        ),
        ("importance: nan", ValueError, r"coefficient of importance must be .*got nan; 0\.005 is"),
        ({"gshard": float("inf")}, ValueError, r"coefficient of gshard must be .*got inf"),
        ("gshard: much", ValueError, r"coefficient of gshard must be a number, got 'much'"),
        ({"gshard": "0.1"}, TypeError, r"coefficient of gshard must be a number, got '0\.1' \(str\)"),
        ({"gshard": True}, TypeError, r"coefficient of gshard must be a number, got True"),
    ],
)
def test_what_cannot_be_a_loss_is_refused_when_the_router_is_made(losses, error, message):
    with pytest.raises(error, match=message):
        make("softmax", losses=losses)
