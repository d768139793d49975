"""Masks and ids of a wrong form are refused by their name, by whatever public function they are given to."""

import pytest
import torch

import sinkroute
from sinkroute.routing.beside import kind_of
from sinkroute.routing.expert_side import take_best_tokens
from sinkroute.routing.losses.gshard import gshard_loss
from sinkroute.routing.losses.importance import importance_loss
from sinkroute.routing.losses.load_balance import load_balance_loss
from sinkroute.routing.losses.z_loss import z_loss
from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.routers.noisy import smooth_load_loss
from sinkroute.routing.routers.quantile import balancing_quantile

T, E, K, D = 5, 4, 2, 8
LOGITS_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
EXPERTS_TK = LOGITS_TE.topk(K).indices
LOAD_E = EXPERTS_TK.flatten().bincount(minlength=E)

OF_MASKS = {
    "mean_over_tokens": lambda mask: mean_over_tokens(LOGITS_TE, mask),
    "load_balance_loss": lambda mask: load_balance_loss(LOGITS_TE, LOAD_E, mask),
    "gshard_loss": lambda mask: gshard_loss(LOGITS_TE, EXPERTS_TK, mask),
    "importance_loss": lambda mask: importance_loss(LOGITS_TE, mask),
    "z_loss": lambda mask: z_loss(LOGITS_TE, mask),
    "smooth_load_loss": lambda mask: smooth_load_loss(LOGITS_TE, LOGITS_TE + 1, torch.ones(T, E), K, mask),
    "take_best_tokens": lambda mask: take_best_tokens(LOGITS_TE, K, mask, K),
    "balancing_quantile": lambda mask: balancing_quantile(LOGITS_TE, K / E, mask),
    "MoE": lambda mask: sinkroute.MoE(D, D, E, K, "softmax")(torch.zeros(T, D), mask),
    "MultiHeadMoE": lambda mask: sinkroute.MultiHeadMoE(D, 2, D, E, K, "softmax")(torch.zeros(T, D), mask),
}
MASKS = {
    "list": ([True] * T, TypeError, r"\(list\); use torch\.as_tensor"),
    "text": ("x", TypeError, r"got 'x' \(str\); use torch\.as_tensor"),
    "number": (1, TypeError, r"got 1 \(int\); use torch\.as_tensor"),
    "floats": (torch.ones(T), TypeError, r"got torch\.float32; use mask\.bool"),
    "one for all": (torch.ones(1, dtype=torch.bool), ValueError, r"shape \(5,\), one entry per token, got \(1,\)"),
    "sparse": (torch.ones(T, dtype=torch.bool).to_sparse(), TypeError, r"pass token_mask\.to_dense"),
}


@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("name", OF_MASKS)
def test_a_mask_of_a_wrong_form_is_refused_by_name(name, what):
    mask, error, message = MASKS[what]
    with pytest.raises(error, match=rf"token_mask .*{message}"):
        OF_MASKS[name](mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_every_router_refuses_a_mask_of_a_wrong_form_by_name(name, what, training):
    mask, error, message = MASKS[what]
    with pytest.raises(error, match=rf"token_mask .*{message}"):
        sinkroute.create_router(name, num_experts=E, top_k=K).train(training)(LOGITS_TE, mask)


class Named(torch.Tensor):
    """A plain tensor by another name."""


def test_routes_are_plain_tensors_whatever_the_mask_is_called():
    mask = torch.tensor([True, False, True, True, True])
    router = sinkroute.create_router("softmax", num_experts=E, top_k=K)
    routes = router(LOGITS_TE, mask.as_subclass(Named))
    assert {type(routes.weights), type(routes.load), type(routes.chosen)} == {torch.Tensor}
    assert torch.equal(routes.weights, router(LOGITS_TE, mask).weights)


@pytest.mark.parametrize("name", ["hash", "stable-moe"])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1] * T, TypeError, r"must be an integer tensor, got \[1, .*\(list\)"),
        ("x", TypeError, r"must be an integer tensor, got 'x' \(str\)"),
        (torch.ones(T), TypeError, r"must be an integer tensor, got a tensor of torch\.float32"),
        (torch.ones(1, dtype=torch.int64), ValueError, r"must have shape \(5,\) like x, got \(1,\)"),
        (torch.ones(T, dtype=torch.int64).to_sparse(), TypeError, r".*pass token_ids\.to_dense"),
    ],
)
def test_a_gate_refuses_ids_of_a_wrong_form_by_name(name, ids, error, message):
    gate = sinkroute.create_router(name, num_experts=E, top_k=K).make_gate(D)
    with pytest.raises(error, match=rf"token_ids .*{message}"):
        gate(torch.zeros(T, D), ids)
    layer = sinkroute.MoE(D, D, E, K, name)
    with pytest.raises(error, match=rf"token_ids .*{message}"):
        layer(torch.zeros(T, D), token_ids=ids)


def test_counts_that_are_no_tensor_are_refused_by_name():
    gate = sinkroute.create_router("hash", num_experts=E, top_k=K).make_gate(D)
    with pytest.raises(
        TypeError, match=r"token_counts must be a tensor of counts, got \[5, 1\] \(list\); use torch\.as"
    ):
        gate.balance([5, 1])


def test_an_error_about_a_long_list_is_short():
    assert len(kind_of([True] * 100_000)) < 100
