"""A dense model's copies as experts behind a gate of zeros: what no gate can tell apart is spread in training."""

import copy

import pytest
import torch

import sinkroute

transformers = pytest.importorskip("transformers")


def upcycled():
    """A tiny Mixtral whose 8 experts are copies of one, and whose gates are zero."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            for weight in layer.mlp.experts.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    return model


def loads(model, ids):
    with sinkroute.LoadMonitor(model) as monitor:
        model(input_ids=ids)
        mode = "train" if model.training else "eval"
        return torch.tensor([row["load"] for row in monitor.metrics(mode).values()])


@pytest.mark.parametrize("method", ["softmax", "load-balance"])
def test_copies_of_one_expert_get_equal_loads_in_training_and_serve_as_before(method):
    model = upcycled().train()
    plain = copy.deepcopy(model).eval()
    handle = sinkroute.patch(model, method, ties="spread")
    sinkroute.set_step(model, 0)
    ids = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(1))
    # 256 expected, with a standard deviation of 14. Without the option two experts have all.
    assert (loads(model, ids) - 256).abs().max() < 75
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    handle.remove()
