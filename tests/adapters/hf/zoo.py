"""A tiny random instance of every mixture-of-experts model of the installed transformers, to plug our routers into.

One `Family` per router class: those that are listed, for `VERSION`, as far as the installed transformers has them, and
`newcomers()`, which find out for themselves how a class is used that nobody has listed. Sizes that most configurations
share are given once, in `SIZES`; a family's own line says only what differs. Weights are redrawn so that no router,
bias or correction is left at zero: tokens choose differently, and what an adapter forgets to honour changes the output.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

# The transformers that LISTED, UNBUILDABLE and NOT_ROUTERS together are the whole of, as is docs/families.md.
VERSION = "5.24.0"

HIDDEN = 32
EXPERTS = 8
TOP_K = 2
VOCABULARY = 64
BATCH, LENGTH = 2, 12

# By name of the configuration's field; a configuration takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "sliding_window_size": 4,
    # Experts, under every name in use.
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    # Of two groups of experts a token may choose from one, so that the group limit shows.
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    # Weights are scaled, so that a forgotten factor shows.
    "routed_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "moe_router_scaling_factor": 1.5,
    "router_scaling_factor": 1.5,
    "route_scale": 1.5,
    # Every layer has experts.
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    # Attention of reduced rank, attention through an index, linear attention.
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "index_kpool": 4,
    "block_size": 4,
    "router_hidden_size": 16,
    # State-space layers.
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 4,
    # The same under names that few have.
    "n_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_kv": 8,
    "kv_channels": 8,
    "d_ff": 24,
    "ffn_hidden_size": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "expert_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "zero_expert_num": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "adapter_in_dim": HIDDEN,
    "adapter_out_dim": HIDDEN,
    "patch_size": 4,
    # Training steps repeat.
    "router_jitter_noise": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "moe_token_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How to make and run a tiny model that routes by `router_class`.

    `build()` is the model in training mode, the same at every call; `inputs()` are arguments of its forward pass, of
    2 x 12 tokens (a vision model: 2 x 16 patches) without padding; `loss(output)` is a differentiable scalar.
    """

    name: str
    router_class: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    loss: Callable[[Any], Tensor]
    takes_attention_mask: bool


def _modelling(module: str) -> Any:
    return importlib.import_module(f"transformers.models.{module}.modeling_{module}")


def _configure(of_model: type[PreTrainedModel], overrides: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(of_model.config_class)}
    return of_model.config_class(**{name: SIZES[name] for name in SIZES.keys() & fields} | overrides)


def _build(module: str, model_class: str, overrides: dict[str, Any]) -> PreTrainedModel:
    of_model = getattr(_modelling(module), model_class)
    config = _configure(of_model, overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = of_model(config)
    _redraw(model)
    return model


@torch.no_grad()
def _redraw(model: nn.Module) -> None:
    """Matrices with entries of variance 1 / columns; a constant vector becomes uneven; every token its own experts."""
    draw = torch.Generator().manual_seed(1)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=draw).to(tensor)

    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if re.search(r"(correction|expert|balancing)_bias|rotary_emb.alpha", name):
            tensor.add_(0.1 * normal(tensor))
        elif name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), EXPERTS, generator=draw).argsort(-1)[:, : tensor.shape[1]])
        elif not isinstance(tensor, nn.Parameter):
            continue
        elif tensor.ndim > 1:
            tensor.copy_(normal(tensor) / math.sqrt(tensor.shape[-1]))
        elif (tensor == tensor[0]).all():
            tensor.add_(0.1 * normal(tensor))


def _tokens() -> Tensor:
    """Token ids above those that mean something."""
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def _text() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def _embedded() -> dict[str, Tensor]:
    return {"inputs_embeds": torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(2))}


def _pair_of_texts() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens().flip(1)}


def _patches() -> dict[str, Tensor]:
    """Two images of 4 x 4 patches, each patch of 3 x 4 x 4 pixels."""
    pixels = torch.randn(2 * 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels, "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def _text_and_image() -> dict[str, Tensor]:
    """Tokens of which every third stands for a piece of an image, which has other experts and another router."""
    return {"input_ids": _tokens(), "moe_mm_token_type_ids": (torch.arange(LENGTH) % 3 == 0).int().expand(BATCH, -1)}


def _loss(output: Any) -> Tensor:
    return output["logits" if "logits" in output else "last_hidden_state"].float().square().mean()


def _family(
    name: str,
    router_class: str,
    model_class: str,
    inputs: Callable[[], dict[str, Tensor]] = _text,
    takes_attention_mask: bool = True,
    **overrides: Any,
) -> Family:
    build = functools.partial(_build, name.partition(".")[0], model_class, overrides)
    return Family(name, router_class, build, inputs, _loss, takes_attention_mask)


LINEAR_AND_FULL = ["linear_attention", "full_attention"]

LISTED: tuple[Family, ...] = (
    _family("afmoe", "AfmoeTokenChoiceRouter", "AfmoeForCausalLM"),
    _family("aria", "AriaTextTopKRouter", "AriaTextForCausalLM"),
    _family("axk1", "AXK1TopkRouter", "AXK1ForCausalLM"),
    _family("axk2", "AXK2TopkRouter", "AXK2ForCausalLM"),
    _family("bailing_hybrid", "BailingHybridTopkRouter", "BailingHybridForCausalLM", layer_types=LINEAR_AND_FULL),
    _family("beam", "BeamTopKRouter", "BeamForCausalLM"),
    _family("cohere2_moe", "Cohere2MoeTopKRouter", "Cohere2MoeForCausalLM"),
    _family(
        "dbrx",
        "DbrxRouter",
        "DbrxForCausalLM",
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    ),
    _family("deepseek_ocr2", "DeepseekOcr2TextTopkRouter", "DeepseekOcr2TextModel"),
    _family("deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2ForCausalLM", topk_method="group_limited_greedy"),
    _family("deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3ForCausalLM"),
    _family("deepseek_v32", "DeepseekV32TopkRouter", "DeepseekV32ForCausalLM"),
    _family("deepseek_v4", "DeepseekV4TopKRouter", "DeepseekV4ForCausalLM", mlp_layer_types=["moe", "moe"]),
    _family(
        "deepseek_v4.hash", "DeepseekV4HashRouter", "DeepseekV4ForCausalLM", mlp_layer_types=["hash_moe", "hash_moe"]
    ),
    _family("diffusion_gemma", "DiffusionGemmaTextRouter", "DiffusionGemmaEncoderTextModel"),
    _family("doge", "DogeCDMoE", "DogeForCausalLM", is_moe=True, num_experts=16),
    _family("dots1", "Dots1TopkRouter", "Dots1ForCausalLM", n_shared_experts=1),
    _family("dots3_note", "Dots3NoteTextTopkRouter", "Dots3NoteForCausalLM"),
    _family("dots3_note.vision", "Dots3NoteVisionTopKRouter", "Dots3NoteVisionModel", _patches, False),
    _family(
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        "Ernie4_5_MoeForCausalLM",
        moe_layer_start_index=0,
        moe_layer_end_index=1,
    ),
    _family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeMoeTopKRouter",
        "Ernie4_5_VLMoeTextModel",
        _text_and_image,
        moe_intermediate_size=[16, 16],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    ),
    _family("exaone_moe", "ExaoneMoeTopkRouter", "ExaoneMoeForCausalLM"),
    _family("flex_olmo", "FlexOlmoTopKRouter", "FlexOlmoForCausalLM"),
    _family("flint", "FlintTopKRouter", "FlintForCausalLM"),
    _family("gemma4", "Gemma4TextRouter", "Gemma4ForCausalLM", enable_moe_block=True),
    _family("glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeForCausalLM"),
    _family("glm4_moe_lite", "Glm4MoeLiteTopkRouter", "Glm4MoeLiteForCausalLM"),
    _family(
        "glm4v_moe",
        "Glm4vMoeTextTopkRouter",
        "Glm4vMoeTextModel",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": [2, 1, 1],
        },
    ),
    _family(
        "glm5_next",
        "Glm5NextTextTopkRouter",
        "Glm5NextTextModel",
        qk_rope_head_dim=0,
        layer_types=["linear_attention", "indexed_attention"],
    ),
    _family("glm_moe_dsa", "GlmMoeDsaTopkRouter", "GlmMoeDsaForCausalLM"),
    _family("gpt_oss", "GptOssTopKRouter", "GptOssForCausalLM"),
    _family("granitemoe", "GraniteMoeTopKRouter", "GraniteMoeForCausalLM"),
    _family("granitemoe_swa", "GraniteMoeSWATopKRouter", "GraniteMoeSWAForCausalLM"),
    _family(
        "granitemoehybrid", "GraniteMoeHybridTopKRouter", "GraniteMoeHybridForCausalLM", layer_types=LINEAR_AND_FULL
    ),
    _family("granitemoeshared", "GraniteMoeSharedTopKRouter", "GraniteMoeSharedForCausalLM"),
    _family("hunyuan_v1_moe", "HunYuanMoEV1Gate", "HunYuanMoEV1ForCausalLM"),
    _family("hy_v3", "HYV3TopKRouter", "HYV3ForCausalLM"),
    _family("hy_v4", "HYV4TopkRouter", "HYV4ForCausalLM"),
    _family(
        "hy_v4_vl",
        "HYV4VLTopkRouter",
        "HYV4VLTextModel",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    ),
    _family("inkling", "InklingTopkRouter", "InklingForCausalLM"),
    _family("inkling2", "Inkling2TopKRouter", "Inkling2ForCausalLM"),
    _family("inkling2_loop", "Inkling2LoopTopKRouter", "Inkling2LoopForCausalLM"),
    _family(
        "jamba",
        "JambaTopKRouter",
        "JambaForCausalLM",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=1,
        expert_layer_offset=0,
        use_mamba_kernels=False,
    ),
    _family("jetmoe", "JetMoeTopKGating", "JetMoeForCausalLM", num_key_value_heads=2),
    _family("kimi_linear", "KimiLinearTopkRouter", "KimiLinearForCausalLM", layer_types=LINEAR_AND_FULL),
    _family("kolibri1", "Kolibri1TopKRouter", "Kolibri1ForCausalLM"),
    _family("laguna", "LagunaTopKRouter", "LagunaForCausalLM", moe_router_logit_softcapping=2.0),
    _family("lara_mini", "LaraMiniTopKRouter", "LaraMiniForCausalLM"),
    _family("lfm2_moe", "Lfm2MoeTopKRouter", "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"]),
    _family("llama4", "Llama4Router", "Llama4ForCausalLM"),
    _family("longcat_flash", "LongcatFlashTopkRouter", "LongcatFlashForCausalLM"),
    _family("mellum", "MellumTopKRouter", "MellumForCausalLM"),
    _family("mimo_v2_flash", "MiMoV2FlashTopkRouter", "MiMoV2FlashForCausalLM", head_dim=16, num_key_value_heads=2),
    _family("minimax", "MiniMaxTopKRouter", "MiniMaxForCausalLM"),
    _family("minimax_m2", "MiniMaxM2TopKRouter", "MiniMaxM2ForCausalLM"),
    _family("minimax_m3_vl", "MiniMaxM3VLTopKRouter", "MiniMaxM3VLForCausalLM"),
    _family("mistral4", "Mistral4TopkRouter", "Mistral4ForCausalLM"),
    _family("mistral_large4", "MistralLarge4TextTopkRouter", "MistralLarge4TextModel"),
    _family("mixtral", "MixtralTopKRouter", "MixtralForCausalLM"),
    _family("muse_spark", "MuseSparkTopkRouter", "MuseSparkTextModel"),
    _family(
        "nemotron_h",
        "NemotronHTopkRouter",
        "NemotronHForCausalLM",
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
    ),
    _family("nllb_moe", "NllbMoeTop2Router", "NllbMoeForConditionalGeneration", _pair_of_texts),
    _family("olmoe", "OlmoeTopKRouter", "OlmoeForCausalLM"),
    _family("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter", "OpenAIPrivacyFilterForTokenClassification"),
    _family("phimoe", "PhimoeTopKRouter", "PhimoeForCausalLM", router_jitter_noise=0.01),
    _family("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeForCausalLM"),
    _family("qwen3_5_moe", "Qwen3_5MoeTopKRouter", "Qwen3_5MoeForCausalLM", layer_types=LINEAR_AND_FULL),
    _family("qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeForCausalLM"),
    _family("qwen3_next", "Qwen3NextTopKRouter", "Qwen3NextForCausalLM", layer_types=LINEAR_AND_FULL),
    _family(
        "qwen3_omni_moe.talker",
        "Qwen3OmniMoeTalkerTextTopKRouter",
        "Qwen3OmniMoeTalkerModel",
        _embedded,
        shared_expert_intermediate_size=16,
    ),
    _family("qwen3_omni_moe.thinker", "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeThinkerTextModel"),
    _family("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", "Qwen3VLMoeTextModel"),
    _family("qwen4_exp", "Qwen4ExpTextTopKRouter", "Qwen4ExpForCausalLM", layer_types=LINEAR_AND_FULL),
    _family("solar_open", "SolarOpenTopkRouter", "SolarOpenForCausalLM"),
    _family("step3p7", "Step3p7TopKRouter", "Step3p7TextModel"),
    _family(
        "switch_transformers",
        "SwitchTransformersTop1Router",
        "SwitchTransformersForConditionalGeneration",
        _pair_of_texts,
        # Its balancing loss is skipped where every layer has experts.
        num_layers=4,
        num_decoder_layers=4,
    ),
    _family("unlimited_ocr", "UnlimitedOcrTextTopkRouter", "UnlimitedOcrTextModel"),
    _family("zaya", "ZayaRouter", "ZayaForCausalLM", num_experts_per_tok=1),
)

MODELS = Path(transformers.__file__).parent / "models"


def _is_installed(family: Family) -> bool:
    module = family.name.partition(".")[0]
    file = MODELS / module / f"modeling_{module}.py"
    return file.exists() and f"class {family.router_class}(" in file.read_text(encoding="utf-8")


FAMILIES: tuple[Family, ...] = tuple(family for family in LISTED if _is_installed(family))

UNBUILDABLE: dict[str, str] = {
    "Qwen3OmniMoeTextTopKRouter": "no module of transformers makes one: only an output recorder names it",
}

# Found by router_classes(), and yet they choose no experts themselves.
NOT_ROUTERS: dict[str, str] = {
    "DbrxFFN": "takes the top k of the logits of DbrxRouter, which is listed",
    "GraniteDoclingDensityRouter": "estimates one number per image, to set its resolution; there are no experts",
    "ZayaRouterMLP": "the last layers of ZayaRouter, which is listed",
}


def recompute(model: PreTrainedModel, use_reentrant: bool = False) -> None:
    """Activation checkpointing, by whichever name the installed transformers has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    name = next(name for name in names if hasattr(model, name))
    getattr(model, name)({"use_reentrant": use_reentrant})


def newcomers() -> dict[str, Family | str]:
    """By router class, for those of the installed transformers that are not listed: a family, or why there is none."""
    listed = {family.router_class for family in LISTED} | UNBUILDABLE.keys() | NOT_ROUTERS.keys()
    return {name: _discover(module, name) for name, module in router_classes().items() if name not in listed}


def _discover(module: str, router_class: str) -> Family | str:
    """The first model of the module that holds the router, is small at our sizes, and runs on tokens alone.

    Errors of every kind are told, not raised: it is somebody else's code, with sizes that it was not asked about.
    """
    try:
        parts = vars(_modelling(module)).values()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    of_models = [one for one in parts if isinstance(one, type) and issubclass(one, PreTrainedModel)]
    of_models = [one for one in of_models if one is not PreTrainedModel]
    failures = []
    for of_model in sorted(of_models, key=lambda one: not one.__name__.endswith("ForCausalLM")):
        try:
            with torch.device("meta"):  # at the sizes of its checkpoints it may be larger than the machine
                model = of_model(_configure(of_model, {}))
            if not any(type(part).__name__ == router_class for part in model.modules()):
                continue
            if sum(p.numel() for p in model.parameters()) > 10**7:
                raise ValueError("larger than 10 million parameters at the sizes of the zoo")
            takes_mask = "attention_mask" in inspect.signature(of_model.forward).parameters
            family = _family(module, router_class, of_model.__name__, takes_attention_mask=takes_mask)
            family.loss(family.build()(**family.inputs()))
        except Exception as error:
            failures.append(f"{of_model.__name__}: {type(error).__name__}: {error}".partition("\n")[0])
        else:
            return family
    return "; ".join(failures) or "no model of its module holds it"


def router_classes() -> dict[str, str]:
    """Every class in the modelling files of the installed transformers that chooses experts, by name or by deed.

    By name: a "Router". By deed: it takes a top k or an argmax and speaks of experts or routers.
    Read from the source, so that a model whose dependencies are missing is found too. With the module of each.
    """
    found: dict[str, str] = {}
    for file in MODELS.glob("*/modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        if re.search("[Rr]outer|expert", source):
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef) and _chooses_experts(node):
                    found[node.name] = file.parent.name
    return found


def _chooses_experts(class_: ast.ClassDef) -> bool:
    if any("PreTrainedModel" in ast.unparse(base) for base in class_.bases):
        return False
    names = {node.id for node in ast.walk(class_) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(class_) if isinstance(node, ast.Attribute)}
    selects = bool(names & {"topk", "argmax", "sparsemixer"})
    return "Router" in class_.name or (selects and bool(re.search("expert|router", " ".join(names))))
