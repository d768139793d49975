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
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "configuration" in refusal(folder, text)
    assert not mark.exists()


def test_an_encoder_decoder_is_refused(save: Save, folder: Path, text: Path) -> None:
    config = {"model_type": "switch_transformers", "architectures": ["SwitchTransformersForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert "encoder-decoder" in refusal(folder, text)


def test_quantised_weights_are_refused_by_layer(folder: Path, text: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
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
