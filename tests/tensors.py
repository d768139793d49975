"""Every public function is given every kind of tensor and transform of torch: `python tensors.py KIND... [--all]`.

One JSON object a line, before and after each call, so that a crash is attributed:

    {"call": "solve", "kind": "masked", "found": "refused", "error": "TypeError", "said": "logits_TE is a ..."}

`found` is "equal" (to what a plain tensor of the same numbers gives; of tensors without numbers, in shape), "refused",
"other" (with what differs) or "begun".
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fw
import torch.distributed as dist
from torch import Tensor, nn

import sinkroute
from sinkroute.routing.losses.inputs import LossInputs
from sinkroute.routing.losses.registry import LOSSES
from sinkroute.routing.routers.ssr import SSRRouter
from sinkroute.transport import list_solvers

T, E, K, D = 18, 4, 2, 8
Call = Callable[[Tensor], list[Tensor]]
Fresh = Callable[[Tensor], Call]  # from what it will be given


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS = numbers(0, T, E), numbers(1, T, E)
TOKENS = numbers(2, T, D), numbers(3, T, D)
MASK = torch.arange(T) % 5 != 0
MASS = torch.arange(T, dtype=torch.float32) % 3
CAPACITY = torch.tensor([1.0, 2.0, 1.0, 0.5])
INIT = torch.tensor([0.1, -0.2, 0.3, -0.2])


# -- what is called ------------------------------------------------------------------------------------------------


def of_plan(**options: Any) -> Call:
    def call(logits_TE: Tensor) -> list[Tensor]:
        plan = sinkroute.solve(logits_TE, **options)
        weights_TK, experts_TK = plan.topk(K)
        return [plan.potentials, plan.matrix(), weights_TK, experts_TK, plan.weigh(experts_TK, normalise=False)]

    return call


def of_module(module: nn.Module, read: Callable[[nn.Module, Tensor], list[Tensor]]) -> Fresh:
    """Each call has a copy, as routers remember; made beforehand, so that no tracer sees it made."""

    def fresh(x: Tensor) -> Call:
        own = copy.deepcopy(module).requires_grad_(False).to("meta" if x.is_meta else "cpu")
        return lambda y: read(own, y)

    return fresh


def of_router(name: str, train: bool) -> Fresh:
    router = sinkroute.create_router(name, num_experts=E, top_k=K)
    if isinstance(router, SSRRouter):
        router = sinkroute.create_router(name, num_experts=E, top_k=K, probability=1.0)
    router.train(train).set_step(0, total_steps=10)

    def read(module: nn.Module, x: Tensor) -> list[Tensor]:
        routes = module(x)
        return [routes.weights, routes.experts, routes.load, *([] if routes.aux_loss is None else [routes.aux_loss])]

    return of_module(router, read)


def of_layer(layer: nn.Module) -> Fresh:
    sinkroute.set_step(layer, 0, total_steps=10)
    return of_module(layer, lambda module, x: [module(x)])


def balanced(**options: Any) -> Call:
    # Many biases belong to a choice: with the kernels it is another than without.
    return lambda x: [sinkroute.balanced_topk(x, K, **options).experts]


def always(call: Call) -> Fresh:
    return lambda _: call


def of_monitor(x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    layer = sinkroute.MoE(D, 12, num_experts=E, top_k=K, router="softmax")
    with sinkroute.LoadMonitor(layer) as monitor:
        layer(x)
        (found,) = monitor.metrics().values()
    return [torch.tensor([float(value) for value in found.values() if isinstance(value, int | float)])]


def of_loss(name: str) -> Call:
    experts_TK = LOGITS[0].topk(K).indices
    load_E = experts_TK.flatten().bincount(minlength=E)

    def call(x: Tensor) -> list[Tensor]:
        return [LOSSES[name].function(LossInputs(x, experts_TK, None, load_E, None, "softmax", lambda: load_E))]

    return call


def calls(everything: bool) -> dict[str, tuple[Fresh, tuple[Tensor, Tensor]]]:
    """Name → what is called with one tensor, and two such tensors."""
    torch.manual_seed(0)
    sizes = {"num_experts": E, "top_k": K}
    options = {"router": "ssr-l", "router_options": {"probability": 1.0}}
    of_logits = {
        "solve": of_plan(),
        "solve all": of_plan(token_mask=MASK, token_mass=MASS, expert_mass=CAPACITY, init=INIT, cost="softmax"),
        "solve differentiable": of_plan(differentiable=True),
        "balanced_topk": balanced(token_mask=MASK),
    }
    if everything:
        of_logits |= {f"solve {method}": of_plan(method=method, max_passes=20) for method in list_solvers()}
        of_logits |= {f"loss {name}": of_loss(name) for name in LOSSES}
    names = sinkroute.list_routers()
    some = names if everything else ("softmax", "base", "ssr-s", "sinkhorn", "quantile", "expert-choice", "noisy")
    routers = {f"{name} in training": of_router(name, True) for name in some}
    if everything:
        routers |= {f"{name} serving": of_router(name, False) for name in names}
    layers = {
        "MoE": of_layer(sinkroute.MoE(D, 12, **sizes, router="softmax")),
        "MoE ssr-l": of_layer(sinkroute.MoE(D, 12, **sizes, **options)),
        "MultiHeadMoE": of_layer(sinkroute.MultiHeadMoE(D, 2, 12, **sizes, router="softmax")),
        "LoadMonitor": always(of_monitor),
    }
    found = {name: (always(call), LOGITS) for name, call in of_logits.items()}
    return (
        found | {name: (call, LOGITS) for name, call in routers.items()} | {n: (c, TOKENS) for n, c in layers.items()}
    )


def arguments() -> dict[str, tuple[Fresh, tuple[Tensor, Tensor]]]:
    """The same for the tensors beside the logits, for kinds that one argument alone can be of."""
    logits_TE = LOGITS[0]

    def routed(mask: Tensor) -> list[Tensor]:
        routes = sinkroute.create_router("ssr-s", num_experts=E, top_k=K, probability=1.0)(logits_TE, mask)
        return [routes.weights, routes.experts, routes.load]

    def computed(mask: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        return [sinkroute.MoE(D, 12, num_experts=E, top_k=K, router="softmax")(TOKENS[0], mask)]

    def solved(name: str) -> Call:
        return lambda x: of_plan(**{name: x})(logits_TE)

    def chosen(name: str) -> Call:
        return lambda x: balanced(**{name: x})(logits_TE)

    of_masks = {
        "solve token_mask": solved("token_mask"),
        "balanced_topk token_mask": chosen("token_mask"),
        "router token_mask": routed,
        "MoE token_mask": computed,
    }
    found = {name: (always(call), (MASK, MASK)) for name, call in of_masks.items()}
    for name, x in (("token_mass", MASS), ("expert_mass", CAPACITY), ("init", INIT)):
        found[f"solve {name}"] = always(solved(name)), (x, x)
    for name, x in (("expert_mass", CAPACITY), ("init", INIT)):
        found[f"balanced_topk {name}"] = always(chosen(name)), (x, x)
    return found


# -- kinds of tensors: the same numbers as something else ----------------------------------------------------------


class Named(Tensor):
    """A tensor by another name."""


def distributed(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    return DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()])


def gathered(x: Tensor) -> Tensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor

    found = all_gather_tensor(x, 0, dist.group.WORLD)
    assert isinstance(found, AsyncCollectiveTensor)
    return found.float() if x.is_floating_point() else found  # a no-op keeps the wrapper


def masked(x: Tensor) -> Tensor:
    return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def fake(x: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:5], x[5:]], layout=torch.jagged)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:5], x[5:]])


def negated(x: Tensor) -> Tensor:
    found = torch.complex(x, -x).conj().imag
    assert found.is_neg()
    return found


def spaced(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape, 2)
    wide[..., 0] = x
    return wide[..., 0]


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def freed(x: Tensor) -> Tensor:
    found = x.clone()
    found.untyped_storage().resize_(0)
    return found


def of_a_transform_that_ended(x: Tensor) -> Tensor:
    kept: list[Tensor] = []
    torch.func.grad(lambda y: (kept.append(y), y.sum())[1])(x.float())
    return kept[0]


WRAPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "masked": masked,
    "distributed": distributed,
    "gathered": gathered,
    "fake": fake,
    "meta": lambda x: x.to("meta"),
    "jagged": jagged,
    "nested": nested,
    "sparse": lambda x: x.to_sparse(),
    "negated": negated,
    "spaced": spaced,
    "transposed": lambda x: x.mT.contiguous().mT,
    "inference": inference,
    "parameter": lambda x: nn.Parameter(x, requires_grad=x.is_floating_point()),
    "named": lambda x: x.as_subclass(Named),
    "freed": freed,
    "ended": of_a_transform_that_ended,
}
# The same number everywhere, or a row again and again: what it is like has to be made to fit.
LIKE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "expanded": lambda x: (x[:1].expand(x.shape), x[:1].expand(x.shape).contiguous()),
    "zero": lambda x: (torch._efficientzerotensor(x.shape, dtype=x.dtype), torch.zeros_like(x)),
}


# -- transforms: the same call under another's eyes ----------------------------------------------------------------


def under_jvp(call: Call, x: Tensor, _: Tensor) -> list[Tensor]:
    return list(torch.func.jvp(lambda y: tuple(call(y)), (x,), (torch.ones_like(x),))[0])


def under_grad(call: Call, x: Tensor, _: Tensor) -> list[Tensor]:
    def total(y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = call(y)
        return found[0].sum(), tuple(found)

    return list(torch.func.grad(total, has_aux=True)(x)[1])


def with_tangent(call: Call, x: Tensor, _: Tensor) -> list[Tensor]:
    with fw.dual_level():
        return [fw.unpack_dual(y).primal for y in call(fw.make_dual(x, torch.ones_like(x)))]


def vectorised(call: Call, x: Tensor, other: Tensor) -> list[Tensor]:
    return [y[0] for y in torch.vmap(lambda z: tuple(call(z)))(torch.stack([x, other]))]


def traced(call: Call, x: Tensor, other: Tensor) -> list[Tensor]:
    return list(torch.jit.trace(lambda y: tuple(call(y)), other, check_trace=False)(x))


def made_fx(mode: str) -> Callable[[Call, Tensor, Tensor], list[Tensor]]:
    def run(call: Call, x: Tensor, other: Tensor) -> list[Tensor]:
        from torch.fx.experimental.proxy_tensor import make_fx

        return list(make_fx(lambda y: tuple(call(y)), tracing_mode=mode, _allow_non_fake_inputs=True)(other)(x))

    return run


TRANSFORMS: dict[str, Callable[[Call, Tensor, Tensor], list[Tensor]]] = {
    "functionalize": lambda call, x, _: list(torch.func.functionalize(lambda y: tuple(call(y)))(x)),
    "vmap": vectorised,
    "grad": under_grad,
    "jvp": under_jvp,
    "dual": with_tangent,
    "jit.trace": traced,
    "make_fx real": made_fx("real"),
    "make_fx fake": made_fx("fake"),
    "make_fx symbolic": made_fx("symbolic"),
}
KINDS = [*WRAPPED, *LIKE, *TRANSFORMS]


# -- comparing -----------------------------------------------------------------------------------------------------


def compare(found: list[Tensor], wanted: list[Tensor]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} tensors instead of {len(wanted)}"
    for n, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if got.shape != want.shape:
            return f"tensor {n} has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        if got.is_meta or type(got).__name__ == "FakeTensor":
            continue
        if not torch.allclose(got.detach().double(), want.detach().double(), rtol=1e-5, atol=1e-6):
            return f"tensor {n} differs by {(got.detach().double() - want.detach().double()).abs().max():.3g}"
    return ""


class Attempt(NamedTuple):
    call: str
    kind: str
    odd: Callable[[], list[Tensor]]
    plain: Callable[[], list[Tensor]]


def attempts(kinds: list[str], everything: bool) -> Iterator[Attempt]:
    of_logits, beside = calls(everything), arguments()
    for kind in kinds:
        for name, (fresh, (x, other)) in (of_logits if kind in TRANSFORMS else of_logits | beside).items():
            if name == "LoadMonitor" and (kind in TRANSFORMS or kind in ("fake", "meta")):
                continue  # it gives Python's numbers
            if name.startswith("loss") and kind not in TRANSFORMS:
                continue  # torch's operations only, of what a router has made plain
            if kind in TRANSFORMS:
                yield Attempt(name, kind, partial(TRANSFORMS[kind], fresh(x), x, other), partial(fresh(x), x))
            elif kind in LIKE:
                if x.is_floating_point() and x.ndim == 2:
                    same, plain = LIKE[kind](x)
                    yield Attempt(name, kind, partial(fresh(same), same), partial(fresh(plain), plain))
            elif (x.is_floating_point() and x.ndim == 2) or kind not in ("negated", "ended", "transposed"):
                same = WRAPPED[kind](x)
                yield Attempt(name, kind, partial(fresh(same), same), partial(fresh(x), x))


def main(kinds: list[str], everything: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._C._debug_only_display_vmap_fallback_warnings(False)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=0, world_size=1)
        for name, kind, odd, plain in attempts(kinds or KINDS, everything):
            told = {"call": name, "kind": kind}
            print(json.dumps(told | {"found": "begun"}), flush=True)
            wanted = plain()
            try:
                found = odd()
            except Exception as error:
                told |= {"found": "refused", "error": type(error).__name__, "said": str(error)[:600]}
            else:
                different = compare(found, wanted)
                told |= {"found": "other", "said": different} if different else {"found": "equal"}
            print(json.dumps(told), flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word != "--all"], "--all" in sys.argv)
