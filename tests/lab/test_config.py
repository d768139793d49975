"""Configurations are read strictly: what is misspelt or mistyped is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkroute.lab.config import (
    Config,
    DataConfig,
    ModelConfig,
    RouterConfig,
    StreamConfig,
    TrainConfig,
    VisionConfig,
    differences,
    find_preset,
    from_mapping,
    parse_scalar,
    preset_folder,
    read_yaml,
    write_yaml,
)
from sinkroute.lab.study.cells import configuration_hash, expand
from sinkroute.lab.study.config import common_config, read_study


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    config = from_mapping(
        Config,
        {
            "seed": 3,
            "router": {"name": "ssr-l", "options": {"probability": 0.25, "draw": "layer", "max_passes": None}},
            "train": {"trackers": ["tensorboard"], "precision": "bf16"},
            "eval": {"attacks": {}},
        },
    )
    write_yaml(config, tmp_path / "c.yaml")
    assert read_yaml(Config, tmp_path / "c.yaml") == config


def test_missing_keys_keep_their_defaults() -> None:
    assert from_mapping(Config, {}) == Config()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"train": {"stepz": 5}}, "unknown key in train 'stepz'; did you mean 'steps'"),
        ({"trian": {}}, "unknown key in configuration 'trian'; did you mean 'train'"),
        ({"train": {"steps": "many"}}, r"train\.steps must be int, got 'many' \(str\)"),
        ({"train": {"steps": True}}, r"train\.steps must be int, got True \(bool\)"),
        ({"train": {"lr": [1]}}, r"train\.lr must be float"),
        ({"train": {"precision": "bf61"}}, "unknown value of train.precision: 'bf61'; did you mean 'bf16'"),
        ({"train": 7}, "train must be a mapping"),
        ({"train": {"steps": 0}}, r"train\.steps must be 1 or more, got 0"),
        ({"train": {"batch": 5, "accumulation": 2}}, r"train\.batch=5 must be a multiple of train\.accumulation=2"),
        ({"train": {"clip": 0}}, r"train\.clip must be a finite number above 0, got 0"),
        ({"train": {"beta2": 2.0}}, r"train\.beta2 must be 0 or more and below 1, got 2"),
        ({"train": {"trackers": ["tensorbord"]}}, "did you mean 'tensorboard'"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"train": {"average": 1.0}}, r"train\.average must be above 0 and below 1, got 1"),
        ({"train": {"schedule": "linear"}}, r"unknown value of train\.schedule: 'linear'"),
        ({"eval": {"limit": 0}}, r"eval\.limit must be 1 or more, got 0"),
        ({"eval": {"inference": ["noize"]}}, r"unknown value of eval\.inference\[0\]: 'noize'; did you mean 'noise'"),
        ({"model": {"name": "streem"}}, r"unknown value of model\.name: 'streem'; did you mean 'stream'"),
        ({"model": {"name": "stream", "shared_hidden": 4}}, "unknown key in model 'shared_hidden'"),
        ({"model": {"span": 64}}, "unknown key in model 'span'"),
        ({"model": {"name": "vit", "vocab": 256}}, "unknown key in model 'vocab'"),
        ({"model": {"name": ["vit"]}}, r"unknown value of model\.name: "),
        ({"model": "vit"}, "model must be a mapping"),
        ({"train": {"lr": True}}, r"train\.lr must be float, got True \(bool\)"),
        ({"train": {"lr": float("inf")}}, r"train\.lr must be a finite number above 0, got inf"),
        ({"train": {"trackers": "wandb"}}, r"train\.trackers must be tuple, got 'wandb' \(str\)"),
        ({"model": {"dense_blocks": 1, "name": "stream"}}, r"model\.dense_blocks must be bool, got 1 \(int\)"),
        ({"data": {"augment": {"flip": 2}}}, r"data\.augment\.flip must be from 0 to 1, got 2"),
        ({"router": {"options": {"reg": [1]}}}, r"router\.options\.reg must be a number, a word, .* got \[1\]"),
        ({"eval": {"attacks": {"word-swap": 5}}}, r"eval\.attacks\.word-swap must be a mapping"),
        ({5: {}}, "unknown key in configuration 5"),
        ({"router": {"options": {None: 1}}}, "router.options.None must be str, got None"),
        ({"train": {"lr": -1.0}}, r"train\.lr must be a finite number above 0, got -1"),
    ],
)
def test_a_wrong_value_is_named_with_its_dotted_key(mapping: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_mapping(Config, mapping)


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: {stepz: 5}")
    with pytest.raises(ValueError, match=r"bad\.yaml: unknown key in train 'stepz'"):
        read_yaml(Config, tmp_path / "bad.yaml")


@pytest.mark.parametrize("text", ["", "# train: {steps: 5}\n"])
def test_a_file_that_says_nothing_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"empty\.yaml is empty; write"):
        read_yaml(Config, tmp_path / "empty.yaml")


def test_an_option_of_a_router_at_the_wrong_level_is_sent_to_the_right_one() -> None:
    with pytest.raises(ValueError, match=r"router 'probability'.*belongs under options: .*options: {probability: "):
        from_mapping(Config, {"router": {"name": "ssr-l", "probability": 0.1}})


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        from_mapping(Config, {"train": {"lr": -1, "stepz": 5}, "model": {"name": "vit", "heads": 0}})
    told = str(error.value).splitlines()
    assert [line.split(",")[0].split(";")[0] for line in told] == [
        "model.heads must be 1 or more",
        "train.lr must be a finite number above 0",
        "unknown key in train 'stepz'",
    ]


def test_sections_made_in_python_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"^train\.lr must be a finite number above 0, got -1$"):
        TrainConfig(lr=-1)
    with pytest.raises(ValueError, match=r"train\.batch=5 must be a multiple"):
        Config(train=TrainConfig(batch=5, accumulation=2))
    with pytest.raises(ValueError, match=r"^router\.options\.reg must be a number, a word, true or false, got \[1\]"):
        RouterConfig("ssr-s", {"reg": [1]})  # type: ignore[dict-item]
    for args, values in ((("ssr-s", {}, 3), {}), (("ssr-s",), {"name": "ssr-l"})):
        with pytest.raises(TypeError, match="takes one value for each of name, options"):
            RouterConfig(*args, **values)  # type: ignore[arg-type]


def test_words_that_look_like_numbers_stay_words_where_words_are_meant() -> None:
    assert from_mapping(DataConfig, {"path": "2024"}).path == "2024"


def test_what_is_no_yaml_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: {steps: 5")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        read_yaml(Config, tmp_path / "bad.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("label: !!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not YAML"):
        read_yaml(Config, tmp_path / "evil.yaml")


def test_a_preset_is_found_whatever_lies_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert find_preset("demo").name == "demo.yaml"
    with pytest.raises(ValueError, match="is a folder"):
        read_yaml(Config, find_preset("./demo"))


def test_what_is_not_utf_8_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"label: \xff")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        read_yaml(Config, tmp_path / "bad.yaml")


def test_a_missing_file_is_answered_with_the_presets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wikipedia-ssr"):
        read_yaml(Config, tmp_path / "none.yaml")


def test_numbers_with_exponents_are_numbers_wherever_they_stand() -> None:
    # YAML 1.1, which PyYAML reads, takes 1e-3 for a string.
    config = from_mapping(Config, {"train": {"lr": "1e-3"}, "router": {"options": {"probability": "1e-3"}}})
    assert config.train.lr == 1e-3
    assert config.router.options == {"probability": 1e-3}
    assert parse_scalar("1e-3") == 1e-3


def test_a_bare_no_in_yaml_means_no_autocast() -> None:
    assert from_mapping(TrainConfig, {"precision": False}).precision == "no"


@pytest.mark.parametrize(("name", "kind"), [("decoder", ModelConfig), ("stream", StreamConfig), ("vit", VisionConfig)])
def test_the_kinds_of_model_are_told_apart_by_their_name(name: str, kind: type, tmp_path: Path) -> None:
    config = from_mapping(Config, {"model": {"name": name, "layers": 3}})
    assert type(config.model) is kind and config.model.layers == 3
    write_yaml(config, tmp_path / "c.yaml")
    assert read_yaml(Config, tmp_path / "c.yaml") == config


def test_a_model_without_a_name_is_the_decoder_as_in_earlier_runs() -> None:
    assert from_mapping(Config, {"model": {"layers": 3}}).model == ModelConfig(layers=3)


def test_another_kind_of_model_is_another_configuration() -> None:
    decoder, stream = (from_mapping(Config, {"model": {"name": name}}) for name in ("decoder", "stream"))
    assert "model.name: 'decoder' → 'stream'" in differences(decoder, stream)


def test_differences_name_dotted_keys_old_and_new() -> None:
    new = Config(seed=1, data=DataConfig(length=64))
    assert differences(Config(), new) == ["seed: 0 → 1", "data.length: 128 → 64"]


def test_every_preset_can_be_read() -> None:
    folder = find_preset("demo").parent
    presets = {path.stem: path.read_text() for path in folder.glob("*.yaml")}
    assert {"demo", "selective", "wikipedia-ssr", "wikipedia-stream"} <= set(presets)
    for name, text in presets.items():
        if "\nmethods:" in text:
            assert expand(find_preset(name), read_study(find_preset(name))).cells
        else:
            read_yaml(Config, find_preset(name))


# As they were on the day before the settings were pydantic's: runs of that day are continued.
HASHES = {
    "default": "da7a20aa961d14b2",
    "digits-vit": "893d00a13d1727b9",
    "enwik8-small": "ba2d60c163ffe7c7",
    "imagenet-vit-ti16": "2922064089b407b4",
    "mnist5k-vit": "03d2a5fe3eab52bb",
    "wikipedia-ssr": "8e6571cdb88911f9",
    "wikipedia-stream": "7ccca1e5a734db5c",
    "wikitext103-glam": "a99dd321b429c701",
    "wikitext103-small-2h": "e0486c5d486e77f4",
    "study/dual/vanilla-seed20": "150dbe10035083b9",
    "study/dual-shift/vanilla-seed50": "7ce12a7e782b2958",
    "study/vision/vanilla-seed0": "e8e0438b1350725f",
    "study/paper-lm-words/vanilla-seed0": "0f7a2a2fda179240",
    "study/ablation-p/vanilla-seed0": "8ea8d8aa67300d5d",
}


@pytest.mark.parametrize("name", HASHES)
def test_the_hash_by_which_earlier_runs_are_found_again_stays(name: str) -> None:
    if "/" in name:
        folder, study, cell = name.split("/")
        path = preset_folder() / folder / f"{study}.yaml"
        found = next(each.hash for each in expand(path, read_study(path)).cells if each.name == cell)
    else:
        found = configuration_hash(Config() if name == "default" else read_yaml(Config, find_preset(name)))
    assert found.startswith(HASHES[name])


def test_every_router_of_a_comparison_can_be_made() -> None:
    from sinkroute.routing import create_router

    for preset in ("demo", "selective"):
        for cell in expand(find_preset(preset), read_study(find_preset(preset))).cells:
            create_router(cell.config.router.name, num_experts=8, top_k=2, **cell.config.router.options)


def test_the_demo_compares_six_methods_and_ssr_makes_at_least_twenty_plans() -> None:
    from sinkroute.routing import create_router, set_step

    demo = read_study(find_preset("demo"))
    assert list(demo.methods) == ["softmax", "load-balance", "loss-free", "quantile", "ssr-l", "ssr-dual"]
    assert demo.methods["load-balance"]["router"]["options"] == {"coefficient": 0.01}
    router = create_router("ssr-l", num_experts=8, top_k=2, **demo.methods["ssr-l"]["router"]["options"])
    drawn = 0
    for step in range(common_config(demo, find_preset("demo")).train.steps):
        set_step(router, step)
        drawn += router.draw_uniform("branch", per_layer=False) < router.probability
    assert drawn >= 20
