"""The handle that every adapter's `patch` returns, and how a router is put into a framework's own.

The framework's router keeps its identity. In Hugging Face's models a hook writes over what it returns; elsewhere its
class is swapped for one that asks a sinkroute router, so that parameters, hooks, wrappers and lists of modules that
others hold stay as they are. A router that remembers nothing is attached, which leaves the `state_dict` as it was;
one that does is a submodule named `router`.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from sinkroute.adapters._links import held_in
from sinkroute.adapters._tally import Tally, tally_table
from sinkroute.routing import Router
from sinkroute.routing.attached import attach, attached, detach, require_model

__all__ = ["Kinds", "Patched", "describe", "hold", "holder", "outputs_of", "put_in"]


class Patched:
    """What `patch` did to a model.

    Attributes:
        model: what was patched, in place.
        router: the name of the method.
        routers: path of a router in the model → the sinkroute router that is asked in its place.
        refused: path of each router that was left alone → why.
    """

    def __init__(self, model: nn.Module, router: str, refused: Mapping[str, str] | None = None) -> None:
        self.model, self.router, self.refused = model, router, dict(refused or {})
        self.routers: dict[str, Router] = {}
        self._tallies: dict[str, Tally] = {}
        self._rows: list[tuple[str, str, str]] = []
        self._undo: list[Callable[[], Any]] = []

    def __str__(self) -> str:
        head = self._head()
        rows = [(f"{count} × {path}", host, rule) for (path, host, rule), count in Counter(self._rows).items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [f"  {path}: left alone, {reason}" for path, reason in self.refused.items()]
        return "\n".join([head + self._remark(), *lines])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.routers}, {self._told()})"

    def __len__(self) -> int:
        """How many routers were taken over."""
        return len(self.routers)

    def __bool__(self) -> bool:
        return True

    def _head(self) -> str:
        total = len(self.routers) + len(self.refused)
        return f"{self.router} in {len(self.routers)} of {total} layers of {type(self.model).__name__}"

    def _told(self) -> str:
        passes = max((int(tally.passes) for tally in self._tallies.values()), default=0)
        return f"{passes} training pass{'' if passes == 1 else 'es'}" if passes else "no training pass yet"

    def _remark(self) -> str:
        """What else the first line of the description says."""
        return ""

    def summary(self) -> str:
        """What training has come to, as a table: by layer, the steps with a plan, and MaxVio and dead experts of the
        first ten training passes and of the last ten, on this rank. It waits for the device.

        >>> import torch, transformers, sinkroute
        >>> config = transformers.MixtralConfig(
        ...     vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2, num_local_experts=4,
        ... )
        >>> handle = sinkroute.patch(transformers.MixtralForCausalLM(config), "ssr-l", probability=1.0)
        >>> print(handle.summary())
        ssr-l in 1 of 1 layers of MixtralForCausalLM: no training pass yet
        >>> for step in range(3):
        ...     sinkroute.set_step(handle.model, step)
        ...     _ = handle.model(input_ids=torch.randint(16, (2, 50)))
        >>> for line in handle.summary().splitlines()[:2]:
        ...     print(line)
        ssr-l in 1 of 1 layers of MixtralForCausalLM: 3 training passes
        layer  plans  MaxVio then  MaxVio now  dead then  dead now
        """
        head = f"{self._head()}: {self._told()}"
        if not any(int(tally.passes) for tally in self._tallies.values()):
            return head
        return f"{head}\n{tally_table(self._tallies, self.routers)}"

    def state_dict(self) -> dict[str, Tensor]:
        """What the routers remember between steps, by name; empty if they remember nothing."""
        return self._parts().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """See `nn.Module.load_state_dict`; what the model holds of it (a correction bias) is set, too."""
        found = self._parts().load_state_dict(state_dict, strict, assign)
        for router in self.routers.values():
            for link in router.links:
                link.push()
        return found

    def _parts(self) -> nn.Module:
        return nn.ModuleDict({"routers": nn.ModuleList(self.routers.values())})

    def remove(self) -> None:
        """Give the model its own routers back. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    # -- what adapters do --------------------------------------------------------------------------------------------

    def add(self, path: str, host: nn.Module, router: Router, rule: str) -> None:
        """Note that `router` is asked in the place of the model's own, which chooses by `rule`."""
        self.routers[path] = router
        self._tallies[path] = Tally(router.num_experts)
        self.on_remove(router.register_forward_hook(self._tallies[path]).remove)
        self._rows.append((re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path) or "itself", type(host).__name__, rule))

    def on_remove(self, undo: Callable[..., Any], *args: Any) -> None:
        """Have `remove` call this; the last is called first."""
        self._undo.append(partial(undo, *args))


def describe(rule: Any, *more: str) -> str:
    """The rule of a router, or of anything with the options of one, in a line.

    >>> import sinkroute
    >>> describe(sinkroute.create_router("softmax", num_experts=8, top_k=2, groups=4, top_groups=2))
    'softmax, top 2 of 8, renormalised, 2 of 4 groups (top2-sum)'
    """
    words = [f"{rule.score}, top {rule.top_k} of {rule.num_experts}"]
    words += ["renormalised"] if rule.norm_topk else []
    words += [f"{rule.top_groups} of {rule.groups} groups ({rule.group_score})"] if rule.groups > 1 else []
    words += [*more, f"times {rule.route_scale:.6g}"] if rule.route_scale != 1 else more
    return ", ".join(words)


def hold(host: nn.Module, router: Router) -> None:
    """Put `router` where `holder` and `sinkroute.set_step` find it."""
    if router.state is None:
        attach(host, router)
    else:
        host.router = router


def holder(host: nn.Module) -> Router:
    """The router of `host`, in the mode of `host`: one that is attached does not hear of `train()` and `eval()`."""
    router = attached(host)
    if router is None:
        assert isinstance(host.router, Router)
        return host.router
    if router.training != host.training:
        router.train(host.training)
    return router


def _release(host: nn.Module) -> None:
    """Undo `hold`."""
    detach(host)
    host._modules.pop("router", None)


# A framework's class of router → ours, and what makes the router that it asks, given path and module.
Kinds: TypeAlias = Mapping[type[nn.Module], tuple[type[nn.Module], Callable[[str, Any], Router]]]


def put_in(model: nn.Module, name: str, kinds: Kinds, owner: str) -> Patched:
    """Swap the classes of a framework's routers for ours; of none if one is refused.

    Args:
        model: holds the routers.
        name: of the method.
        kinds: the classes of the framework's routers.
        owner: the framework, for messages.

    Raises:
        TypeError: no model.
        ValueError: there is nothing to swap; a subclass of theirs, whose rule is not known, or one of ours.
    """
    require_model(model)
    fitted: dict[str, tuple[nn.Module, type[nn.Module], Router]] = {}
    for path, part in model.named_modules():
        if type(part) in kinds:
            ours, fit = kinds[type(part)]
            fitted[path] = part, ours, fit(path, part)
        elif isinstance(part, tuple(kinds)):
            patched_already = isinstance(part, tuple(ours for ours, _ in kinds.values()))
            raise ValueError(
                f"{path or 'model'} is a {type(part).__name__}, no router of {owner}'s own; "
                f"{'call remove() first' if patched_already else 'patch the model without it'}"
            )
    if not fitted:
        raise ValueError(
            f"model {type(model).__name__} holds no {' or '.join(kind.__name__ for kind in kinds)} of {owner}'s: there "
            "is nothing to patch; pass the model that holds the mixture-of-experts layers"
        )
    patched = Patched(model, name)
    for path, (part, ours, router) in fitted.items():
        patched.add(path, part, router, describe(router, *held_in(router)))
        patched.on_remove(_release, part)
        patched.on_remove(setattr, part, "__class__", type(part))
        part.__class__ = ours
        hold(part, router.train(part.training))
    return patched


@contextlib.contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Any]]:
    """What the module returns in the passes inside."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()
