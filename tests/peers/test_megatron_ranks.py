"""Our routers in Megatron-Core's GPT models on four gloo processes, against one process that has all the tokens.

The long matrix is marked `ranks`; the first layout is the sample that always runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sinkroute
from sinkroute.kernels.normal import normal_like

pytest.importorskip("megatron.core.models.gpt")

EXPERTS, TOP_K, WIDTH = 8, 2, 16
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
# Of four ranks: the sizes of the groups, and those of two that a checkpoint is loaded into. The rest is data-parallel.
LAYOUTS = {
    "tp2-ep2-dp2": ({"tp": 2, "ep": 2}, {"ep": 2}),
    "pp2-dp2": ({"pp": 2}, {"tp": 2}),
    "ep2-dp4": ({"ep": 2}, {"pp": 2}),
    "tp2-etp2-ep2-dp2": ({"tp": 2, "ep": 2, "etp": 2}, {}),
    "tp2-pp2": ({"tp": 2, "pp": 2}, {"tp": 2}),
    "tp4": ({"tp": 4}, {"tp": 2, "ep": 2}),
    "cp2-dp2": ({"cp": 2}, {"cp": 2}),
    "pp2-vp2-dp2": ({"pp": 2, "vp": 2}, None),
    "recomputed-pp2-dp2": ({"pp": 2, "recomputed": 1}, None),
    "pp2-mtp1-dp2": ({"pp": 2, "mtp": 1}, {"mtp": 1}),
}
METHODS = {
    "ssr-l with noise": ("ssr-l", {"probability": 0.5, "noise": 1.0, "tol": 1e-6}, {}),
    "ssr-dual": ("ssr-dual", {}, SIGMOID),
    "ssr-dual in the gate": ("ssr-dual", {}, {}),
    "loss-free": ("loss-free", {"update_rate": 0.01}, SIGMOID),
}


def sample_first(names):
    return [name if number == 0 else pytest.param(name, marks=pytest.mark.ranks) for number, name in enumerate(names)]


class Ranks:
    """Ranks that are forked from one process, which has imported Megatron once."""

    def __init__(self, folder: Path) -> None:
        program = Path(__file__).with_name("megatron_cells.py")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        self.folder, self.jobs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(program), str(folder)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, world, *calls):
        """What the calls return, by rank."""
        folder = self.folder / str(self.jobs)
        self.jobs += 1
        self.process.stdin.write(json.dumps({"world": world, "calls": calls}) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        if any(codes):
            logs = [(folder / f"{rank}.log").read_text() for rank in range(world)]
            said = "\n".join(
                f"-- rank {rank}: {code}\n{log}" for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
            )
            pytest.fail(f"{calls} failed on {world} ranks\n{said}", pytrace=False)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = Ranks(tmp_path_factory.mktemp("megatron"))
    yield found
    found.process.stdin.close()
    found.process.wait(timeout=20)


@pytest.fixture(scope="module")
def cells(ranks):
    """`cells(layout)`: method → what each of four ranks saw."""
    known = {}

    def cell(layout):
        if layout not in known:
            sizes, other = LAYOUTS[layout]
            calls = []
            for method, (router, options, config) in METHODS.items():
                folder = None if other is None else str(ranks.folder / layout / method)
                calls.append([sizes, "trained", [router, options | {"plan_ranks": "tp_dp_cp"}, config, folder]])
            known[layout] = dict(zip(METHODS, zip(*ranks.call(4, *calls), strict=True), strict=True))
        return known[layout]

    return cell


def by_layer(found):
    """Layer → the ranks that have it, in the order of their group."""
    layers = {layer for rank in found for layer in rank["seen"]}
    return {layer: [rank for rank in found if layer in rank["seen"]] for layer in sorted(layers)}


# -- the routes ------------------------------------------------------------------------------------------------------


def one_process(method, layer, have):
    """One process that has all the tokens: the passes' experts (passes, T, K), the router, the passes' branches."""
    router, options, config = METHODS[method]
    scoring = {"score": "sigmoid"} if config else {}
    if router == "ssr-dual":
        scoring["bias_on"] = "scores"
    alone = sinkroute.create_router(router, num_experts=EXPERTS, top_k=TOP_K, layer=layer, **options, **scoring)
    logits_RPTE = torch.stack([rank["seen"][layer]["logits"] for rank in have])
    alone.draw_normal = lambda all_TE: torch.cat(
        [normal_like(part_TE, seed_of(alone, place)) for place, part_TE in enumerate(all_TE.chunk(len(have)))]
    )
    experts, branches = [], []
    for part in range(logits_RPTE.shape[1]):
        sinkroute.set_step(alone, part // 2)  # of two micro-batches each
        if alone.sinkhorn_now is not False:
            routes = [alone(logits_RPTE[:, part].flatten(0, 1))]
        else:  # each rank has other noise
            routes = []
            for place, logits_TE in enumerate(logits_RPTE[:, part]):
                alone.ranks = alone.ranks._replace(noise=SimpleNamespace(rank=place))
                routes.append(alone(logits_TE))
        experts.append(torch.cat([each.experts for each in routes]))
        branches.append(routes[0].branch)
    sinkroute.end_step(alone)
    return torch.stack(experts), alone, branches


def seed_of(router, place):
    router.ranks = router.ranks._replace(noise=SimpleNamespace(rank=place))
    return router.noise_seed().clone()


def chosen(experts):
    return torch.zeros(*experts.shape[:-1], EXPERTS, dtype=torch.bool).scatter(-1, experts, True)


@pytest.mark.parametrize("layout", sample_first(LAYOUTS))
@pytest.mark.parametrize("method", ["ssr-l with noise", "loss-free"])
def test_routes_are_those_of_one_process_with_all_the_tokens(cells, layout, method):
    for layer, have in by_layer(cells(layout)[method]).items():
        wanted_PTK, _, branches = one_process(method, layer, have)
        found_PTK = torch.cat([rank["seen"][layer]["experts"] for rank in have], 1)
        assert torch.equal(chosen(found_PTK), chosen(wanted_PTK))
        assert set(branches) == ({"softmax", "sinkhorn"} if method.startswith("ssr-l") else {"softmax"})


@pytest.mark.ranks
@pytest.mark.parametrize("method", METHODS)
def test_a_pass_that_is_repeated_has_the_same_routes(cells, method):
    for layer, have in by_layer(cells("recomputed-pp2-dp2")[method]).items():
        for rank in have:
            assert torch.equal(rank["seen"][layer]["again"], rank["seen"][layer]["experts"])


@pytest.mark.parametrize("layout", sample_first(LAYOUTS))
@pytest.mark.parametrize("method", METHODS)
def test_each_token_is_counted_once(cells, layout, method):
    for layer, have in by_layer(cells(layout)[method]).items():
        load_E = sum(chosen(rank["seen"][layer]["experts"]).sum((0, 1)) for rank in have)
        tokens = 8 * 32 * (int(layout[-1]) if "dp" in layout else 1)  # passes, tokens of a micro-batch, replicas
        assert load_E.sum() == tokens * TOP_K
        for rank in have:
            assert torch.equal(rank["loads"][layer].long(), load_E)


@pytest.mark.parametrize("layout", sample_first(LAYOUTS))
@pytest.mark.parametrize("method", METHODS)
def test_ranks_with_a_layer_hold_the_same(cells, layout, method):
    for layer, have in by_layer(cells(layout)[method]).items():
        assert len(have) == len(have[0]["stage"])
        for rank in have[1:]:
            assert rank["state"][layer].keys() == have[0]["state"][layer].keys()
            for name, value in rank["state"][layer].items():
                assert torch.equal(value, have[0]["state"][layer][name]), name


@pytest.mark.parametrize("layout", sample_first(LAYOUTS))
def test_a_bias_by_loads_is_that_of_one_process(cells, layout):
    for layer, have in by_layer(cells(layout)["loss-free"]).items():
        bias_E = one_process("loss-free", layer, have)[1].serving().bias_E
        assert bias_E.abs().max() > 0.005
        assert torch.equal(have[0]["state"][layer]["expert_bias"], bias_E)


@pytest.mark.parametrize("layout", sample_first(LAYOUTS))
def test_a_bias_by_potentials_balances_the_tokens_of_all_ranks_as_one_process_does(cells, layout):
    # Not the same bias: each rank finds how dense its own tokens are at the edge of experts, of 16 or 32 in a pass.
    for layer, have in by_layer(cells(layout)["ssr-dual"]).items():
        scores_TE = torch.cat([rank["seen"][layer]["logits"].flatten(0, 1) for rank in have]).sigmoid()

        def max_vio(bias_E, scores_TE=scores_TE):
            load_E = chosen((scores_TE + bias_E).topk(TOP_K).indices).sum(0).double()
            return (load_E.max() / load_E.mean() - 1).item()

        found = max_vio(have[0]["state"][layer]["expert_bias"])
        assert found < 0.7 * max_vio(torch.zeros(EXPERTS))
        assert found < max_vio(one_process("ssr-dual", layer, have)[1].serving().bias_E) + 0.2


@pytest.mark.ranks
def test_megatron_refuses_tokens_that_tensor_parallel_ranks_have_alike(ranks):
    for (said,) in ranks.call(2, [{"tp": 2}, "without_sequence_parallelism", []]):
        assert "without also enabling sequence parallelism" in said


# -- gates that are moved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sample_first(["tp2-dp2", "pp2-dp2"]))
def test_all_gates_of_a_stage_are_moved_by_two_messages(ranks, layout):
    for (rank,) in ranks.call(4, [SPREAD[layout][1], "moved_copies", []]):
        layers = 4 // SPREAD[layout][1].get("pp", 1)
        # What is counted, of all layers at once: loads, densities, the tokens' mean. Then whether there are copies.
        assert rank["messages"] == [[layers * (2 * EXPERTS + 4 + WIDTH), 1]] * 3
        assert rank["apart"] < 0.1 * rank["moved"]
        assert "keeps a float32 copy of that where it cannot be found" in rank["refused"]


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", sample_first([name for name, (_, other) in LAYOUTS.items() if other is not None]))
def test_a_checkpoint_of_four_ranks_goes_on_on_two_and_on_one(ranks, cells, layout):
    saved, (sizes, other) = cells(layout), LAYOUTS[layout]
    for world, parts in ((2, other), (1, {"mtp": sizes.get("mtp", 0)})):
        calls = []
        for method, (router, options, config) in METHODS.items():
            calls.append([parts, "resumed", [router, options, config, str(ranks.folder / layout / method)]])
        for method, found in zip(METHODS, zip(*ranks.call(world, *calls), strict=True), strict=True):
            state = {layer: values for rank in saved[method] for layer, values in rank["state"].items()}
            for rank in found:
                for layer, values in rank["state"].items():
                    for name, value in values.items():
                        assert torch.equal(value, state[layer][name]), (method, layer, name)
            if "cp" not in sizes or world == 2:  # with one rank comes another attention (`NearAttention`)
                assert loss(found) == pytest.approx(loss(saved[method]), rel=1e-5), (method, world)


def loss(found):
    """Of a batch that is the same on all layouts."""
    parts = [part for rank in found for part in rank["evaluated"]]
    return sum(parts) / len(parts)


# -- the gradient of losses ------------------------------------------------------------------------------------------

COEFFICIENT = 0.5
QUIET = {"probability": 0.0, "noise": 0.0}
# Ranks, and the sizes of their groups. The rest is data-parallel.
SPREAD = {
    "tp2": (2, {"tp": 2}),
    "one rank": (1, {}),
    "dp2": (2, {}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-dp2": (4, {"tp": 2}),
    "tp2-ep2-dp2": (4, {"tp": 2, "ep": 2}),
    "tp2-cp2": (4, {"tp": 2, "cp": 2}),
    "cp2-dp2": (4, {"cp": 2}),
    "pp2-dp2": (4, {"pp": 2}),
    "recomputed-pp2-dp2": (4, {"pp": 2, "recomputed": 1}),
}
LOSSES = ("z-loss", "load-balance", "global-load-balance")
PER_TOKEN = {"calculate_per_token_loss": True}


@pytest.fixture(scope="module")
def gradients(ranks):
    """`gradients(layout)`: (loss, micro-batches) → what each rank has."""
    known = {}

    def found(layout):
        if layout not in known:
            world, sizes = SPREAD[layout]
            runs = {
                (loss, parts): (parts, "ssr-l", QUIET | {"losses": {loss: COEFFICIENT}}, {})
                for loss in LOSSES
                for parts in (1, 2)
            }
            runs["z-loss, per token", 2] = (2, "ssr-l", QUIET | {"losses": {"z-loss": COEFFICIENT}}, PER_TOKEN)
            runs["Megatron's z-loss", 2] = (2, None, None, {"moe_z_loss_coeff": COEFFICIENT})
            calls = [
                [sizes, "gate_gradients", [router, options, config, parts]]
                for parts, router, options, config in runs.values()
            ]
            known[layout] = dict(zip(runs, zip(*ranks.call(world, *calls), strict=True), strict=True))
        return known[layout]

    return found


def of_one_process(loss, weight_ED, inputs_RPTD):
    """The gradient of a gate in float64, of the mean over ranks and micro-batches."""
    weight_ED = weight_ED.double().requires_grad_()
    logits_RPTE = inputs_RPTD.double() @ weight_ED.T
    if loss == "z-loss":
        total = logits_RPTE.logsumexp(-1).square().mean()
    else:
        shares_RPE = logits_RPTE.softmax(-1).mean(2)
        load_RPE = chosen(logits_RPTE.topk(TOP_K).indices).sum(2).double()
        if loss == "global-load-balance":  # over all ranks and the micro-batches so far
            load_RPE = load_RPE.sum(0).cumsum(0).expand_as(shares_RPE)
        total = EXPERTS * (load_RPE / load_RPE.sum(-1, keepdim=True) * shares_RPE).sum(-1).mean()
    (COEFFICIENT * total).backward()
    return weight_ED.grad


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", sample_first(SPREAD))
def test_a_coefficient_is_the_same_on_all_layouts(gradients, layout, loss, micro_batches):
    check_gradient(loss, gradients(layout)[loss, micro_batches])


@pytest.mark.parametrize("run", ["z-loss, per token", "Megatron's z-loss"])
@pytest.mark.parametrize("layout", sample_first(SPREAD))
def test_a_coefficient_is_as_megatrons_and_the_same_for_losses_per_token(gradients, layout, run):
    check_gradient("z-loss", gradients(layout)[run, 2])


def check_gradient(loss, found):
    layers = sorted({layer for rank in found for layer in rank["gates"]})
    assert layers == [1, 2]
    for layer in layers:
        gates = [rank["gates"][layer] for rank in found if layer in rank["gates"]]
        wanted_ED = of_one_process(loss, gates[0]["weight"], torch.stack([gate["inputs"] for gate in gates]))
        for gate in gates:
            torch.testing.assert_close(
                gate["gradient"].double(), wanted_ED, rtol=1e-4, atol=1e-6 * wanted_ED.abs().max()
            )
