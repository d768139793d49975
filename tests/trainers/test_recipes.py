"""The three recipes of docs/huggingface.md, as they stand there: what they train is balanced, saved and loads."""

import copy
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
TRAINER, LORA, SHARDED = BLOCKS


def given():
    """What a recipe calls its reader's: a mixture whose gates are out of balance, and texts."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.2, pad_token_id=0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.3 * torch.randn(32)  # tokens that have much in common
    draw = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (64, 32), generator=draw).tolist()]
    return {"model": model, "rows": rows}


def ids():
    return torch.tensor([row["input_ids"] for row in given()["rows"]])


@torch.no_grad()
def max_vio(model):
    """Of the choices that a model, patched or not, serves: the busiest expert over the mean, minus 1, worst layer."""
    found = []

    def count(experts, args):
        found.append(args[1].flatten().bincount(minlength=8))

    hooks = [layer.mlp.experts.register_forward_pre_hook(count) for layer in model.model.layers]
    model.eval()(input_ids=ids())
    for hook in hooks:
        hook.remove()
    return max((load.max() / load.float().mean() - 1).item() for load in found)


def run(block, names, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def served(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def test_the_page_has_three_recipes():
    assert len(BLOCKS) == 3
    for block, word in zip(BLOCKS, ("Trainer", "SFTTrainer", "FullyShardedDataParallelPlugin"), strict=True):
        assert word in block
        assert "sinkroute.patch(" in block


def test_fine_tuning_with_trainer(tmp_path, monkeypatch):
    names = given()
    before = max_vio(names["model"])
    model = run(TRAINER, names, tmp_path, monkeypatch)["model"]
    assert max_vio(model) < before / 2
    loaded = transformers.MixtralForCausalLM.from_pretrained("run/final")
    assert torch.equal(served(loaded), served(model))


def test_lora_with_trl(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # as the programs here find one another
    from trained import tokenizer

    names = given() | {"tokenizer": tokenizer()}
    base = copy.deepcopy(names["model"])
    before = max_vio(base)
    # TRL's default is bf16, which it asks a device for, and which stays on the model's forward pass.
    block = LORA.replace('report_to="none"', 'report_to="none", bf16=False')
    adapted = run(block, names, tmp_path, monkeypatch)["adapted"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), "adapter")
    torch.testing.assert_close(served(loaded), served(adapted), rtol=1e-5, atol=1e-6)
    assert max_vio(loaded.base_model.model) < before / 2


def pretrain():
    """On a rank. accelerate shards over devices only; here it is told to do so over processes."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    names = given()
    first = copy.deepcopy(names["model"])
    exec(compile(SHARDED, str(PAGE), "exec"), names)
    torch.distributed.barrier()  # it is saved
    loaded = transformers.MixtralForCausalLM.from_pretrained("pretrained")
    kind = type(names["sharded"].model.layers[0].mlp.gate.weight).__name__
    return {"kind": kind, "before": max_vio(first), "after": max_vio(loaded)}


def test_continued_pretraining_with_accelerate(run_ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    for found in run_ranks(pretrain, 2):
        assert found["kind"] == "DTensor"
        assert found["after"] < found["before"] / 2
