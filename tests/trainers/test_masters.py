"""What is folded into a gate stays there under DeepSpeed's ZeRO, which writes float32 copies over the weights."""

import importlib
import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
import transformers

import sinkroute

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is in the environment of `make test-trainers`"
)
STEPS = 3


def _model(dtype):
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what transformers draws differed between ranks that were joined before the model was made
        for buffer in (model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq):
            buffer.copy_(1e4 ** (-torch.arange(len(buffer)) / len(buffer)))
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.copy_(0.2 * torch.randn(weight.shape, generator=drawn))
    return model.to(dtype)


def _ids():
    return torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))


def _train(stage, dtype):
    """How far each gate was moved by folds, the optimiser's rate being 0: (layers, E, D); and the same of its copy."""
    import deepspeed

    model = _model(dtype)
    before = torch.stack([layer.mlp.gate.weight.detach().float().clone() for layer in model.model.layers])
    sinkroute.patch(model, "ssr-fold", probability=1.0)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config)
    for step in range(STEPS):
        sinkroute.set_step(model, step)
        engine.train()
        engine.backward(engine(input_ids=_ids(), labels=_ids()).loss)
        engine.step()
    sinkroute.end_step(model)
    engine.backward(engine(input_ids=_ids(), labels=_ids()).loss)
    engine.step()  # writes the copies over the weights
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    with deepspeed.zero.GatheredParameters(gates, enabled=stage == 3):
        return torch.stack([gate.detach().float().clone() for gate in gates]) - before


def _alone(dtype):
    model = _model(dtype)
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    before = torch.stack([gate.detach().float().clone() for gate in gates])
    sinkroute.patch(model, "ssr-fold", probability=1.0)
    for step in range(STEPS):
        sinkroute.set_step(model, step)
        model.train()(input_ids=_ids(), labels=_ids()).loss.backward()
    sinkroute.end_step(model)
    return torch.stack([gate.detach().float().clone() for gate in gates]) - before


def _all_stages():
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "DS_ACCELERATOR": "cpu"}
    # Nothing is compiled: gloo alone.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    wanted = {name: _alone(dtype) for name, dtype in DTYPES.items()}
    found = {f"{name} {stage}": _train(stage, dtype) for name, dtype in DTYPES.items() for stage in (1, 2, 3)}
    return {"wanted": wanted, "found": found}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def ranks(run_ranks):
    pytest.importorskip("deepspeed")
    return run_ranks(_all_stages, 2)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fold_outlasts_the_engines_step(ranks, dtype, stage):
    for rank in ranks:
        found, wanted = rank["found"][f"{dtype} {stage}"], rank["wanted"][dtype]
        assert wanted.abs().max() > 0.05
        # Weights in bf16 hold the copy rounded; one process without copies rounds each fold.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if dtype == "float32" else 0.02)
