"""Patched models on several ranks: DDP and FSDP."""

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sinkroute

BRANCHES = ({"probability": 1.0}, {"probability": 0.0}, {"probability": 0.0, "noise": 0.0})
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def mixtral():
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=8)).train()


def deepseek():
    torch.manual_seed(0)
    low_rank = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(
        **SIZES, **low_rank, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=0
    )
    return transformers.DeepseekV3ForCausalLM(config).train()


def batch(rank=0):
    """Of another content on each rank, and of another amount of padding."""
    tokens = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(rank))
    mask = (torch.arange(12) < 12 - rank).long().expand(2, -1)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def _data_parallel():
    found = {}
    for number, options in enumerate(BRANCHES):
        model = mixtral()
        sinkroute.patch(model, "ssr-l", **options)
        wrapped = DistributedDataParallel(model)
        sinkroute.set_step(wrapped, 0)
        wrapped(**batch(dist.get_rank())).loss.backward()
        found[f"gradient {number}"] = model.model.layers[0].mlp.gate.weight.grad
        found[f"attention {number}"] = model.model.layers[0].self_attn.q_proj.weight.grad
    model = mixtral()
    handle = sinkroute.patch(model, "load-balance")
    wrapped = DistributedDataParallel(model)
    wrapped(**batch(dist.get_rank())).loss.backward()
    assert handle.aux_loss() is not None
    found["loss"] = model.model.layers[0].mlp.gate.weight.grad
    model = deepseek()
    sinkroute.patch(model, "loss-free", update_rate=0.5)
    wrapped = DistributedDataParallel(model)
    sinkroute.set_step(wrapped, 0)
    with sinkroute.LoadMonitor(wrapped) as monitor:
        wrapped(**batch(dist.get_rank())).loss.backward()
    sinkroute.end_step(wrapped)
    found["bias"] = model.model.layers[0].mlp.gate.e_score_correction_bias
    found["load"] = torch.tensor([row["load"] for row in monitor.metrics().values()])[0]
    return found


def _fully_sharded():
    differences = []
    for options in BRANCHES:
        results = []
        for sharded in (True, False):
            model = mixtral()
            sinkroute.patch(model, "ssr-l", **options)
            if sharded:
                _sharded(model)
            sinkroute.set_step(model, 0)
            loss = model(**batch()).loss
            loss.backward()
            gradient = model.model.layers[0].self_attn.q_proj.weight.grad
            results += [loss.detach(), gradient.full_tensor() if sharded else gradient]
        differences += [(results[0] - results[2]).abs(), (results[1] - results[3]).abs().max()]
    return torch.stack(differences)


def _sharded_bias():
    model = deepseek()
    sinkroute.patch(model, "loss-free", update_rate=0.5)
    _sharded(model)
    sinkroute.set_step(model, 0)
    model(**batch(dist.get_rank())).loss.backward()
    sinkroute.end_step(model)
    return model.model.layers[0].mlp.gate.e_score_correction_bias


def _folded(wrap):
    """Layer 0's gate after two plans, and how far it was moved."""
    model = mixtral()
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    sinkroute.patch(model, "ssr-fold", probability=1.0, noise=0.0)
    wrapped = wrap(model)
    for step in range(2):
        sinkroute.set_step(wrapped, step)
        wrapped(**batch(dist.get_rank())).loss.backward()
    sinkroute.end_step(wrapped)
    weight = model.model.layers[0].mlp.gate.weight.detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return torch.stack([weight, before])


def _sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _everything():
    return {
        "data parallel": _data_parallel(),
        "fully sharded": _fully_sharded(),
        "sharded bias": _sharded_bias(),
        "folded": {"whole": _folded(DistributedDataParallel), "sharded": _folded(_sharded)},
    }


@pytest.fixture(scope="module")
def ranks(run_ranks):
    """What each of two ranks finds; one start of processes for all tests, which import transformers."""
    return run_ranks(_everything, 2)


def test_data_parallel_ranks_keep_the_same_gradients_and_bias(ranks):
    first, second = (found["data parallel"] for found in ranks)
    assert first.keys() == second.keys()
    for name in first.keys() - {"load"}:
        assert torch.equal(first[name], second[name]) and first[name].isfinite().all(), name
    assert not first["gradient 0"].any() and first["gradient 1"].any()  # a plan's weights teach the gate nothing
    # The bias moves by the load of all ranks together.
    load_E = (first["load"] + second["load"]).double()
    assert load_E.sum() == 2 * (24 + 22)
    torch.testing.assert_close(first["bias"], (0.5 * torch.sign(load_E.mean() - load_E)).float())


def test_a_patched_model_may_be_fully_sharded(ranks):
    # The ranks have the same tokens, but noise is drawn per rank: with it they only have to run.
    for differences in (found["fully sharded"] for found in ranks):
        assert differences[-2:].max() < 1e-6
        assert differences.isfinite().all()


def test_loss_free_balancing_moves_the_bias_of_a_sharded_model(ranks):
    first, second = (found["sharded bias"] for found in ranks)
    assert torch.equal(first, second) and set(first.abs().tolist()) <= {0.0, 0.5} and first.any()


def test_ssr_fold_moves_the_gate_alike_on_all_ranks_whole_or_sharded(ranks):
    first, second = (found["folded"] for found in ranks)
    for kind in ("whole", "sharded"):
        assert torch.equal(first[kind], second[kind])
        assert (first[kind][0] - first[kind][1]).abs().max() > 1e-3
    torch.testing.assert_close(first["sharded"], first["whole"], atol=1e-5, rtol=1e-4)
