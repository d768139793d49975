"""Which class of transformers computes what a model of the lab computes, and what its tensors are called there.

All have the lab's blocks: pre-norm RMSNorm, causal attention with rotary positions and no biases, experts
down(silu(gate) · up), an output layer that shares no weights. What routes decides between

    Mixtral        softmax, renormalised
    Qwen2-MoE      softmax, renormalised or not; an expert that all tokens visit, times a sigmoid
    ERNIE 4.5      softmax, renormalised, a bias of the choice; experts that all tokens visit
    GLM-4 MoE      sigmoid, renormalised or not, a bias of the choice, groups, a scale; experts that all tokens visit

as their modelling files in transformers 5.24 have it. What a class has and the lab's model has not is set so that it
adds 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkroute.lab.config import Config, ModelConfig
from sinkroute.lab.export.serving import ExportError, ServingRule, serving_rule
from sinkroute.lab.export.tokenizer import NEWLINE, PAD
from sinkroute.lab.models import Decoder, SparseModel
from sinkroute.moe.experts import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Architecture", "choose_architecture", "convert"]


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, seen from the lab.

    Attributes:
        model_type: its name in `config.json`.
        settings: of its configuration, beside those that all share.
        shared_width: hidden width of its expert for all tokens; 0: it has none.
        shared: the name of that expert.
        shared_gate: that expert is multiplied by the sigmoid of a linear map of the token.
        bias: the name of the bias of the choice; None: it has none.
        scale: whether its configuration has a factor of all weights.
        interleaved: its rotary positions turn neighbours (2i, 2i + 1); else, as the lab's, (i, i + width/2).
    """

    model_type: str
    settings: Callable[[ModelConfig, ServingRule], dict[str, Any]]
    shared_width: Callable[[ModelConfig], int]
    shared: str = "shared_experts"
    shared_gate: bool = False
    bias: str | None = None
    scale: bool = False
    interleaved: bool = False


def _whole_experts(sizes: ModelConfig) -> int:
    """The width of the expert for all tokens where it must be that of so many experts."""
    return -(-(sizes.shared_hidden or 0) // sizes.d_hidden) * sizes.d_hidden


MIXTRAL = Architecture(
    "mixtral",
    lambda sizes, rule: {
        "intermediate_size": sizes.d_hidden,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
    },
    shared_width=lambda sizes: 0,
)

QWEN2_MOE = Architecture(
    "qwen2_moe",
    lambda sizes, rule: {
        "moe_intermediate_size": sizes.d_hidden,
        "shared_expert_intermediate_size": sizes.shared_hidden or 1,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "norm_topk_prob": rule.normalise,
        "qkv_bias": False,
    },
    shared_width=lambda sizes: sizes.shared_hidden or 1,
    shared="shared_expert",
    shared_gate=True,
)

ERNIE = Architecture(
    "ernie4_5_moe",
    lambda sizes, rule: {
        "moe_intermediate_size": sizes.d_hidden,
        "moe_num_shared_experts": _whole_experts(sizes) // sizes.d_hidden,
        "moe_num_experts": sizes.experts,
        "moe_k": sizes.top_k,
        "moe_layer_start_index": 0,
    },
    shared_width=_whole_experts,
    bias="moe_statics.e_score_correction_bias",
    interleaved=True,
)

GLM4_MOE = Architecture(
    "glm4_moe",
    lambda sizes, rule: {
        "moe_intermediate_size": sizes.d_hidden,
        "n_shared_experts": max(_whole_experts(sizes) // sizes.d_hidden, 1),
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "first_k_dense_replace": 0,
        "num_mtp_layers": 0,
        "norm_topk_prob": rule.normalise,
        "routed_scaling_factor": rule.scale,
        "n_group": rule.groups,
        "topk_group": rule.top_groups,
    },
    shared_width=lambda sizes: max(_whole_experts(sizes), sizes.d_hidden),
    bias="e_score_correction_bias",
    scale=True,
)


def choose_architecture(sizes: ModelConfig, rule: ServingRule) -> Architecture:
    """The class that computes such a model.

    Raises:
        ExportError: none does.

    >>> from sinkroute.moe import MoE
    >>> sizes = ModelConfig(d_model=8, d_hidden=4, experts=4)
    >>> choose_architecture(sizes, serving_rule(MoE(8, 4, 4, 2, router="loss-free"), "loss-free")).model_type
    'ernie4_5_moe'
    """
    if sizes.activation != "swiglu":
        raise ExportError(
            f"model.activation={sizes.activation!r} cannot be exported: the experts of Hugging Face's mixture models "
            'of this shape are gated; train with "swiglu"'
        )
    if rule.score == "sigmoid":
        return GLM4_MOE
    if rule.score != "softmax":
        raise ExportError(
            f"score={rule.score!r} cannot be exported: Hugging Face's models with plain attention have softmax or "
            "sigmoid; train with one of these"
        )
    if rule.groups > 1:
        raise ExportError(
            f"groups={rule.groups} with a softmax cannot be exported: in Hugging Face's models that is DeepSeek-V2 "
            'alone, whose attention is another; score="sigmoid" has groups in GLM-4 MoE'
        )
    if rule.bias_E is not None and not rule.normalise:
        raise ExportError(
            "a bias of the choice with softmax weights that are not renormalised cannot be exported: Hugging Face's "
            'models with plain attention renormalise; train with norm_topk=true (with top_k=1, score="sigmoid")'
        )
    if rule.bias_E is not None:
        return ERNIE
    return MIXTRAL if rule.normalise and sizes.shared_hidden is None else QWEN2_MOE


def convert(decoder: SparseModel, config: Config) -> PreTrainedModel:
    """The same model as a class of transformers, in float32 and `eval()`; no tensor is shared.

    Raises:
        ExportError: no class computes it.
    """
    sizes = config.model
    if not isinstance(decoder, Decoder) or not isinstance(sizes, ModelConfig):
        raise ExportError(
            f'model.name={config.model.name!r} cannot be exported: only the compact decoder, "decoder", has an '
            "architecture in transformers"
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    rules = [serving_rule(layer, config.router.name) for layer in decoder.moe_layers]
    architecture = choose_architecture(sizes, rules[0])
    hf_config = AutoConfig.for_model(
        architecture.model_type,
        vocab_size=sizes.vocab,
        hidden_size=sizes.d_model,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=config.data.length,
        # GLM-4 MoE turns half of each head where it is told nothing of the factor; others do not look at it.
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        # What torch.nn.RMSNorm takes where it is told nothing.
        rms_norm_eps=decoder.norm.eps or torch.finfo(torch.float32).eps,
        tie_word_embeddings=False,
        bos_token_id=NEWLINE,
        eos_token_id=None,
        pad_token_id=PAD,
        dtype="float32",
        **architecture.settings(sizes, rules[0]),
    )
    with torch.random.fork_rng(devices=[]):  # its initial weights are overwritten, the caller's generator is not
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    tensors = {
        "model.embed_tokens.weight": decoder.embed.weight,
        "model.norm.weight": decoder.norm.weight,
        "lm_head.weight": decoder.head.weight,
    }
    for number, rule in enumerate(rules):
        tensors |= {
            f"model.layers.{number}.{name}": tensor
            for name, tensor in _block(decoder, number, rule, sizes, architecture).items()
        }
    model.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in tensors.items()})
    return model.eval()


def _block(
    decoder: Decoder, number: int, rule: ServingRule, sizes: ModelConfig, architecture: Architecture
) -> dict[str, Tensor]:
    block: Any = decoder.blocks[number]
    query, key, value = block.attention.qkv.weight.chunk(3)
    if architecture.interleaved:
        query, key = (_interleave(weight, sizes.heads) for weight in (query, key))
    experts = block.moe.experts
    tensors = {
        "input_layernorm.weight": block.attention_norm.weight,
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.o_proj.weight": block.attention.out.weight,
        "post_attention_layernorm.weight": block.moe_norm.weight,
        "mlp.gate.weight": rule.gate_ED,
        "mlp.experts.gate_up_proj": experts.w_in,
        # A factor of all weights is one of all outputs.
        "mlp.experts.down_proj": experts.w_out if architecture.scale else experts.w_out * rule.scale,
    }
    if architecture.bias is not None:
        bias_E = torch.zeros(sizes.experts) if rule.bias_E is None else rule.bias_E
        shape = (1, -1) if architecture is ERNIE else (-1,)
        tensors[f"mlp.gate.{architecture.bias}"] = bias_E.view(shape)
    if width := architecture.shared_width(sizes):
        # The sigmoid of 0 is a half: twice the expert.
        factor = 2.0 if architecture.shared_gate else 1.0
        for name, tensor in _shared(block.moe.shared, sizes.d_model, width, factor).items():
            tensors[f"mlp.{architecture.shared}.{name}"] = tensor
        if architecture.shared_gate:
            tensors["mlp.shared_expert_gate.weight"] = torch.zeros(1, sizes.d_model)
    return tensors


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """The rows (i, i + width/2) of each head, that turn together, as neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _shared(shared: Experts | None, d_model: int, width: int, factor: float) -> dict[str, Tensor]:
    """The three matrices of the expert for all tokens, filled up to its width with hidden units that add 0."""
    if shared is None:
        gate_FD = up_FD = torch.zeros(0, d_model)
        down_DF = torch.zeros(d_model, 0)
    else:
        gate_FD, up_FD = shared.w_in[0].chunk(2)
        down_DF = shared.w_out[0] * factor
    missing = width - len(gate_FD)
    return {
        "gate_proj.weight": F.pad(gate_FD, (0, 0, 0, missing)),
        "up_proj.weight": F.pad(up_FD, (0, 0, 0, missing)),
        "down_proj.weight": F.pad(down_DF, (0, missing)),
    }
