"""What is not a checkpoint that can be read is refused by name, and nothing of it is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sinkroute.lab.inspect import InspectError, inspect_checkpoint

Save = Callable[..., Path]


@pytest.fixture
def folder(save: Save, tmp_path: Path) -> Path:
    return Path(shutil.copytree(save("mixtral"), tmp_path / "checkpoint"))


def reconfigure(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def refusal(folder: Path | str, text: Path, by_layer: bool = False) -> str:
    with pytest.raises(InspectError) as found:
        inspect_checkpoint(str(folder), text, tokens=40, length=10, by_layer=by_layer)
    return str(found.value)


@pytest.mark.parametrize("by_layer", [False, True])
def test_torch_pickles_are_refused(folder: Path, text: Path, by_layer: bool) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = refusal(folder, text, by_layer)
    assert "no safetensors but torch pickles (pytorch_model.bin, ...), which can run anything" in message


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, -100), slice(9, None)], ids=["empty", "cut", "garbage"])
def test_a_damaged_file_of_weights_is_named(folder: Path, text: Path, kept: slice, by_layer: bool) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[kept])
    assert f"{path} is no whole file of safetensors; copy or download it again: " in refusal(folder, text, by_layer)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    ("index", "cause"), [("{}", "KeyError: 'weight_map'"), ("{", "JSONDecodeError"), ('{"weight_map": [1]}', "values")]
)
def test_an_index_that_is_none_is_refused(folder: Path, text: Path, index: str, cause: str, by_layer: bool) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    message = refusal(folder, text, by_layer)
    assert f"the index of {str(folder)!r}, model.safetensors.index.json, cannot be read" in message
    assert cause in message


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    ("values", "failure", "cause"),
    [
        ({"dtype": "banana"}, "the configuration of {} cannot be read", "no attribute 'banana'"),
        ({"num_local_experts": "eight"}, "the configuration of {} cannot be read", "expected int, got str"),
        ({"hidden_act": "banana"}, "{} cannot be loaded", "KeyError: 'banana'"),
        ({"num_local_experts": 4}, "the weights of {} do not fit the model", "mlp.gate.weight"),
        ({"num_experts_per_tok": 99}, "{} cannot be run", "out of range"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_the_cause(
    folder: Path, text: Path, values: dict[str, object], failure: str, cause: str, by_layer: bool
) -> None:
    reconfigure(folder, **values)
    message = refusal(folder, text, by_layer)
    assert failure.format(repr(str(folder))) in message
    assert cause in message


def test_a_quantiser_that_is_not_installed_is_named(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: False)
    reconfigure(folder, quantization_config={"quant_method": "awq"})
    message = refusal(folder, text)
    assert f"{str(folder)!r} cannot be loaded: ImportError: " in message
    assert "gptqmodel" in message


@pytest.mark.parametrize("by_layer", [False, True])
def test_weights_that_are_nan_name_the_layer_and_the_checkpoint(folder: Path, text: Path, by_layer: bool) -> None:
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    weights[next(name for name in weights if "layers.1" in name and "gate" in name)][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    message = refusal(folder, text, by_layer)
    assert f"the logits of model.layers.1.mlp.gate in {str(folder)!r} are NaN or infinite" in message


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("option", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_checkpoint_names_are_not_fetched(
    folder: Path, text: Path, option: str, by_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = inspect_checkpoint(str(folder), text, tokens=40, length=10, by_layer=by_layer)
    asked: list[object] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda *name, **_: asked.append(name)
    )
    reconfigure(folder, **{option: "owner/name"})
    found = inspect_checkpoint(str(folder), text, tokens=40, length=10, by_layer=by_layer)
    assert not asked
    assert [layer.json() for layer in found.layers] == [layer.json() for layer in plain.layers]


@pytest.mark.parametrize("by_layer", [False, True])
def test_missing_weights_are_refused(folder: Path, text: Path, by_layer: bool) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    gate = next(name for name in weights if "layers.1" in name and "gate" in name)
    save_file({name: value for name, value in weights.items() if name != gate}, path, metadata={"format": "pt"})
    message = refusal(folder, text, by_layer)
    assert "lacks 1 of its weights (model.layers.1.mlp.gate.weight); they would be random" in message


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_missing_shard_is_named(save: Save, text: Path, tmp_path: Path, by_layer: bool) -> None:
    folder = Path(shutil.copytree(save("mixtral", shards="8KB"), tmp_path / "checkpoint"))
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    assert f"lacks {shard.name}, one of" in refusal(folder, text, by_layer)


def test_a_folder_without_a_tokenizer_says_what_to_do(folder: Path, text: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    message = refusal(folder, text)
    assert "no tokenizer" in message
    assert "save_pretrained" in message


def test_another_models_tokenizer_is_refused(save: Save, folder: Path, text: Path) -> None:
    small = save("mixtral", vocab_size=20)
    shutil.copy(folder / "tokenizer.json", small / "tokenizer.json")
    assert "gives ids up to 31, and the model has 20" in refusal(small, text)


def test_a_folder_that_is_not_there_is_not_looked_up(text: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "nothing", text)
    assert "no config.json" in refusal(tmp_path, text)


def test_a_hub_id_without_a_network_says_that_it_was_looked_up(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no folder of that name, so it was looked up on the hub" in refusal("nobody-at-all/no-model", text)


def test_code_of_a_checkpoint_is_never_run(folder: Path, text: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    reconfigure(folder, model_type="own", auto_map=own)
    assert "configuration" in refusal(folder, text)
    assert not mark.exists()


def test_an_encoder_decoder_is_refused(save: Save, folder: Path, text: Path) -> None:
    config = {"model_type": "switch_transformers", "architectures": ["SwitchTransformersForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert "encoder-decoder" in refusal(folder, text)


def test_quantised_weights_are_refused_by_layer(folder: Path, text: Path) -> None:
    reconfigure(folder, quantization_config={"quant_method": "fp8"})
    assert "quantised (fp8), which --by-layer does not read" in refusal(folder, text, by_layer=True)


def test_a_model_that_exceeds_the_memory_is_sent_to_by_layer(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    if torch.accelerator.is_available():
        pytest.skip("weights go to the accelerator")
    assert "--by-layer has one layer in memory at a time" in refusal(folder, text)


def test_windows_longer_than_the_models_positions_are_refused(folder: Path, text: Path) -> None:
    with pytest.raises(InspectError, match="length=65 is more than the 64 positions"):
        inspect_checkpoint(str(folder), text, tokens=130, length=65)


@pytest.mark.parametrize(("positions", "length"), [(64, 64), (600, 512)])
def test_windows_are_of_512_tokens_or_of_the_models_positions(
    save: Save, tmp_path: Path, positions: int, length: int
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("abc " * 150)
    audit = inspect_checkpoint(str(save("mixtral", max_position_embeddings=positions)), text)
    assert (audit.setting.length, audit.setting.windows) == (length, 600 // length)
