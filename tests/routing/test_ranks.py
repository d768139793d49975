"""Routers on several ranks: what must be the same on all, and the same as in one process that has all tokens."""

import copy
import datetime
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import sinkroute
from sinkroute.routing.ranks import Ranks
from sinkroute.routing.registry import router_options

TOKENS, E, K, D, STEPS = 48, 5, 2, 6, 4
EVEN = {1: [0, 48], 2: [0, 24, 48], 4: [0, 12, 24, 36, 48]}
UNEVEN = {1: [0, 48], 2: [0, 31, 48], 4: [0, 5, 17, 31, 48]}
PLANS = {
    "sinkhorn": {},
    "ssr-l": {"probability": 1.0, "noise": 0},
    "ssr-s": {"probability": 1.0, "noise": 0},
}
# What remembers: the name, and options with which ranks and micro-batches together are one process with all tokens.
KEPT = {
    "loss-free": {},
    "smebu": {},
    "quantile": {"scope": "batch", "score": "sigmoid"},
    "ssr-bias": {"probability": 1.0, "balance": "plan", "process_group": "world", "tol": 1e-6},
    "ssr-fold": {"probability": 1.0, "balance": "plan", "process_group": "world", "tol": 1e-6},
    "ssr-s": {"probability": "adaptive(high=1.3, low=1.1, decay=0.5)", "noise": 0, "process_group": "world"},
}


def all_logits(step, part=0):
    generator = torch.Generator().manual_seed(10 * step + part)
    # The first expert is wanted too much, and by the last step no more.
    return torch.randn(TOKENS, E, generator=generator) + torch.tensor([3.0 - step, 0.5, 0.0, 0.0, -0.5])


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rows(bounds):
    rank, world = rank_and_world()
    return slice(bounds[world][rank], bounds[world][rank + 1])


def make(name, **options):
    router = sinkroute.create_router(name, num_experts=E, top_k=K, **options)
    router.gate = router.make_gate(D) if name == "ssr-fold" else None
    return router


def facts(router):
    """What is remembered: buffers without the copies of counts, and the bias of a gate."""
    found = {name: x for name, x in router.named_buffers() if "saved" not in name}
    return found | ({} if router.gate is None else {"gate": router.gate.bias.detach().clone()})


# -- what runs on a rank, and in this process for comparison -----------------------------------------------------------


def draws():
    found = {}
    for draw in ("step", "layer"):
        router, found[draw] = make("ssr-s", probability=0.5, draw=draw), []
        for step in range(20):
            sinkroute.set_step(router, step)
            found[draw].append(router(all_logits(0)[rows(EVEN)]).branch)
    found["noise"] = router.draw_normal(torch.empty(4, 3))
    return found


def noise_beside_tensor_parallel_ranks():
    """Ranks 0 and 1 (and 2 and 3) hold the same tokens; those that are balanced together are of other pairs."""
    rank, world = rank_and_world()
    groups = [dist.new_group(list(range(first, world, 2))) for first in (0, 1)]
    return make("ssr-s", process_group=groups[rank % 2]).draw_normal(torch.empty(4, 3))


def remembered(bounds=UNEVEN, real=None):
    """{name: what it remembers after each step of two micro-batches}.

    `real`: from step 1 on, tokens from this one on are padding; a rank with only such has no tokens at all in the first
    micro-batch.
    """
    found = {}
    for name, options in KEPT.items():
        router, found[name] = make(name, **options), []
        for step in range(STEPS):
            for part in range(2):
                sinkroute.set_step(router, step, part)
                logits_TE, mask = all_logits(step, part)[rows(bounds)], None
                if real is not None and step > 0:
                    mask = torch.arange(TOKENS)[rows(bounds)] < real
                    if part == 0 and not mask.any():
                        logits_TE, mask = logits_TE[:0], mask[:0]
                router(logits_TE, mask)
            sinkroute.end_step(router)
            found[name].append({key: x.clone() for key, x in facts(router).items()})
    return found


def quantiles(parts=None):
    """The bias by quantiles of micro-batches: those of ranks count as micro-batches of one process do."""
    router = make("quantile")
    for step in range(STEPS):
        sinkroute.set_step(router, step)
        for part in parts or [rows(UNEVEN)]:
            router(all_logits(step)[part])
    sinkroute.end_step(router)
    return router.state.bias_E


def global_losses():
    """Of two micro-batches of a step: loss and gradient of this rank's rows."""
    router, found = make("global-load-balance", coefficient=1.0), []
    for step in range(2):
        for part in range(2):
            sinkroute.set_step(router, step, part)
            logits_TE = all_logits(step, part)[rows(EVEN)].requires_grad_()
            loss = router(logits_TE).aux_loss
            loss.backward()
            found.append((loss.detach(), logits_TE.grad))
    return found


def plans():
    found = {}
    for name, options in PLANS.items():
        routes = make(name, process_group="world", tol=1e-6, **options)(all_logits(1)[rows(UNEVEN)])
        found[name] = (routes.experts, routes.weights, routes.load)
    return found


def every_router_with_an_idle_rank():
    """The last rank has first no tokens, then only padding; who waits for whom must not depend on it."""
    rank, world = rank_and_world()
    found = []
    for name in sinkroute.list_routers():
        options = {"losses": {"global-load-balance": 1.0}, "process_group": "world"}
        options |= {"probability": 1.0} if "probability" in router_options(name) else {}
        layer = sinkroute.MoE(D, 4, E, K, router=name, router_options=options)
        for step in range(3):
            sinkroute.set_step(layer, step, total_steps=3)
            idle = rank == world - 1 and step > 0
            x = torch.randn(0 if idle and step == 1 else 6, D)
            y = layer(x, torch.full((len(x),), not idle), token_ids=torch.arange(len(x)))
            (y.sum() + layer.routes.aux_loss).backward()
            trained = [parameter for parameter in layer.gate.parameters() if parameter.requires_grad]
            assert all(parameter.grad.isfinite().all() for parameter in trained), name
        sinkroute.end_step(layer)
        found.append(name)
    return found


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {"loss-free": {}, "quantile": {}, "ssr-bias": {"probability": 0.5}, "ssr-fold": {"probability": 0.5}}
        self.layers = nn.ModuleList(
            sinkroute.MoE(D, 4, E, K, router=name, router_options=options[name] | {"losses": ["global-load-balance"]})
            for name in options
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x, sum(layer.routes.aux_loss for layer in self.layers)


def data_parallel():
    """A model under DistributedDataParallel after some steps, and what became of its counts within a step."""
    rank, _ = rank_and_world()
    model = Model()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(STEPS):
        for part in range(2):
            sinkroute.set_step(wrapped, step, part)
            torch.manual_seed(100 * step + 10 * part + rank)
            y, aux_loss = wrapped(torch.randn(8 + 2 * rank, D))
            (y.square().mean() + aux_loss).backward()
        if step == STEPS - 1:
            counts = [layer.router.state.load_E.clone() for layer in model.layers]
        optimizer.step()
        optimizer.zero_grad()
    sinkroute.end_step(wrapped)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    return {"state": state, "counts": counts, "loads": 2 * K * (8 + 2 * rank)}


def checkpoints():
    """What a wrapped model holds that was loaded from rank 0's checkpoint, and whether it is what rank 0 saved."""
    rank, _ = rank_and_world()
    torch.manual_seed(rank)
    trained = Model()
    sinkroute.set_step(trained, 7)
    trained(torch.randn(9, D))
    sinkroute.end_step(trained)
    saved = get_model_state_dict(DistributedDataParallel(trained), options=StateDictOptions(full_state_dict=True))
    found = []
    for options in (StateDictOptions(), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)):
        model = DistributedDataParallel(Model())
        mine = saved if not options.broadcast_from_rank0 or rank == 0 else {}
        set_model_state_dict(model, dict(mine), options=options)
        state = model.module.layers[0].router.state
        found.append((state.bias_E.clone(), state.current, state.ended))
    return found


def on_a_rank():
    return {
        "draws": draws(),
        "noise beside": noise_beside_tensor_parallel_ranks(),
        "remembered": remembered(),
        "idle": remembered(real=UNEVEN[2][1]),
        "quantiles": quantiles(),
        "global losses": global_losses(),
        "plans": plans(),
        "every router": every_router_with_an_idle_rank(),
        "data parallel": data_parallel(),
        "checkpoints": checkpoints(),
    }


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def results(run_ranks, request):
    return run_ranks(on_a_rank, request.param)


def assert_alike(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


# -- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["step", "layer"])
def test_the_branch_is_the_same_on_all_ranks(results, draw):
    branches = [result["draws"][draw] for result in results]
    assert all(other == branches[0] for other in branches) and set(branches[0]) == {"softmax", "sinkhorn"}


def test_the_noise_is_another_on_every_rank(results):
    noises = {tuple(result["draws"]["noise"].flatten().tolist()) for result in results}
    assert len(noises) == len(results)


def test_ranks_with_the_same_tokens_draw_the_same_noise_where_the_group_says_who_has_others(results):
    noises = [result["noise beside"] for result in results]
    for first in range(0, len(noises), 2):
        assert torch.equal(noises[first], noises[first + 1])
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(noises) // 2


# -- what is remembered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_what_is_remembered_is_the_same_on_all_ranks_and_as_in_one_process(results, name):
    expected = remembered()[name]
    for result in results:
        for found, first, alone in zip(
            result["remembered"][name], results[0]["remembered"][name], expected, strict=True
        ):
            assert_alike(found, first, rtol=0, atol=0)
            assert_alike(found, alone, rtol=0, atol=2e-5)


def test_what_one_process_remembers_changes_in_these_steps():
    # Or the test above would compare nothing.
    for name, history in remembered().items():
        moved = {key for key in history[0] if any(not torch.equal(history[0][key], after[key]) for after in history)}
        # What ssr-fold finds is in the gate, and nothing of it stays in its state.
        still = {"state.bias_E"} if name == "ssr-fold" else set()
        assert moved == ({"state.max_vio", "state.firing"} if name == "ssr-s" else set(history[0]) - still), name


def test_quantiles_of_ranks_count_as_those_of_micro_batches(results):
    bounds = UNEVEN[len(results)]
    expected_E = quantiles([slice(*pair) for pair in itertools.pairwise(bounds)])
    for result in results:
        torch.testing.assert_close(result["quantiles"], expected_E, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", KEPT)
def test_a_rank_without_real_tokens_changes_nothing_for_the_others(results, name):
    expected = remembered(real=UNEVEN[2][1])[name]
    for result in results:
        for found, alone in zip(result["idle"][name], expected, strict=True):
            assert_alike(found, alone, rtol=0, atol=2e-5)


def test_no_router_waits_in_vain_for_a_rank_without_real_tokens(results):
    assert all(result["every router"] == sinkroute.list_routers() for result in results)


# -- losses and routes -----------------------------------------------------------------------------------------------


def test_the_mean_of_the_global_losses_is_that_of_one_process_over_the_micro_batches_of_a_step(results):
    for part, (loss, grad_TE) in enumerate(global_losses()):
        losses, gradients = zip(*(result["global losses"][part] for result in results), strict=True)
        torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.cat(gradients) / len(results), grad_TE, rtol=0, atol=1e-8)


def test_the_global_loss_is_E_times_the_share_so_far_times_the_mean_score():
    for index, (loss, _) in enumerate(global_losses()):
        step, part = divmod(index, 2)
        chosen = torch.cat([all_logits(step, p).topk(K).indices.flatten() for p in range(part + 1)]).tolist()
        score_E = all_logits(step, part).softmax(-1).mean(0)
        by_hand = E * sum(chosen.count(e) / len(chosen) * score_E[e].item() for e in range(E))
        assert loss.item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_ranks_of_a_group_route_as_one_process_with_all_tokens(results, name):
    expected = plans()[name]
    experts_TK, weights_TK = (torch.cat([result["plans"][name][i] for result in results]) for i in (0, 1))
    assert torch.equal(experts_TK, expected[0])
    torch.testing.assert_close(weights_TK, expected[1], rtol=0, atol=1e-5)
    assert torch.equal(sum(result["plans"][name][2] for result in results), expected[2])


# -- data parallelism and checkpoints --------------------------------------------------------------------------------


def test_a_wrapped_model_stays_the_same_on_all_ranks(results):
    first = results[0]["data parallel"]["state"]
    for result in results[1:]:
        assert_alike(result["data parallel"]["state"], first, rtol=0, atol=0)
    start = Model().state_dict()
    moved = [name for name in first if "bias_E" in name or name.endswith("bias")]
    moved.remove("layers.3.router.state.bias_E")  # of ssr-fold, which has it in the gate
    assert all(not torch.equal(first[name], start[name]) for name in moved)


def test_the_wrapper_leaves_the_counts_of_each_rank_alone(results):
    for result in results:
        assert all(counts.sum() == result["data parallel"]["loads"] for counts in result["data parallel"]["counts"])


def test_a_wrapped_model_takes_a_checkpoint_with_all_that_is_remembered(results):
    for way in range(2):
        found = [result["checkpoints"][way] for result in results]
        assert all(torch.equal(bias_E, found[0][0]) and bias_E.any() for bias_E, *_ in found)
        assert all(steps == [7, 7] for _, *steps in found)


# -- errors ----------------------------------------------------------------------------------------------------------


def one_rank_ends_the_step_alone():
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    router = make("loss-free", process_group=group)
    sinkroute.set_step(router, 0)
    router(all_logits(0))
    if dist.get_rank() == 0:
        sinkroute.end_step(router)


def test_a_rank_that_waits_in_vain_fails_and_says_so(run_ranks):
    with pytest.raises(
        pytest.fail.Exception, match=r"(?s)alone failed on 2 ranks.*end of step 0: a rank of \[0, 1\] did not answer"
    ):
        run_ranks(one_rank_ends_the_step_alone, 2)


def test_copies_of_a_router_share_its_group_which_cannot_be_copied():
    router = sinkroute.create_router("softmax", num_experts=4, top_k=2, process_group=dist.ProcessGroup(0, 1))
    twin = copy.deepcopy(router)
    assert twin.ranks == router.ranks and twin.options == router.options


@pytest.mark.parametrize("group", ["", 2, [0, 1]])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(TypeError, match=r'process_group must be a ProcessGroup, "world", .* or None, got .*new_group'):
        Ranks(group)


def test_a_name_that_no_mesh_stands_for_is_refused_in_the_first_pass():
    router = sinkroute.create_router("ssr-l", num_experts=4, top_k=2, process_group="wolrd")
    with pytest.raises(ValueError, match=r"process_group='wolrd' names a dimension .* no mesh is known .*\"world\""):
        router(torch.randn(6, 4))
    assert Ranks("loss").name == "loss" and Ranks("loss") != Ranks("dp_cp")


def groups_of_a_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    router = make("ssr-l", process_group=mesh["dp"])
    twin, found = copy.deepcopy(router), router.ranks
    assert twin.ranks == found and found.plan == found.load == found.noise
    with pytest.raises(ValueError, match=r"device mesh of 2 dimensions, \('dp', 'tp'\); give one of them"):
        Ranks(mesh)
    # Ranks 0 and 1 hold the same tokens, so do 2 and 3.
    return router.draw_normal(torch.empty(4, 3))


def test_a_device_mesh_of_one_dimension_is_a_group(run_ranks):
    first, second, third, fourth = run_ranks(groups_of_a_mesh, 4)
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(first, third)
