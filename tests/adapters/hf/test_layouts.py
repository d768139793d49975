"""Patched models that `from_pretrained` spreads over several ranks: routed as one process routes the same tokens.

Expected is what one process finds, which holds the whole model and takes the tokens of all ranks, as one batch.
"""

import contextlib
import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import transformers

import sinkroute

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
LOW_RANK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=8, router_aux_loss_coef=0.0),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=8, router_aux_loss_coef=0.0),
    "qwen3": transformers.Qwen3MoeConfig(**SIZES, num_experts=8, router_aux_loss_coef=0.0),
    "deepseek": transformers.DeepseekV3Config(
        **SIZES, **LOW_RANK, n_routed_experts=8, n_group=1, topk_group=1, first_k_dense_replace=0
    ),
}
# Noise is drawn by rank: with it only ranks with the same tokens are alike.
METHODS = {
    "noise": ("ssr-l", {"probability": 0.0, "noise": 1.0}),
    "plan": ("ssr-s", {"probability": 1.0, "noise": 0.0, "process_group": "world"}),
    "dual": ("ssr-dual", {"process_group": "world"}),
    "loss": ("global-load-balance", {"coefficient": 0.1}),
    "loss-free": ("loss-free", {"update_rate": 0.05}),
}
STEPS = 2
TWO = {"tp2": {"tp_size": 2}, "ep2": {"tp_size": 2, "ep_size": 2}, "fsdp2": {"fsdp_size": 2}}
FOUR = {
    "fsdp2·tp2": {"fsdp_size": 2, "tp_size": 2},
    "fsdp2·tp2·ep4": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    "fsdp4·ep2": {"fsdp_size": 4, "ep_size": 2},
    "replicate2·fsdp2": {"dp_replicate_size": 2, "fsdp_size": 2},
    "tp4": {"tp_size": 4},
}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def tokens(step):
    return torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(step))


@contextlib.contextmanager
def saved(model):
    """A folder with the model, of rank 0, which alone writes."""
    is_spread = dist.is_initialized() and dist.get_world_size() > 1
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        if is_spread:
            dist.broadcast_object_list(folder, src=0)
        model.save_pretrained(folder[0])
        if is_spread:
            dist.barrier()
        yield folder[0]
        if is_spread:
            dist.barrier()


def trained(family, method, layout=None, parts=1):
    """Loss, routes, loads, the first gate's gradient and what is served by, after some steps of SGD.

    A step's tokens come in so many micro-batches.
    """
    torch.manual_seed(0)
    with saved(transformers.AutoModelForCausalLM.from_config(CONFIGS[family])) as folder:
        spread = {}
        if layout is not None:
            spread["distributed_config"] = transformers.distributed.DistributedConfig(**layout)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **spread).train()
    sizes = {} if layout is None else layout
    share = 0 if layout is None else dist.get_rank() // sizes.get("tp_size", 1)
    shares = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    name, options = METHODS[method]
    handle = sinkroute.patch(model, name, **options)
    gate = model.model.layers[0].mlp.gate
    found = {"loss": [], "routes": [], "gradient": []}
    routes = []
    for router in handle.routers.values():
        router.register_forward_hook(lambda router, inputs, output: routes.append(output.experts))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with sinkroute.LoadMonitor(model) as monitor:
        for step in range(STEPS):
            mean = torch.zeros(())
            for part, ids in enumerate(tokens(step).chunk(shares)[share].chunk(parts)):
                sinkroute.set_step(model, step, part, micro_batches=parts)
                loss = model(input_ids=ids, labels=ids).loss / parts
                loss.backward()
                mean += loss.detach()
            if layout is not None:
                dist.all_reduce(mean)
                mean /= dist.get_world_size()
            found["loss"].append(mean)
            found["routes"].append(torch.stack(routes).unflatten(0, (parts, -1)).transpose(0, 1).flatten(1, 2))
            found["gradient"].append(whole(gate.weight.grad).clone())
            routes.clear()
            optimizer.step()
            optimizer.zero_grad()
        sinkroute.end_step(model)
    load = next(iter(handle.routers.values())).ranks.load.group
    found["load"] = [torch.tensor(row["load"]) for row in monitor.metrics(process_group=load).values()]
    found["gate"] = whole(gate.weight).detach().clone()
    if family == "deepseek":
        found["bias"] = whole(gate.e_score_correction_bias).clone()
    stacked = {
        name: values if isinstance(values, torch.Tensor) else torch.stack(values) for name, values in found.items()
    }
    return {"share": share} | stacked


CELLS_2 = [
    *(("mixtral", method, "tp2") for method in ("noise", "plan", "dual", "loss")),
    ("mixtral", "noise", "ep2"),
    ("mixtral", "dual", "fsdp2"),
]
CELLS_4 = [
    *(("mixtral", method, "fsdp2·tp2") for method in ("noise", "plan", "dual", "loss")),
    *(("mixtral", method, cell) for cell in FOUR if cell != "fsdp2·tp2" for method in ("noise", "dual")),
    *((family, method, "fsdp2·tp2") for family in ("olmoe", "qwen3") for method in ("noise", "dual")),
    *(("deepseek", "loss-free", cell) for cell in ("fsdp2·tp2", "tp4")),
]


def _cells(cells, layouts):
    return {" ".join(cell): trained(*cell[:2], layouts[cell[2]]) for cell in cells}


def _two():
    return _cells(CELLS_2, TWO)


def _four():
    return _cells(CELLS_4, FOUR)


@pytest.fixture(scope="module")
def two(run_ranks):
    return run_ranks(_two, 2)


@pytest.fixture(scope="module")
def four(run_ranks):
    return run_ranks(_four, 4)


@functools.cache
def alone(family, method, parts):
    return trained(family, method, parts=parts)


@pytest.mark.parametrize("cell", CELLS_2, ids=" ".join)
def test_two_ranks_route_and_learn_as_one_process(two, cell):
    compare(two, cell)


@pytest.mark.ranks
@pytest.mark.parametrize("cell", CELLS_4, ids=" ".join)
def test_four_ranks_route_and_learn_as_one_process(four, cell):
    compare(four, cell)


def compare(ranks, cell):
    found = [rank[" ".join(cell)] for rank in ranks]
    by_share = {}
    for each in found:
        first = by_share.setdefault(each["share"], each)
        assert torch.equal(each["routes"], first["routes"])  # the same tokens: the same routes, to the last
        for name in ("load", "gate"):  # summed over all other tokens, each once; moved alike
            assert torch.equal(each[name], found[0][name]), name
        torch.testing.assert_close(each["gradient"], found[0]["gradient"], rtol=1e-5, atol=1e-7)
        if "bias" in each:
            assert torch.equal(each["bias"], found[0]["bias"]) and each["bias"].any()
    # A gate is moved along the mean token of each pass: for ssr-dual the passes have to be the same.
    one = alone(*cell[:2], len(by_share) if cell[1] == "dual" else 1)
    assert (found[0]["load"].sum(1) == one["load"].sum(1)).all()
    if cell[1] == "noise" and len(by_share) > 1:
        first, second = by_share[0]["routes"], by_share[1]["routes"]
        assert (first != second).any(-1).float().mean() > 0.5
        return
    routes = torch.cat([by_share[share]["routes"] for share in sorted(by_share)], dim=2)
    assert (routes == one["routes"]).all(-1).float().mean() > 0.98  # but for sums in another order
    torch.testing.assert_close(found[0]["loss"], one["loss"], rtol=1e-4, atol=1e-4)
    scale = one["gradient"].abs().max().clamp(min=1e-9)  # weights of a plan teach the gate nothing
    torch.testing.assert_close(found[0]["gradient"] / scale, one["gradient"] / scale, rtol=0, atol=0.01)
    for name in ("gate", "bias"):
        if name in one:
            scale = one[name].abs().max()
            torch.testing.assert_close(found[0][name] / scale, one[name] / scale, rtol=0, atol=0.01, msg=name)
