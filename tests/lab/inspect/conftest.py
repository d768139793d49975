"""Tiny random checkpoints on disk, each with a tokenizer of one id per character."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
BOS = 1
VOCABULARY = 3 + len(LETTERS)

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": BOS,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
CONFIGS: dict[str, Callable[..., Any]] = {
    "mixtral": lambda **more: transformers.MixtralConfig(
        **_SIZES | {"intermediate_size": 8, "num_local_experts": 8, "num_experts_per_tok": 2} | more
    ),
    "olmoe": lambda **more: transformers.OlmoeConfig(
        **_SIZES | {"intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 3} | more
    ),
    "deepseek_v3": lambda **more: transformers.DeepseekV3Config(
        **_SIZES
        | _LATENT
        | {"intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
        | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3}
        | more
    ),
    "gpt_oss": lambda **more: transformers.GptOssConfig(
        **_SIZES
        | {"intermediate_size": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
        | {"sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        | more
    ),
    "llama4": lambda **more: transformers.Llama4TextConfig(
        **_SIZES
        | {"intermediate_size": 8, "intermediate_size_mlp": 8, "num_local_experts": 8, "num_experts_per_tok": 1}
        | {"head_dim": 8, "interleave_moe_layer_step": 1}
        | more
    ),
}

# What reading by layer could miss: a gate kept in float32 in a bfloat16 model; buffers of modules without parameters,
# and parameters beside the layers.
SPECIAL: dict[str, Callable[..., Any]] = {
    "beam": lambda **more: transformers.BeamConfig(
        **_SIZES
        | {"intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 2}
        | {"head_dim": 8, "mlp_layer_types": ["sparse", "sparse"], "n_group": 2, "topk_group": 1}
        | more
    ),
    "zaya": lambda **more: transformers.ZayaConfig(
        **_SIZES
        | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
        | {"intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 1}
        | {"router_hidden_size": 16}
        | more
    ),
}
if not hasattr(transformers, "BeamConfig"):  # transformers 5.20
    del SPECIAL["beam"]


def build(family: str, **more: Any) -> transformers.PreTrainedModel:
    """A model with gates that differ from token to token; no correction is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config((CONFIGS | SPECIAL)[family](**more))
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                if "correction_bias" in name or "balancing_biases" in name:
                    value.uniform_(0, 0.2)
                    if "balancing" in name:
                        value[-1] = -1  # what transformers sets it to whenever it loads a checkpoint
                elif value.ndim > 1:
                    value.normal_(0, 1.5 / value.shape[-1] ** 0.5)
    return model.eval()


def save_tokenizer(folder: Path, *, bos: bool = False) -> None:
    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": 2} | {letter: 3 + place for place, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save(family, bos=..., shards=...)`: the folder of a checkpoint."""

    def save(family: str, *, bos: bool = False, shards: str = "5GB", **more: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        build(family, **more).save_pretrained(folder, max_shard_size=shards)
        save_tokenizer(folder, bos=bos)
        return folder

    return save


@pytest.fixture(scope="session")
def characters() -> str:
    return "".join(random.Random(0).choices(LETTERS, k=200))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, characters: str) -> Path:
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text(characters, encoding="utf-8", newline="")
    return path


def ids_of(characters: str) -> list[int]:
    return [3 + LETTERS.index(letter) for letter in characters]
