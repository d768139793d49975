"""What others reported of mixtures in training, replayed on patched models: right, or refused by name.

The thread is the first word of each test's docstring.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import sinkroute

pytest.importorskip("transformers")

import transformers

from .test_situations import (
    EXPERTS,
    REAL,
    SMALL,
    TOP_K,
    Seen,
    counted,
    images,
    load_balance,
    make,
    padded,
    patched,
    step,
    vision_model,
)
from .tried import TRIED, tried

ALL = torch.ones(18, dtype=torch.bool)
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(4))
TEXT = {"input_ids": IDS, "labels": IDS}
before = len([row for row in TRIED if row.thread])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **tolerance)


# -- the balancing loss ----------------------------------------------------------------------------------------------


@tried(
    "`mlp_only_layers` with `output_router_logits=True`: a layer without experts puts None among the logits, which the "
    "loss cannot take",
    "layers without experts are left alone, the others counted",
)
@pytest.mark.parametrize("router", [None, "load-balance"])
def test_layers_without_experts_are_left_alone(router):
    """huggingface/transformers#39203"""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SMALL | {"num_hidden_layers": 3}, moe_intermediate_size=16, mlp_only_layers=[1], head_dim=16
    )
    model = transformers.Qwen3MoeForCausalLM(config).train()
    seen = Seen(model)
    handle = patched(model, router)
    assert list(handle.routers) == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
    output, loads = step(model, TEXT | {"output_router_logits": True})
    assert loads == seen.loads(ALL)
    assert output.loss.isfinite()


@tried(
    "the balancing loss counts padding",
    "more padding changes no loss, gradient or load",
)
@pytest.mark.parametrize("router", [None, "load-balance"])
def test_more_padding_changes_nothing(router):
    """huggingface/transformers#28505"""
    found = []
    for width in (0, 7):
        given, _ = padded("right")
        given = {
            name: functional.pad(value, (0, width), value=-100 if name == "labels" else 0)
            for name, value in given.items()
        }
        model = make()
        handle = patched(model, router)
        _, loads = step(model, given)
        assert sum(loads[0]) == REAL * TOP_K
        loss = handle.aux_loss()
        found.append(gradients(model) | {"loads": torch.tensor(loads)} | ({} if loss is None else {"loss": loss}))
    assert_same(found[1], found[0], rtol=1e-4, atol=1e-6)


@tried(
    "the loss is taken over all layers together, so that layers out of balance in different ways cancel",
    "each layer has its loss; they are summed",
)
def test_layers_that_are_out_of_balance_in_different_ways_do_not_cancel():
    """huggingface/transformers#28255"""
    model = make(num_hidden_layers=2)
    with torch.no_grad():
        for layer, favoured in zip(model.model.layers, ([0, 1], [2, 3]), strict=True):
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.register_forward_hook(lambda gate, args, out, f=favoured: favour(out, f))
    handle = patched(model, "load-balance")
    model(input_ids=IDS)
    # Together 4 · (4 · 1/4 · 1/4) = 1, as of perfect balance. By layer 4 · (1/2 · 1/2 + 1/2 · 1/2) = 2, less what the
    # softmax of (9, 9, 0, 0) leaves for the others.
    assert handle.aux_loss().item() == pytest.approx(2 * 0.01 * 2, rel=1e-3)


def favour(outputs, experts):
    """A gate's outputs for logits of 9 at these experts and 0 elsewhere."""
    logits_TE = torch.zeros_like(outputs[0])
    logits_TE[:, experts] = 9.0
    top = logits_TE.softmax(-1).topk(TOP_K)
    return logits_TE, top.values / top.values.sum(-1, keepdim=True), top.indices


@tried(
    "`router_aux_loss_coef` does nothing unless `output_router_logits` is set, too",
    "a router's loss needs no flag, and the model's own stays off whatever the flag",
)
@pytest.mark.parametrize("flag", [False, True])
def test_a_routers_loss_needs_no_flag(flag):
    """huggingface/transformers#44242"""
    found = []
    for asked in (flag, None):
        model = make()
        handle = patched(model, "load-balance")
        step(model, TEXT | ({} if asked is None else {"output_router_logits": asked}))
        found.append(gradients(model) | {"loss": handle.aux_loss().detach()})
    assert_same(found[0], found[1], rtol=0, atol=0)
    assert found[0]["loss"] > 0


@tried(
    "the loss's gradient is attached and dropped, or scaled by the number of tokens",
    "its gradient is that of the written-out loss, times the coefficient, for 18 tokens as for 36",
)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_losss_gradient_arrives_and_does_not_grow_with_tokens(rows):
    """NVIDIA-NeMo/Automodel#1408"""
    given = {name: value.repeat(rows, 1) for name, value in TEXT.items()}
    found = {}
    for router in ("softmax", "load-balance"):
        model = make(num_hidden_layers=1)
        seen = Seen(model)
        inputs = []
        gate = model.model.layers[0].mlp.gate
        gate.register_forward_hook(lambda _, args, out, inputs=inputs: inputs.append(args[0].detach()))
        patched(model, router)
        step(model, given)
        found[router] = gate.weight.grad
    weight = gate.weight.detach().requires_grad_()
    logits_TE = functional.linear(inputs[0].reshape(-1, SMALL["hidden_size"]), weight)
    (0.01 * load_balance(logits_TE, seen.chosen[0])).backward()
    torch.testing.assert_close(found["load-balance"] - found["softmax"], weight.grad, rtol=1e-3, atol=1e-7)


# -- images ----------------------------------------------------------------------------------------------------------


@tried(
    "models of text and images ignore the configuration's `output_router_logits`, or add their own loss where it is "
    "asked for by argument",
    "the model's own loss is off both ways; a router's loss arrives",
)
@pytest.mark.parametrize("by", ["configuration", "argument"])
def test_a_model_of_images_has_the_routers_loss_and_not_its_own(by):
    """huggingface/transformers#48885"""
    found = {}
    for asked in (False, True):
        model = vision_model()
        given = images()
        if asked and by == "configuration":
            model.config.text_config.output_router_logits = True
        elif asked:
            given["output_router_logits"] = True
        model.config.text_config.router_aux_loss_coef = 5.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it was on
            handle = patched(model, "load-balance")
        step(model, given)
        found[asked] = gradients(model) | {"loss": handle.aux_loss().detach()}
    assert_same(found[True], found[False], rtol=0, atol=0)


@tried(
    "a template hands over `inputs_embeds` and drops other arguments, so that `aux_loss` is None",
    "embeddings and a mask are enough: padding is not counted, and the loss is there",
)
def test_embeddings_and_a_mask_are_enough():
    """modelscope/ms-swift#10189"""
    given, real_T = padded("right")
    model = make()
    seen = Seen(model)
    handle = patched(model, "load-balance")
    embedded = model.get_input_embeddings()(given.pop("input_ids"))
    _, loads = step(model, given | {"inputs_embeds": embedded})
    assert loads == seen.loads(real_T)
    by_hand = sum(load_balance(seen.logits[n][real_T], seen.chosen[n][real_T]) for n in range(2))
    assert handle.aux_loss().item() == pytest.approx(0.01 * by_hand.item(), rel=1e-5)


# -- checkpointing and adapters --------------------------------------------------------------------------------------


@tried(
    "checkpointing without reentrance and an adapter on the gate: CheckpointError, since the repetition chooses other "
    "experts",
    "the repetition chooses the same: gradients as without checkpointing",
)
@pytest.mark.parametrize("router", ["ssr-l", "load-balance"])
def test_an_adapter_on_the_gate_under_checkpointing_has_the_gradients_of_a_run_without(router):
    """pytorch/pytorch#171355"""
    peft = pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["gate.weight"], init_lora_weights=False
        )
        torch.manual_seed(1)
        model = peft.get_peft_model(make(), config).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        patched(model, router)
        given, _ = padded("right")
        _, loads = step(model, given)
        found.append(gradients(model) | {"loads": torch.tensor(loads)})
    assert_same(found[1], found[0], rtol=1e-5, atol=1e-7)


@tried(
    "experts that no token chose make the repetition under checkpointing differ (Qwen3.5, linear attention)",
    "gradients as without checkpointing, with experts left empty",
)
def test_empty_experts_under_checkpointing_have_the_gradients_of_a_run_without():
    """huggingface/transformers#47467"""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = transformers.Qwen3_5MoeTextConfig(
            vocab_size=64, hidden_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=16,
            num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, initializer_range=0.2,
            use_cache=False,
        )  # fmt: skip
        model = transformers.Qwen3_5MoeForCausalLM(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        patched(model)
        given = {"input_ids": IDS[:1, :4], "labels": IDS[:1, :4]}
        _, loads = step(model, given)
        assert min(loads[0]) == 0
        found.append(gradients(model) | {"loads": torch.tensor(loads)})
    assert_same(found[1], found[0], rtol=1e-5, atol=1e-7)


@tried(
    "adapters of which some have `modules_to_save` and some do not: switching between them",
    "patched with the gate in `modules_to_save`, a pass without the adapter is the first model's, and what an adapter "
    "moved is in its file",
)
def test_a_gate_that_is_saved_with_an_adapter_is_switched_with_it(tmp_path):
    """huggingface/peft#1615"""
    peft = pytest.importorskip("peft")
    model = make()
    first = copy.deepcopy(model).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    adapted = peft.get_peft_model(model, config).train()
    patched(adapted)
    for number in range(3):
        sinkroute.set_step(adapted, number)
        step(adapted, TEXT)
    sinkroute.end_step(adapted)
    adapted.eval()
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=IDS).logits, first(input_ids=IDS).logits)
    served = adapted(input_ids=IDS).logits
    assert not torch.equal(served, first(input_ids=IDS).logits)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(first), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, served, rtol=1e-5, atol=1e-6)


@tried(
    "how to fine-tune the router by LoRA",
    "an adapter on the gate learns with a router that has a loss; one that moves gates refuses it by name",
)
def test_an_adapter_on_the_gate_learns_by_a_loss_and_is_not_moved_past():
    """hiyouga/LlamaFactory#8075"""
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=2, target_parameters=["gate.weight"], init_lora_weights=False)
        torch.manual_seed(1)
        return peft.get_peft_model(make(), config).train()

    with pytest.raises(ValueError, match="ParamWrapper has no place for"):
        patched(adapted())
    found = {}
    for router in ("softmax", "load-balance"):
        model = adapted()
        patched(model, router)
        step(model, TEXT)
        found[router] = gradients(model)
    assert found["softmax"].keys() == found["load-balance"].keys()
    assert any(not torch.equal(found["softmax"][name], value) for name, value in found["load-balance"].items())


# -- precision and noise ---------------------------------------------------------------------------------------------


@tried(
    "the correction bias of DeepSeek-V3 is rounded to bf16 with the model",
    "it is moved and saved in float32, in a model of bf16",
)
@pytest.mark.parametrize("router", ["ssr-dual", "loss-free"])
def test_a_correction_bias_stays_in_float32(router, tmp_path):
    """huggingface/transformers#42580"""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "first")
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16).train()
    assert model.lm_head.weight.dtype == torch.bfloat16
    gate = model.model.layers[0].mlp.gate
    patched(model, router)
    for number in range(3):
        sinkroute.set_step(model, number)
        step(model, TEXT)
    sinkroute.end_step(model)
    moved = gate.e_score_correction_bias
    assert moved.dtype == torch.float32
    assert moved.any()
    model.save_pretrained(tmp_path / "last")
    loaded = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "last", dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mlp.gate.e_score_correction_bias, moved)


@tried(
    "jitter that is meant for the gate reaches the experts' inputs",
    "routed and counted by the logits with jitter; `eval()` has none",
)
@pytest.mark.parametrize("router", [None, "ssr-l", "load-balance"])
def test_with_jitter_what_is_counted_is_what_was_chosen(router):
    """huggingface/transformers#33969"""
    model = make(router_jitter_noise=0.3)
    plain = copy.deepcopy(model).eval()
    seen = Seen(model)
    handle = patched(model, router)
    _, loads = step(model, TEXT)
    assert loads == seen.loads(ALL)
    if router == "load-balance":
        by_hand = sum(load_balance(seen.logits[n], seen.chosen[n]) for n in range(2))
        assert handle.aux_loss().item() == pytest.approx(0.01 * by_hand.item(), rel=1e-5)
    if router != "ssr-l":
        assert loads == [counted(chosen, ALL) for chosen in seen.chosen]
    assert torch.equal(model.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits)


# -- generation, kernels, other trainers -----------------------------------------------------------------------------


@tried(
    "a left-padded batch generates other tokens than each prompt alone",
    "the same tokens, after training by the router",
)
def test_a_left_padded_batch_generates_what_each_prompt_alone_does():
    """huggingface/transformers#29936"""
    model = make()
    patched(model)
    for number in range(2):
        sinkroute.set_step(model, number)
        step(model, padded("left")[0])
    sinkroute.end_step(model)
    model.eval()
    given, _ = padded("left")
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **asked)
    for ids, mask, found in zip(given["input_ids"], given["attention_mask"], whole, strict=True):
        alone = ids[mask.bool()][None]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **asked)[0, -3:]
        assert found[-3:].tolist() == expected.tolist()


@tried(
    "a fused kernel computes the loss from hidden states, past the model's head: the balancing loss is dropped "
    "without a word",
    "a router's loss reaches the gate with any loss that is made of hidden states",
)
def test_a_loss_of_hidden_states_brings_the_routers_loss():
    """huggingface/trl#7009"""
    found = {}
    for router in ("softmax", "load-balance"):
        model = make()
        patched(model, router)
        hidden = model.model(input_ids=IDS).last_hidden_state
        logits = functional.linear(hidden, model.lm_head.weight)
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        found[router] = model.model.layers[1].mlp.gate.weight.grad
    assert not torch.allclose(found["softmax"], found["load-balance"], rtol=1e-3, atol=0)


@tried(
    "experts that no token chose have no gradient, and ranks wait for one another for ever (ZeRO-3, DDP)",
    "with `ssr-dual`, `exact=True`, no expert is left empty, whatever the gate wants",
)
def test_with_exact_balance_every_expert_has_a_gradient():
    """deepspeedai/DeepSpeed#4808"""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_experts=EXPERTS, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, router_bias=True,
    )  # fmt: skip
    without = []
    for exact in (False, True):
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(config).train()
        routers = [part for part in model.modules() if isinstance(getattr(part, "router", None), nn.Module)]
        for part in routers:  # one expert for all tokens
            part.router.classifier.weight.data.zero_()
            part.router.classifier.bias.data = torch.tensor([3.0, 0.0, 0.0, 0.0])
        sinkroute.patch(model, "ssr-dual", exact=exact)
        sinkroute.set_step(model, 0)
        model(**TEXT).loss.backward()
        experts = [name for name, p in model.named_parameters() if ".experts." in name and p.grad is None]
        without.append(len(experts))
    assert without[0] > 0
    assert without[1] == 0


REPORTS = len([row for row in TRIED if row.thread]) - before
