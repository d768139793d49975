"""The presets at full size: strict, exact to the last parameter, and listed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from sinkroute.cli import main
from sinkroute.lab.config import Config, find_preset, read_yaml, training_presets
from sinkroute.lab.models import make_model
from sinkroute.lab.models.listing import list_models
from sinkroute.moe import MultiHeadMoE

FAMILY = [
    "wikitext103-small",
    "wikitext103-medium",
    "wikitext103-large",
    "wikitext103-glam",
    "enwik8-small",
    "enwik8-medium",
]


@pytest.fixture(scope="module")
def models() -> dict:
    return {model.name: model for model in list_models()}


def preset(name: str) -> Config:
    return read_yaml(Config, find_preset(name))


@pytest.mark.parametrize(
    ("name", "total"),
    [("wikitext103-small", 70_603_015), ("wikitext103-medium", 215_679_863), ("wikitext103-large", 388_149_911)],
)
def test_models_of_wikitext_103_have_the_published_parameters(models: dict, name: str, total: int) -> None:
    assert models[name].total == models[f"{name}-2h"].total == total


def test_a_mixture_of_the_medium_model_has_the_published_parameters_plain_and_with_two_heads(models: dict) -> None:
    assert models["wikitext103-medium"].per_moe == models["wikitext103-medium-2h"].per_moe == 3_981_840
    assert preset("wikitext103-medium-2h").model.d_hidden == 660


@pytest.mark.parametrize(("name", "millions"), [("enwik8-small", 15.3), ("enwik8-medium", 36.1)])
def test_models_of_enwik8_have_the_published_parameters_as_rounded(models: dict, name: str, millions: float) -> None:
    assert round(models[name].total / 1e6, 1) == round(models[f"{name}-2h"].total / 1e6, 1) == millions


@pytest.mark.parametrize("name", FAMILY)
def test_two_heads_are_as_large_as_the_plain_mixture_and_change_nothing_else(models: dict, name: str) -> None:
    plain, heads = preset(name), preset(f"{name}-2h")
    width = plain.model.d_model
    assert heads.model.d_hidden == MultiHeadMoE.parity_hidden(width, 2, width, 16, "relu", bias=True)
    assert models[name].per_moe == models[f"{name}-2h"].per_moe
    heads.model.d_hidden, heads.model.sub_tokens = plain.model.d_hidden, 1
    assert heads == plain


def stream_parameters(config: Config) -> int:
    """By hand: embedding, output and its bias; positions; of a block attention, three norms, mixture and its norm."""
    model = config.model
    d, heads, experts, hidden = model.d_model, model.sub_tokens, model.experts, model.d_hidden
    width = d // heads
    mixture = experts * (2 * width * hidden + hidden + width) + experts * (width + 1)
    mixture += 2 * (d * d + d) if heads > 1 else 0  # split and merge
    outside = 2 * model.vocab * d + model.vocab + d // model.heads * model.span
    dense = 4 * d * d + 3 * 2 * d + 2 * (d * d + d) if model.dense_blocks else 0
    return outside + model.layers * (4 * d * d + 3 * 2 * d + mixture + 2 * d + dense)


HEADS = [(name, heads) for name in FAMILY for heads in (4, 6, 8) if heads != 6 or name == "enwik8-small"]


@pytest.mark.parametrize(("name", "heads"), HEADS, ids=[f"{name}-{heads}h" for name, heads in HEADS])
def test_more_heads_are_as_large_as_a_whole_number_makes_them_and_change_nothing_else(
    models: dict, name: str, heads: int
) -> None:
    plain, many = preset(name), preset(f"{name}-{heads}h")
    listed = models[f"{name}-{heads}h"]
    assert listed.total == stream_parameters(many)
    one_more = (many.model.d_model // heads * 2 + 1) * 16  # 16 experts, each a number wider
    assert abs(listed.per_moe - models[name].per_moe) <= one_more / 2
    assert abs(listed.per_moe / models[name].per_moe - 1) < 6e-4
    many.model.d_hidden, many.model.sub_tokens = plain.model.d_hidden, 1
    assert many == plain
    assert stream_parameters(plain) == models[name].total


def test_six_heads_exist_where_they_divide_the_width() -> None:
    assert [name for name in FAMILY if preset(name).model.d_model % 6 == 0] == ["enwik8-small"]


@pytest.mark.parametrize(("sizes", "total"), [("14x640", 550_072_759), ("12x672", 555_811_671)])
def test_two_readings_of_550m_are_the_large_model_in_another_size(models: dict, sizes: str, total: int) -> None:
    large, reading = preset("wikitext103-large"), preset(f"wikitext103-550m-{sizes}")
    assert models[f"wikitext103-550m-{sizes}"].total == stream_parameters(reading) == total
    layers, width = map(int, sizes.split("x"))
    assert (reading.model.layers, reading.model.d_model, reading.model.d_hidden) == (layers, width, width)
    for key in ("layers", "d_model", "d_hidden"):
        setattr(reading.model, key, getattr(large.model, key))
    assert reading == large


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_trains_as_published(name: str) -> None:
    config = preset(name)
    model, train = config.model, config.train
    assert (model.heads, model.experts, model.top_k, model.d_hidden) == (8, 16, 2, model.d_model)
    assert (train.weight_decay, train.clip, train.beta2, train.schedule) == (0, None, 0.999, "constant")
    # layers, width, block, span, dropout, learning rate, warm-up, steps, batch
    published = {
        "wikitext103-small": (3, 128, 256, 256, 0.7, 7e-4, 3000, 60_000, 96),
        "wikitext103-medium": (6, 352, 512, 1024, 0.1, 7e-4, 4000, 80_000, 48),
        "wikitext103-large": (12, 512, 1024, 2048, 0.1, 7e-4, 5000, 80_000, 24),
        "wikitext103-glam": (6, 352, 512, 2048, 0.1, 7e-5, 4000, 120_000, 48),
        "enwik8-small": (6, 264, 512, 2048, 0.1, 7e-4, 3000, 60_000, 48),
        "enwik8-medium": (8, 352, 512, 2048, 0.1, 7e-4, 4000, 80_000, 48),
    }
    sizes = (model.layers, model.d_model, config.data.length, model.span, model.dropout)
    assert (*sizes, train.lr, train.warmup, train.steps, train.batch) == published[name]


def test_the_vision_transformer_trains_by_the_recipe_of_deit(models: dict) -> None:
    from sinkroute.lab.images import DEIT

    config = preset("imagenet-vit-ti16")
    train, epoch = config.train, 1_281_167 // config.train.batch
    assert config.data.augment == DEIT
    assert train.lr == pytest.approx(5e-4 * train.batch / 512)
    assert train.lr * train.final_lr == pytest.approx(1e-5)
    assert (train.warmup, train.steps) == (5 * epoch, 100 * epoch)
    assert (train.weight_decay, train.clip, config.model.drop_path) == (0.05, None, 0.1)
    assert models["imagenet-vit-ti16"].total == 18_153_256  # by hand in test_vision.py


def test_every_preset_is_built_without_memory_and_listed(models: dict) -> None:
    assert set(models) == set(training_presets())
    for name, listed in models.items():
        config = preset(name)
        with torch.device("meta"):
            model = make_model(config)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert listed.total == sum(parameter.numel() for parameter in model.parameters())
        # Eight heads of two choices may meet all of 16 experts.
        everything = listed.sub_tokens * listed.top_k >= listed.experts
        assert listed.active == listed.total if everything else listed.active < listed.total
        assert listed.steps == config.train.steps


def test_a_step_reads_as_many_tokens_as_the_batch_holds(models: dict) -> None:
    assert models["wikitext103-medium"].tokens_per_step == 48 * 512
    assert models["imagenet-vit-ti16"].tokens_per_step == 1024 * 197  # 14 × 14 patches and the class token


def test_the_command_prints_a_table_of_what_is_named(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for columns in ("80", "124"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["models", "wikitext103-medium", "wikitext103-medium-2h"]) == 0
        shown[columns] = capsys.readouterr().out
    for part in ("wikitext103-medium-2h", "215,679,863", "194,804,855", "3,981,840", "2 of 16 2h", "6×352"):
        assert part in shown["80"]
    assert "80,000 × 24,576" in shown["124"]
    assert "enwik8" not in shown["124"]


def test_the_command_prints_json(capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "enwik8-small", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["kind"], found["total"], found["sub_tokens"]) == (
        "enwik8-small",
        "stream",
        15_319_165,
        1,
    )


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["models", "wikitext104"]) == 1
    assert "no configuration at wikitext104" in capsys.readouterr().err.replace("\n", " ")


def test_help_is_told(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sinkroute"])
    with pytest.raises(SystemExit) as stopped:
        main(["models", "--help"])
    assert stopped.value.code == 0
    assert "exact parameter counts" in capsys.readouterr().out
