"""What a router moves is what is trained and saved, or the router is refused: adapters, frozen gates, copies."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn

import sinkroute
from sinkroute.routing.fold import GateFold

peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_experts_per_tok": 2, "initializer_range": 0.2, "intermediate_size": 16}
LORA = {"target_modules": ["o_proj"], "task_type": "CAUSAL_LM", "r": 2}


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4)
    )


def deepseek():
    torch.manual_seed(0)
    low_rank = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    config = transformers.DeepseekV3Config(
        **SIZES, **low_rank, **groups, num_key_value_heads=2, moe_intermediate_size=16
    )
    return transformers.DeepseekV3ForCausalLM(config)


def ids():
    return torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def train(model, steps=4):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        sinkroute.set_step(model, step)
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sinkroute.end_step(model)


MOVED = [
    (mixtral, "ssr-fold", {"probability": 1.0}),
    (mixtral, "ssr-dual", {}),
    (deepseek, "ssr-dual", {}),
    (deepseek, "loss-free", {"update_rate": 0.5}),
]
each_kind = pytest.mark.parametrize(
    ("make", "router", "options"), MOVED, ids=[f"{m.__name__} {r}" for m, r, _ in MOVED]
)


@each_kind
def test_an_adapter_without_what_a_router_moves_is_refused_whichever_comes_first(make, router, options):
    model = make()
    sinkroute.patch(model, router, **options)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA)).train()
    with pytest.raises(ValueError, match=rf"{router}' moves the gate or its correction bias.*modules_to_save"):
        adapted(input_ids=ids(), labels=ids())
    adapted = peft.get_peft_model(make(), peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"frozen|files do not hold it"):
        sinkroute.patch(adapted, router, **options)
    assert not any("_sinkroute_router" in vars(part) for part in adapted.modules())  # not left half patched
    sinkroute.patch(adapted, "ssr-l")  # leaves nothing behind


@each_kind
def test_an_adapter_with_the_gates_serves_when_loaded_as_it_did_when_saved(make, router, options, tmp_path):
    model = make()
    base = copy.deepcopy(model)
    config = peft.LoraConfig(**LORA, modules_to_save=["gate"])
    adapted = peft.get_peft_model(model, config)
    sinkroute.patch(adapted, router, **options)
    before = base(input_ids=ids()).logits
    train(adapted)
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        served = adapted(input_ids=ids()).logits
        assert (served - before).abs().max() > 0.1
        torch.testing.assert_close(loaded(input_ids=ids()).logits, served)


def test_a_bias_is_not_moved_in_a_model_of_which_nothing_is_trained():
    model = deepseek()
    sinkroute.patch(model, "loss-free")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="no parameter of the model is trained"):
        peft.get_peft_model(model, prompts).train()(input_ids=ids(), labels=ids())


def test_a_gate_that_is_frozen_after_the_patch_is_refused_at_the_end_of_the_step():
    model = mixtral()
    sinkroute.patch(model, "ssr-fold", probability=1.0)
    for layer in model.model.layers:
        layer.mlp.gate.requires_grad_(False)
    before = model.model.layers[0].mlp.gate.weight.clone()
    with pytest.raises(RuntimeError, match="moves weight of MixtralTopKRouter, which is frozen"):
        train(model)
    assert torch.equal(model.model.layers[0].mlp.gate.weight, before)


def test_a_lora_on_the_gate_itself_is_refused():
    model = mixtral()
    sinkroute.patch(model, "ssr-fold", probability=1.0)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"])
    with pytest.raises(ValueError, match="files do not hold it"):
        peft.get_peft_model(model, lora).train()(input_ids=ids(), labels=ids())


class CopiedSGD(torch.optim.SGD):
    """SGD that keeps copies of the weights in float32 and writes them over the model's, as Apex does."""

    def __init__(self, parameters, lr):
        self.model_s = list(parameters)
        super().__init__([nn.Parameter(p.detach().float().clone()) for p in self.model_s], lr=lr)

    def step(self):
        copies = self.param_groups[0]["params"]
        for mine, theirs in zip(copies, self.model_s, strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.float()
        super().step()
        with torch.no_grad():
            for mine, theirs in zip(copies, self.model_s, strict=True):
                theirs.copy_(mine)
                theirs.grad = None


def folded_by(optimizer_of, steps=6):
    """Steps of a gate that most tokens leave for one expert, and what was said."""
    torch.manual_seed(0)
    gate = nn.Linear(8, 4)
    gate.bias.data[0] += 3
    router = sinkroute.create_router("ssr-fold", num_experts=4, top_k=1, probability=1.0)
    router.links.append(GateFold(router, gate, "bias"))
    optimizer = optimizer_of(gate.parameters())
    x_TD = torch.randn(400, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            sinkroute.set_step(router, step)
            router(gate(x_TD)).weights.square().sum().mul(1e-3).backward()
            optimizer.step()
            optimizer.zero_grad()
            sinkroute.end_step(router)
    return gate, [str(warning.message) for warning in caught]


def test_moves_that_an_optimiser_undoes_are_told_once():
    _, said = folded_by(lambda parameters: CopiedSGD(parameters, lr=0.01))
    assert len(said) == 1 and "SSRFoldRouter moves bias of Linear" in said[0] and "sets it back" in said[0]


def test_moves_that_stay_are_not_told():
    gate, said = folded_by(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    assert said == []
    assert gate.bias[0] - gate.bias[1:].mean() < 1


def test_a_model_that_zero_has_sharded_before_the_patch_is_refused_by_name():
    model = mixtral()
    for number, weight in enumerate(model.parameters()):
        weight.ds_id, weight.ds_shape = number, weight.shape  # as zero.Init leaves them
        weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"parts already, by DeepSpeed's ZeRO-3.*before TrainingArguments"):
        sinkroute.patch(model, "ssr-l")


def _flat():
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for original in (True, False):
        model = mixtral()
        sinkroute.patch(model, "ssr-fold", probability=1.0)
        sharded = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        try:
            train(sharded)
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_a_gate_in_a_flat_parameter_of_fsdp1_is_refused_by_name(run_ranks):
    for said in run_ranks(_flat, 2):
        assert len(said) == 2
        assert all("moves weight of MixtralTopKRouter" in text and "FSDP2 (fully_shard)" in text for text in said), said
