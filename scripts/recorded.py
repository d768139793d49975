"""What `against.py` asks of one checkout: the numbers of recorded problems, and the time of a few calls.

    PYTHONPATH=CHECKOUT/src python scripts/recorded.py results FILE.npz [WORD...]
    PYTHONPATH=CHECKOUT/src python scripts/recorded.py speed

`results` writes every number of the problems whose names contain one of the words (no word: of all problems). `speed`
reads lines `NAME REPEATS` and answers each with the seconds of the fastest repeat: those of the process itself, on
one thread, whatever else the machine does.

The same file asks two commits, so it uses the public interface alone. What a commit refuses is a result too: the name
of its error.
"""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sinkroute

Found = dict[str, Any]  # name → a tensor, a number, text or None
Problem = tuple[str, Callable[[], Found]]

T, E, K, D = 96, 8, 2, 16

# Every router is tried with every set of options; most sets are refused by most routers.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sigmoid": {"score": "sigmoid", "norm_topk": False, "route_scale": 2.5},
    "sqrtsoftplus": {"score": "sqrtsoftplus"},
    "groups": {"groups": 4, "top_groups": 2},
    "groups by their best": {"groups": 4, "top_groups": 2, "group_score": "max", "score": "sigmoid"},
    "spread ties": {"ties": "spread"},
    "losses": {"losses": {"z-loss": 0.01, "load-balance": 0.02, "importance": 0.1}},
    "a plan": {"probability": 1.0},
    "a plan in groups": {"probability": 1.0, "groups": 4, "top_groups": 2},
    "a plan of sigmoids": {"probability": 1.0, "score": "sigmoid"},
    "a plan of balanced loads": {"probability": 1.0, "balance": "load"},
    "a plan at half the rate": {"probability": 1.0, "rate": 0.5},
    "a plan and its gradient": {"probability": 1.0, "plan_gradient": "full"},
    "a plan's weights' gradient": {"probability": 1.0, "plan_gradient": "weights"},
    "a plan, scores weigh": {"probability": 1.0, "weights": "scores"},
    "a plan now and then": {"probability": 0.5, "draw": "layer"},
    "a schedule": {"probability": "cosine(1.0, 0.1)", "noise": "linear(0.5, 0.1)"},
    "adaptive": {"probability": "adaptive(high=0.5, low=0.2)"},
    "learned noise": {"noise": "learned", "probability": 1.0},
    "absolute noise": {"noise": 0.5, "noise_scale": "absolute", "noise_branch": "softmax"},
    "serves a plan": {"inference": "both"},
    "serves with noise": {"inference": "noise"},
    "serves plainly": {"probability": 1.0, "serve_with": "plain"},
    "a bias on scores": {"probability": 1.0, "bias_on": "scores", "score": "sigmoid"},
    "moves the weight": {"probability": 1.0, "gate": "plain"},
    "softmax cost": {"probability": 1.0, "cost": "softmax"},
    "an average": {"ema": 0.9},
    "over a batch": {"scope": "batch", "score": "sigmoid"},
    "stage 2": {"freeze_step": 2},
}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(tokens: int) -> Tensor:
    return torch.arange(tokens) % 5 != 0


# -- problems ------------------------------------------------------------------------------------------------------


def plan_of(logits: Tensor, **options: Any) -> Found:
    logits = logits.clone().requires_grad_(options.get("differentiable", False))
    plan = sinkroute.solve(logits, **options)
    matrix = plan.matrix()
    weights, experts = plan.topk(K)
    found = {
        "potentials": plan.potentials,
        "matrix": matrix,
        "weights": weights,
        "experts": experts,
        "column_error": plan.column_error,
        "converged": plan.converged,
        "passes": plan.passes,
    }
    if logits.requires_grad:
        (matrix.square().sum() + weights.pow(3).sum()).backward()
        found["gradient"] = logits.grad
    return found


def transport() -> Iterator[Problem]:
    sizes = [(1, 2), (7, 4), (96, 8), (512, 64), (3000, 16), (2048, 256)]
    for (tokens, experts), cost, reg in itertools.product(sizes, ("linear", "softmax"), (0.5, 0.05)):
        logits = 2 * numbers(tokens + experts, tokens, experts)
        for tol in (1e-2, 1e-6):
            name = f"solve {tokens}x{experts} {cost} reg={reg} tol={tol}"
            yield name, lambda x=logits, o={"cost": cost, "reg": reg, "tol": tol}: plan_of(x, **o)
    logits = 3 * numbers(1, 400, 12)
    forbidden = logits.masked_fill(numbers(2, 400, 12) > 1.5, -torch.inf)
    options: dict[str, dict[str, Any]] = {
        "mask": {"token_mask": mask_of(400)},
        "token mass": {"token_mass": torch.arange(400.0) % 3},
        "expert mass": {"expert_mass": torch.arange(12.0)},
        "warm start": {"init": numbers(3, 12)},
        "few passes": {"max_passes": 2},
        "differentiable": {"differentiable": True, "tol": 1e-6},
        "differentiable softmax mask": {"differentiable": True, "cost": "softmax", "token_mask": mask_of(400)},
        "all": {"token_mask": mask_of(400), "token_mass": torch.arange(400.0) % 3, "expert_mass": torch.arange(12.0)},
    }
    for name, option in options.items():
        yield f"solve {name}", lambda o=option: plan_of(logits, **o)
        yield f"solve forbidden {name}", lambda o=option: plan_of(forbidden, **o)
    for method in ("dual", "sinkhorn", "naive"):
        yield f"solve by {method}", lambda m=method: plan_of(logits, method=m, max_passes=50)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield f"solve {dtype}", lambda d=dtype: plan_of(logits.to(d))
    yield "solve strided", lambda: plan_of(logits.t().contiguous().t())

    def balanced(logits: Tensor, k: int, **options: Any) -> Found:
        found = sinkroute.balanced_topk(logits, k, **options)
        return {"experts": found[0], "bias": found[1]}

    for (tokens, experts), k, tol in itertools.product(sizes[1:], (1, 2, 4), (0.0, 0.01, 0.2)):
        skewed = numbers(tokens, tokens, experts) + torch.linspace(0, 3, experts)
        name = f"balanced_topk {tokens}x{experts} k={k} tol={tol}"
        yield name, lambda x=skewed, o={"k": k, "tol": tol}: balanced(x, **o)
    for name in ("mask", "expert mass", "warm start"):
        option = options[name]
        if name == "expert mass":
            option = {"expert_mass": 1 + torch.arange(12.0)}
        yield f"balanced_topk {name}", lambda o=option: balanced(logits, 3, **o)
        yield f"balanced_topk forbidden {name}", lambda o=option: balanced(forbidden, 2, **o)
    yield "balanced_topk softmax", lambda: balanced(logits, 2, cost="softmax")
    yield "balanced_topk float64", lambda: balanced(logits.double(), 2)


def of_routes(routes: Any) -> Found:
    names = ("experts", "weights", "load", "branch", "aux_loss", "plan_error", "plan_passes", "chosen")
    return {name: getattr(routes, name) for name in names}


def of_state(module: torch.nn.Module) -> Found:
    return {f"state {name}": value for name, value in module.state_dict().items()}


def route(name: str, options: dict[str, Any], *, bare: bool) -> Found:
    """Four steps of training, two micro-batches each, then serving: a router of given logits, or a layer with it."""
    router = sinkroute.create_router(name, num_experts=E, top_k=K, **options)
    torch.manual_seed(0)
    module = router if bare else sinkroute.MoE(D, 24, num_experts=E, top_k=K, router=router)
    optimiser = None if bare else torch.optim.SGD(module.parameters(), lr=0.1)
    found: Found = {}
    with sinkroute.LoadMonitor(module, "detailed") as monitor:
        for step, micro_batch in itertools.product(range(4), range(2)):
            key = f"step {step}.{micro_batch}"
            sinkroute.set_step(module, step, micro_batch, total_steps=10)
            tokens = T if step < 3 else 37
            mask = mask_of(tokens) if micro_batch else None
            x = numbers(10 * step + micro_batch, tokens, E if bare else D)
            x = (2 * x + torch.linspace(0, 1, x.shape[1])).requires_grad_()
            ids = torch.arange(tokens) * 7 % 50
            y = module(x, mask) if bare else module(x, mask, token_ids=ids)
            routes = y if bare else module.routes
            loss = (routes.weights if bare else y).square().mean() + (routes.aux_loss or 0)
            if loss.requires_grad:
                loss.backward()
            found |= {f"{key} {name}": value for name, value in of_routes(routes).items()}
            found |= {f"{key} gradient": x.grad} | ({} if bare else {f"{key} y": y})
            if micro_batch and optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()
        sinkroute.end_step(module)
        found |= of_state(module)
        module.eval()
        x, ids = numbers(99, T, E if bare else D), torch.arange(T) * 11 % 50
        y = module(x, mask_of(T)) if bare else module(x, mask_of(T), token_ids=ids)
        found |= {f"serving {name}": value for name, value in of_routes(y if bare else module.routes).items()}
        found |= {} if bare else {"serving y": y}
    for mode in ("train", "eval"):
        for layer, metrics in monitor.metrics(mode).items():
            found |= {f"monitor {mode} {layer} {metric}": value for metric, value in metrics.items()}
    return found


def routing() -> Iterator[Problem]:
    for name, (title, options) in itertools.product(sinkroute.list_routers(), OPTIONS.items()):
        yield f"router {name}, {title}", lambda n=name, o=options: route(n, o, bare=True)
        yield f"layer {name}, {title}", lambda n=name, o=options: route(n, o, bare=False)


def layers() -> Iterator[Problem]:
    def run(make: Callable[[], torch.nn.Module], dtype: torch.dtype, mask: Tensor | None) -> Found:
        torch.manual_seed(0)
        layer = make().to(dtype)
        x = numbers(5, 4, 24, D).to(dtype).requires_grad_()
        y = layer(x, mask)
        y.square().sum().backward()
        grads = {f"gradient {name}": parameter.grad for name, parameter in layer.named_parameters()}
        return {"y": y, "gradient": x.grad} | grads | of_routes(layer.routes)

    makers: dict[str, Callable[[], torch.nn.Module]] = {
        "swiglu": lambda: sinkroute.MoE(D, 24, E, K, "softmax"),
        "gelu with biases": lambda: sinkroute.MoE(D, 24, E, K, "softmax", "gelu", bias=True, gate_bias=True),
        "relu with a shared expert": lambda: sinkroute.MoE(D, 24, E, K, "softmax", "relu", shared_hidden=20, bias=True),
        "rows that are not 16 bytes": lambda: sinkroute.MoE(D, 23, E, K, "softmax"),
        "dropout": lambda: sinkroute.MoE(D, 24, E, K, "softmax", dropout=0.3),
        "expert choice": lambda: sinkroute.MoE(D, 24, E, K, "expert-choice"),
        "two heads": lambda: sinkroute.MultiHeadMoE(D, 2, 24, E, K, "ssr-l", router_options={"probability": 1.0}),
    }
    for (title, make), dtype in itertools.product(makers.items(), (torch.float32, torch.bfloat16, torch.float64)):
        for name, mask in (("", None), (", mask", mask_of(96).view(4, 24))):
            yield f"MoE {title} {dtype}{name}", lambda m=make, d=dtype, k=mask: run(m, d, k)


def patched() -> Iterator[Problem]:
    try:
        import transformers
    except ImportError:
        return
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    of_deepseek = {"n_routed_experts": 8, "moe_intermediate_size": 16, "first_k_dense_replace": 0, "n_group": 2}
    of_deepseek |= {"topk_group": 2, "num_experts_per_tok": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    of_deepseek |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

    def mixtral() -> Any:
        config = transformers.MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config)

    def deepseek() -> Any:
        return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **of_deepseek))

    def run(make: Callable[[], Any], name: str, options: dict[str, Any]) -> Found:
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for value in itertools.chain(model.parameters(), model.buffers()):
                if value.is_floating_point() and value.ndim and not value.any():
                    value.normal_(std=0.02)  # a correction of 0 would hide what is done with it
        handle = sinkroute.patch(model, name, **options)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.arange(48).view(2, 24) * 13 % 64
        mask = torch.ones_like(ids)
        mask[1, -5:] = 0
        found: Found = {}
        for step in range(3):
            sinkroute.set_step(model, step, total_steps=10)
            output = model(input_ids=ids, attention_mask=mask, labels=ids)
            output.loss.backward()
            norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            found |= {f"step {step} loss": output.loss, f"step {step} gradients": norms}
            optimiser.step()
            optimiser.zero_grad()
        sinkroute.end_step(model)
        model.eval()
        found |= {"serving": model(input_ids=ids, attention_mask=mask).logits} | of_state(model)
        handle.remove()
        return found | {"removed": model(input_ids=ids, attention_mask=mask).logits}

    for make, name in itertools.product((mixtral, deepseek), sinkroute.list_routers()):
        for title in ("defaults", "a plan", "a bias on scores"):
            options = {key: value for key, value in OPTIONS[title].items() if key != "score"}  # the model's own
            yield f"patch {make.__name__} {name}, {title}", lambda m=make, n=name, o=options: run(m, n, o)


def problems() -> Iterator[Problem]:
    for part in (transport, routing, layers, patched):
        yield from part()


def record(words: list[str]) -> dict[str, np.ndarray]:
    """`PROBLEM: NUMBER` → array, for problems whose name has one of the words in it."""
    kept: dict[str, np.ndarray] = {}
    for name, solve in problems():
        if words and not any(word in name for word in words):
            continue
        try:
            found = solve()
        except Exception as error:
            found = {"refused": type(error).__name__}
        kept |= {f"{name}: {key}": as_array(value) for key, value in found.items()}
    return kept


def as_array(value: Any) -> np.ndarray:
    """Every bit of it. Dtypes that NumPy does not know become integers."""
    if not isinstance(value, Tensor):
        return np.array("None" if value is None else value)
    value = value.detach().cpu().contiguous()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


# -- speed ---------------------------------------------------------------------------------------------------------


def timed() -> dict[str, Callable[[], object]]:
    """What is timed, by name: all that is made beforehand is made here."""

    def routed(name: str, **options: Any) -> Callable[[], object]:
        router = sinkroute.create_router(name, num_experts=16, top_k=2, **options)
        logits, weigh = numbers(0, 8192, 16).requires_grad_(), numbers(1, 8192, 2)
        steps = itertools.count()

        def call() -> None:
            sinkroute.set_step(router, next(steps))
            (router(logits).weights * weigh).sum().backward()

        return call

    def served() -> Callable[[], object]:
        router = sinkroute.create_router("softmax", num_experts=64, top_k=8).eval()
        logits = numbers(0, 8192, 64)
        return torch.no_grad()(lambda: router(logits))

    def layered(name: str) -> Callable[[], object]:
        torch.manual_seed(0)
        layer, x = sinkroute.MoE(64, 128, 16, 2, name), numbers(0, 2048, 64)
        steps = itertools.count()

        def call() -> None:
            sinkroute.set_step(layer, next(steps))
            layer(x).sum().backward()

        return call

    small, wide, long = numbers(0, 512, 16), numbers(0, 4096, 64), numbers(0, 16384, 16)
    slope = torch.linspace(0, 3, 64)
    return {
        "softmax step 8192x16": routed("softmax"),
        "softmax serving 8192x64": served(),
        "ssr-l, softmax step 8192x16": routed("ssr-l", probability=0.0),
        "ssr-l, Sinkhorn step 8192x16": routed("ssr-l", probability=1.0, noise=0.3),
        "ssr-s, Sinkhorn step 8192x16": routed("ssr-s", probability=1.0),
        "MoE ssr-l step 2048x16": layered("ssr-l"),
        "solve 512x16": lambda: sinkroute.solve(small, reg=0.1),
        "solve 4096x64": lambda: sinkroute.solve(wide, reg=0.1),
        "solve 16384x16": lambda: sinkroute.solve(long, reg=0.1),
        "balanced_topk 512x16": lambda: sinkroute.balanced_topk(small, 2),
        "balanced_topk 4096x64": lambda: sinkroute.balanced_topk(wide + slope, 4),
        "balanced_topk 16384x16": lambda: sinkroute.balanced_topk(long, 2),
    }


def serve_times() -> None:
    calls = timed()
    print("\t".join(calls), flush=True)
    for line in sys.stdin:
        name, repeats = line.rstrip("\n").split("\t")
        times = []
        for _ in range(int(repeats)):
            start = time.process_time()
            calls[name]()
            times.append(time.process_time() - start)
        print(min(times), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the order of sums is that of the threads
    if sys.argv[1] == "results":
        np.savez(sys.argv[2], **record(sys.argv[3:]))
    else:
        serve_times()
