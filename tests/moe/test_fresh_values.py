"""Layers whose values are made anew, as when a model comes from the meta device, start like layers that are made."""

import pytest
import torch
from torch import nn

import sinkroute
from sinkroute.routing.registry import router_options

D, HIDDEN, EXPERTS = 24, 8, 6
LEARNED = {"noise": "learned(0.7)"}
WAYS = {name: {} for name in sinkroute.list_routers()}
WAYS |= {
    f"{name} with {kind}": options
    for name in sinkroute.list_routers()
    for kind, options in (
        ("a bias of the gate", {"gate_bias": True}),
        ("learned noise", {"router_options": LEARNED}),
        ("an adaptive probability", {"router_options": {"probability": "adaptive"}}),
    )
    if (
        "probability" in router_options(name)
        if "router_options" in options
        else name not in ("xmoe", "stable-moe", "hash")
    )
}


def make(way, heads=None, device="cpu"):
    options = {"bias": True, "shared_hidden": 4, **WAYS[way]}
    if way in ("hash", "stable-moe"):
        options["router_options"] = {"vocab_size": 40}
    if way.startswith("smoe-dropout"):
        options["router_options"] = {"layer": 3}  # which it is drawn from
    torch.manual_seed(0)
    with torch.device(device):
        if heads is None:
            return sinkroute.MoE(D, HIDDEN, EXPERTS, 2, way.partition(" ")[0], **options)
        return sinkroute.MultiHeadMoE(D, heads, HIDDEN, EXPERTS, 2, way.partition(" ")[0], **options)


def filled_anew(layer):
    """Garbage in every tensor, then every module asked for its first values, as the tools do it: outermost first."""
    layer.to_empty(device="cpu")
    for value in (*layer.parameters(), *layer.buffers()):
        value.data.fill_(-3e19 if value.is_floating_point() else 2**40)
    torch.manual_seed(1)
    for part in layer.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return layer


def assert_alike(found, expected):
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        other = found.state_dict()[name]
        assert other.dtype == value.dtype and other.shape == value.shape, name
        if value.numel() == 1 or len(value.unique()) == 1:
            assert torch.equal(other, value), name  # a constant
        else:  # a draw of as many numbers
            assert other.std().item() == pytest.approx(value.std().item(), rel=0.45), name
            assert other.abs().max().item() == pytest.approx(value.abs().max().item(), rel=0.6), name


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_from_the_meta_device_starts_like_one_that_is_made(way):
    assert_alike(filled_anew(make(way, device="meta")), make(way))


@pytest.mark.parametrize("way", WAYS)
def test_a_multi_head_layer_from_the_meta_device_starts_like_one_that_is_made(way):
    assert_alike(filled_anew(make(way, heads=2, device="meta")), make(way, heads=2))


def test_the_maps_around_the_heads_keep_their_scale_when_they_are_reset():
    layer, fresh = filled_anew(make("softmax", heads=2, device="meta")), make("softmax", heads=2)
    for name in ("split", "merge"):
        found, expected = layer.get_submodule(name).weight, fresh.get_submodule(name).weight
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.06)
    assert not layer.merge.bias.any() and layer.split.bias.std() > 0.05


@pytest.mark.parametrize("value", [1e-3, 0.3, 800.0])
def test_learned_noise_starts_where_it_is_told(value):
    router = sinkroute.create_router("ssr-l", num_experts=4, top_k=2, noise=f"learned({value})", noise_scale="absolute")
    assert router.noise_std == pytest.approx(value, rel=1e-5)
    with torch.no_grad():
        router.raw_noise.fill_(5.0)
    router.reset_parameters()
    assert router.noise_std == pytest.approx(value, rel=1e-5)


def test_every_module_that_owns_a_tensor_can_reset_it():
    # What fully_shard and torchtitan demand of models that come from the meta device.
    for way in WAYS:
        for part in make(way, heads=2).modules():
            owns = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            assert not owns or hasattr(part, "reset_parameters"), (way, type(part))


# -- inference mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_was_made_in_inference_mode_can_be_trained(way, heads):
    with torch.inference_mode():
        layer = make(way, heads)
    assert not any(value.is_inference() for value in (*layer.parameters(), *layer.buffers()))
    ids = torch.arange(10)
    for step in range(3):
        sinkroute.set_step(layer, step, total_steps=10)
        layer(torch.randn(10, D), token_ids=ids).square().sum().backward()
    sinkroute.end_step(layer)
    with torch.inference_mode():  # a step that ends there
        sinkroute.set_step(layer, 3)
        layer(torch.randn(10, D), token_ids=ids)
        sinkroute.end_step(layer)
    sinkroute.set_step(layer, 4)
    layer(torch.randn(10, D), token_ids=ids).square().sum().backward()
    sinkroute.end_step(layer)


@pytest.mark.parametrize("name", sinkroute.list_routers())
def test_a_router_and_a_gate_that_were_made_in_inference_mode_can_be_trained(name):
    with torch.inference_mode():
        router = sinkroute.create_router(name, num_experts=4, top_k=2)
        gate = router.make_gate(D)
    assert not any(value.is_inference() for value in (*gate.parameters(), *gate.buffers()))
    for step in range(2):
        sinkroute.set_step(router, step, total_steps=10)
        logits_TE = torch.randn(9, 4) if name in ("hash", "stable-moe") else gate(torch.randn(9, D))
        if name == "stable-moe":
            logits_TE = gate(torch.randn(9, D), torch.arange(9))
        loss = router(logits_TE).weights.square().sum()
        if loss.requires_grad:
            loss.backward()
    sinkroute.end_step(router)


def test_a_bias_that_is_folded_into_a_gate_in_inference_mode_can_be_trained():
    router = sinkroute.create_router("ssr-bias", num_experts=4, top_k=2)
    gate = nn.Linear(D, 4, bias=False)
    with torch.inference_mode():
        router.fold_into(gate)
    gate(torch.randn(2, D)).sum().backward()
    assert gate.bias.grad.tolist() == [2.0] * 4
