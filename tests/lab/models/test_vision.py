"""The vision transformer: the published backbone to the last parameter, with mixtures in its later blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import sinkroute
from sinkroute.lab.config import Config, RouterConfig, VisionConfig
from sinkroute.lab.models import VisionTransformer, make_model
from sinkroute.lab.training import _parameter_groups

SMALL = VisionConfig(
    image_size=12, channels=3, classes=7, patch=4, layers=3, d_model=24, heads=3, d_hidden=40, moe_from=1, experts=4
)
IMAGES = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def vision(router: str = "softmax", config: VisionConfig = SMALL, **options: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config, RouterConfig(router, dict(options)))


def shaken(model: VisionTransformer) -> VisionTransformer:
    """With random numbers in every parameter, so that a missing bias or gain shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# -- sizes --


def test_the_dense_backbone_has_the_published_parameters() -> None:
    # DeiT-Ti/16 with 1000 classes: 5,717,416 (5.7M in the paper's table 1).
    with torch.device("meta"):
        count = vision(config=VisionConfig(moe_from=12)).count_parameters()
    assert count == (5_717_416, 5_717_416, 0)


@pytest.mark.parametrize("experts", [8, 16])
def test_mixtures_add_their_experts_and_a_gate_without_bias(experts: int) -> None:
    # A dense layer: 192 → 768 → 192 with biases, 295,872 numbers. Six of them become `experts` and a gate of 192 each.
    dense = 2 * 192 * 768 + 768 + 192
    with torch.device("meta"):
        count = vision(config=VisionConfig(experts=experts)).count_parameters()
    assert count.per_moe == experts * (dense + 192)
    assert count.total == 5_717_416 + 6 * (experts * (dense + 192) - dense)
    assert count.active == 5_717_416 + 6 * (2 * dense + experts * 192 - dense)


# -- the forward pass, against modules that are not ours --


def test_without_mixtures_it_is_the_vit_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        num_labels=7,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    ours = shaken(vision(config=replace(SMALL, moe_from=3))).eval()
    theirs.load_state_dict(_as_transformers(ours.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, atol=1e-5, rtol=1e-5)


def _as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "patches": "vit.embeddings.patch_embeddings.projection",
        "attention_norm": "layernorm_before",
        "attention.out": "attention.o_proj",
        "mlp_norm": "layernorm_after",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    out = {
        "vit.embeddings.cls_token": state.pop("class_D")[None, None],
        "vit.embeddings.position_embeddings": state.pop("positions_ND")[None],
    }
    for name, tensor in state.items():
        block, _, inner = name.partition(".")[2].partition(".") if name.startswith("blocks.") else ("", "", name)
        part, _, kind = inner.rpartition(".")
        prefix = f"vit.layers.{block}." if block else ""
        if part == "attention.qkv":
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{prefix}attention.{letter}_proj.{kind}"] = third
        else:
            out[f"{prefix}{names[part]}.{kind}"] = tensor
    return out


def test_a_mixture_of_one_expert_is_the_dense_layer() -> None:
    dense = shaken(vision(config=replace(SMALL, moe_from=3)))
    sparse = vision(config=replace(SMALL, moe_from=1, experts=1, top_k=1))
    state = dense.state_dict()
    for block in (1, 2):
        prefix = f"blocks.{block}.mlp"
        for theirs, ours in (("0.weight", "w_in"), ("0.bias", "b_in"), ("2.weight", "w_out"), ("2.bias", "b_out")):
            state[f"{prefix}.experts.{ours}"] = state.pop(f"{prefix}.{theirs}")[None]
        state[f"{prefix}.gate.weight"] = torch.randn(1, 24)
    sparse.load_state_dict(state)
    torch.testing.assert_close(sparse.eval()(IMAGES), dense.eval()(IMAGES))


def test_the_class_token_is_routed_like_the_patches() -> None:
    model = vision().eval()
    model(IMAGES)
    # 5 images of 3 × 3 patches and a class token, top-2.
    assert [int(layer.routes.load.sum()) for layer in model.moe_layers] == [5 * 10 * 2] * 2


def test_images_do_not_see_each_other() -> None:
    model = shaken(vision()).eval()
    alone = torch.cat([model(image[None]) for image in IMAGES])
    torch.testing.assert_close(model(IMAGES), alone, atol=1e-5, rtol=1e-5)


# -- training --


def test_branches_are_dropped_for_whole_samples_and_more_so_with_depth() -> None:
    model = vision(config=replace(SMALL, drop_path=0.4))
    assert [block.drop_path for block in model.blocks] == [0.0, pytest.approx(0.2), 0.4]
    branch = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    kept = model.blocks[2].train()._kept(branch)
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    # Dropped, or larger by 1 / (1 − 0.4), so that the mean stays.
    assert torch.equal(kept.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert (kept == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)  # 4 standard errors
    assert torch.equal(model.blocks[2].eval()._kept(branch), branch)


def test_without_drop_path_training_and_serving_are_the_same_function() -> None:
    model = shaken(vision(config=replace(SMALL, drop_path=0.0)))
    torch.testing.assert_close(model.train()(IMAGES), model.eval()(IMAGES))


def test_initial_weights_are_those_of_deit() -> None:
    model = vision(config=VisionConfig(layers=2, moe_from=1))
    maps = [model.head, model.blocks[0].attention.qkv, model.blocks[0].mlp[0]]
    experts = model.moe_layers[0].experts
    for weight in (model.positions_ND, *(part.weight for part in maps), experts.w_in, experts.w_out):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    for bias in (*(part.bias for part in maps), experts.b_in, experts.b_out):
        assert not bias.any()
    assert model.moe_layers[0].gate.bias is None


def test_places_class_token_biases_and_gains_are_kept_from_weight_decay() -> None:
    model = vision()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in _parameter_groups(model, 0.05))
    assert {"positions_ND", "class_D", "head.bias", "norm.weight", "blocks.1.mlp.experts.b_in"} <= kept
    assert {"patches.weight", "head.weight", "blocks.1.mlp.experts.w_in", "blocks.1.mlp.gate.weight"} <= decayed
    assert all(name.endswith(("weight", "w_in", "w_out")) and "norm" not in name for name in decayed)


def test_a_loss_reaches_every_parameter() -> None:
    model = vision()
    model(IMAGES).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_all_methods_start_from_the_same_weights() -> None:
    first = vision("softmax").state_dict()
    for name in ("load-balance", "sinkhorn", "ssr-l", "ssr-s"):
        other = vision(name).state_dict()
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("router", sinkroute.list_routers())
def test_every_router_trains_a_step(router: str) -> None:
    model = vision(router)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    labels, losses = torch.tensor([0, 1, 2, 3, 4]), []
    for step in range(2):
        sinkroute.set_step(model, step, total_steps=100)
        loss = torch.nn.functional.cross_entropy(model(IMAGES), labels)
        auxiliary = model.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    sinkroute.end_step(model)
    assert model.eval()(IMAGES).isfinite().all()


def test_autocast_changes_scores_by_rounding_only() -> None:
    model = shaken(vision()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(IMAGES)
    exact = model(IMAGES)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_a_configuration_makes_it_by_its_name() -> None:
    model = make_model(Config(seed=3, model=SMALL, router=RouterConfig("ssr-s")))
    assert isinstance(model, VisionTransformer)
    assert [layer.router.seed for layer in model.moe_layers] == [3, 3]


# -- bad input --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 5}, "image_size=12 must be a multiple of patch=5"),
        ({"heads": 5}, "d_model=24 must be a multiple of heads=5"),
        ({"layers": 0, "moe_from": 0}, "layers must be 1 or more, got 0"),
        ({"classes": 1}, "classes must be 2 or more, got 1"),
        ({"moe_from": 4}, r"moe_from must be from 0 to layers=3 \(no mixture at all\), got 4"),
        ({"drop_path": 1.0}, "drop_path must be 0 or more and below 1, got 1.0"),
        ({"top_k": 5}, "top_k must be between 1 and num_experts=4, got 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vision(config=replace(SMALL, **change))


@pytest.mark.parametrize("shape", [(2, 1, 12, 12), (2, 3, 16, 16), (3, 12, 12)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 12, 12\), got"):
        vision()(torch.zeros(shape))
