"""Our routers beside those of other packages, forward and backward, in one process and on the same logits.

    .venv-megatron/bin/python benchmarks/routing_peers.py megatron 4096x16x2 SECONDS SEED

Each package pins what another forbids and has its environment (`make test-peers` builds them); transformers
comes with the project. Prints a line of JSON: times relative to our plain top-k, `*` marking what is not ours.
`benchmarks/routing.py` runs all that are there.

What is compared must do the same work: transformers' routers hold the gate's matrix, so there ours are timed with a
gate in front; the others take logits. All are given the gradient of their weights, and of their loss where there is
one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHONS = {
    "transformers": Path(sys.executable),
    **{name: ROOT / f".venv-{name}/bin/python" for name in ("megatron", "torchtitan", "deepspeed")},
}
SIZES = ("4096x16x2", "32768x64x2", "131072x256x8")
# DeepSpeed's gates make dispatch masks of tokens x experts x places, which at the next size are 8 GiB each.
SIZES_OF = {"deepspeed": SIZES[:1]}
WIDTH = 64  # of the tokens before a gate: small, so that its matrix does not hide what is measured
COEFFICIENT = 0.01

Call = Callable[[], object]


def measure_peers(content: dict[str, Any], tell: Callable[[str], None], *, seconds: float, seed: int) -> None:
    """Put into `content` what is not there yet, by package and size."""
    for package, python in PYTHONS.items():
        for size in SIZES_OF.get(package, SIZES):
            found = content.setdefault(package, {})
            if size in found or not python.exists():
                continue
            tell(f"{package} {size}")
            command = [str(python), __file__, package, size, str(seconds), str(seed)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{package} at {size} failed: {done.stderr.strip()[-500:]}")
            found[size] = json.loads(done.stdout.splitlines()[-1])


def main(package: str, size: str, seconds: str, seed: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from sinkroute.lab.bench import Size
    from sinkroute.lab.bench.timing import compare

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problem = Problem(Size.parse(size), int(seed))
    calls, version = PACKAGES[package](problem)
    timing = compare(calls, "softmax", torch.device("cpu"), repeats=5, seconds=float(seconds), seed=int(seed))
    ratios = {name: [float(f"{value:.4g}") for value in values] for name, values in timing.ratios.items()}
    milliseconds = float(f"{timing.milliseconds:.4g}")
    print(json.dumps({"version": version, "softmax_ms": milliseconds, "turns": timing.turns, "ratios": ratios}))


@dataclass
class Problem:
    """Logits, the gate and tokens that give like ones, and the gradient of the weights."""

    size: Any
    seed: int

    def __post_init__(self) -> None:
        import torch

        size = self.size
        generator = torch.Generator().manual_seed(1)
        self.logits_TE = size.logits(size.experts, self.seed, torch.device("cpu")).requires_grad_()
        self.x_TD = torch.randn(size.tokens, WIDTH, generator=generator).requires_grad_()
        self.gate_ED = torch.nn.Parameter(torch.randn(size.experts, WIDTH, generator=generator) / WIDTH**0.5)
        self.gradient_TK = torch.randn(size.tokens, size.top_k, generator=generator)
        self.gradient_TE = torch.randn(size.tokens, size.experts, generator=generator)

    def backward(self, weights: Any, gradient: Any, loss: Any = None) -> None:
        import torch

        tensors = [weights] if loss is None else [weights, loss]
        torch.autograd.backward(tensors, [gradient] if loss is None else [gradient, None])
        self.logits_TE.grad = self.x_TD.grad = self.gate_ED.grad = None

    def ours(self, name: str, *, gate: bool = False, **options: Any) -> Call:
        """A router of ours, without `set_step`: theirs know no steps."""
        import torch.nn.functional as F

        import sinkroute

        router = sinkroute.create_router(name, num_experts=self.size.experts, top_k=self.size.top_k, **options)
        sinkroute.set_step(router, 0)

        def call() -> None:
            routes = router(F.linear(self.x_TD, self.gate_ED) if gate else self.logits_TE)
            self.backward(routes.weights, self.gradient_TK, routes.aux_loss)

        return call


Contest = tuple[Mapping[str, Call], str]


def transformers(problem: Problem) -> Contest:
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    size = problem.size
    shared = {"num_experts_per_tok": size.top_k, "hidden_size": WIDTH, "norm_topk_prob": True}
    config = SimpleNamespace(num_experts=size.experts, num_local_experts=size.experts, **shared)

    def theirs(kind: Any, loss: bool) -> Call:
        router = kind(config)
        router.weight = problem.gate_ED

        def call() -> None:
            logits_TE, weights_TK, _ = router(problem.x_TD)
            term = COEFFICIENT * load_balancing_loss_func((logits_TE,), size.experts, size.top_k) if loss else None
            problem.backward(weights_TK, problem.gradient_TK, term)

        return call

    calls = {name: problem.ours(name, gate=True) for name in ("softmax", "load-balance", "ssr-l", "ssr-s")}
    calls |= {f"* {kind.__name__}": theirs(kind, loss=False) for kind in (MixtralTopKRouter, OlmoeTopKRouter)}
    calls["* OlmoeTopKRouter, load_balancing_loss_func"] = theirs(OlmoeTopKRouter, loss=True)
    return calls, f"transformers {transformers.__version__}"


def megatron(problem: Problem) -> Contest:
    import megatron.core
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    import sinkroute
    from sinkroute.adapters.megatron import make_router

    setattr(torch.cuda, "current_device", lambda: "cpu")  # noqa: B010  where it puts its buffers
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    world, size = dist.group.WORLD, problem.size

    def theirs(balancing: str, coefficient: float = 0.0, make: Callable[..., Any] = TopKRouter) -> Call:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=4,
            num_attention_heads=1,
            add_bias_linear=False,
            use_cpu_initialization=True,
            num_moe_experts=size.experts,
            moe_router_topk=size.top_k,
            moe_router_load_balancing_type=balancing,
            moe_aux_loss_coeff=coefficient,
        )
        router = make(config, SimpleNamespace(tp=world, cp=world, tp_cp=world, tp_dp_cp=world))
        router.set_layer_number(1)
        sinkroute.set_step(router, 0)

        def call() -> None:
            weights_TE, _ = router.routing(problem.logits_TE[:, None])
            problem.backward(weights_TE, problem.gradient_TE)

        return call

    calls = {name: problem.ours(name) for name in ("softmax", "load-balance", "sinkhorn", "ssr-l", "ssr-s")}
    for name in ("ssr-l", "ssr-s"):  # between plans; with one on every step
        calls[f"{name} in Megatron"] = theirs("none", make=make_router(name, probability=0.0))
    calls["ssr-l in Megatron, p = 1"] = theirs("none", make=make_router("ssr-l", probability=1.0))
    calls["* Megatron none"] = theirs("none")
    calls["* Megatron aux_loss"] = theirs("aux_loss", COEFFICIENT)
    calls["* Megatron sinkhorn"] = theirs("sinkhorn")
    calls["* Megatron quantile_balancing"] = theirs("quantile_balancing")
    return calls, f"megatron-core {megatron.core.__version__}"


def torchtitan(problem: Problem) -> Contest:
    from importlib.metadata import version

    import torch
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    size = problem.size
    options = {"num_experts": size.experts, "top_k": size.top_k, "score_func": "softmax", "route_norm": True}
    gate = Linear.Config(in_features=size.experts, out_features=size.experts, bias=False)
    router = TokenChoiceTopKRouter.Config(gate=gate, **options).build()
    router.gate = torch.nn.Identity()
    bias_E = torch.zeros(size.experts)

    def theirs() -> None:
        weights_BLK, _, _ = router(problem.logits_TE[None], bias_E)
        problem.backward(weights_BLK, problem.gradient_TK[None])

    calls = {name: problem.ours(name) for name in ("softmax", "loss-free", "ssr-l", "ssr-s")}
    return {**calls, "* torchtitan, softmax and bias": theirs}, f"torchtitan {version('torchtitan')}"


def deepspeed(problem: Problem) -> Contest:
    import deepspeed
    import torch
    from deepspeed.moe.sharded_moe import topkgating

    capacity = 1.25  # places per expert over the mean load, a usual choice
    gradients: list[torch.Tensor] = []  # as many places as it makes

    def theirs() -> None:
        loss, weights_TEC, _, _ = topkgating(problem.logits_TE, problem.size.top_k, capacity, 0)
        if not gradients:
            gradients.append(torch.ones_like(weights_TEC))
        problem.backward(weights_TEC, gradients[0], COEFFICIENT * loss)

    calls = {name: problem.ours(name) for name in ("softmax", "load-balance", "ssr-l", "ssr-s")}
    return {**calls, "* DeepSpeed topkgating": theirs}, f"deepspeed {deepspeed.__version__}"


PACKAGES = {"transformers": transformers, "megatron": megatron, "torchtitan": torchtitan, "deepspeed": deepspeed}

if __name__ == "__main__":
    main(*sys.argv[1:])
