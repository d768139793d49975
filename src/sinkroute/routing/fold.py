"""Potentials that live in the gate: what a router serves with is added to a linear gate, step by step.

With b (E,) what the router adds to logits when it serves,

    gate.bias   += b                               if the gate has a bias, else
    gate.weight += b ⊗ d,    d = m / E[(m̂·x)²]     m the mean token of the step, m̂ its direction

So the gate itself is balanced, trained on from there, and served as plain top-k with nothing beside the model's
weights. Tokens have a large part in common (what a layer norm leaves of the residual stream's mean): with u = m / |m|²,
u·x is about 1 for all of them, and b ⊗ u about a bias. d is the direction of least squares, near 0 where tokens have
nothing in common: then little can be folded. Ours; not in the paper.

The router's potentials are less by what the gate was found to take up: by what the change of its tensor adds to the
logits of the mean token. The rest stays in the router, as what tokens do not have in common, or what a gate in low
precision rounds away, and is folded with later moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sinkroute.routing.moved import Trace, add, require_trained, require_whole, shape_of
from sinkroute.routing.serving import Link
from sinkroute.routing.state import recomputing

if TYPE_CHECKING:
    from sinkroute.routing.router import Router

__all__ = ["GateFold"]


class GateFold(Link):
    """Folds a router's potentials into a linear gate after every step.

    What is moved is the gate's: subject to the optimiser's weight decay. Where the optimiser keeps a copy of the
    weights that is known (DeepSpeed's, or one that `add` is overridden for), that is moved too; one that is not known
    undoes the moves, which is told.

    Args:
        router: remembers potentials of logits (`Router.potentials`).
        owner: the module that holds the tensor; looked up anew each time, as moving a model makes new tensors.
        name: dotted, of the tensor in it: a bias (E,), or a weight (E, D), with which the caller calls `see` before
            each training pass of the router.

    Raises:
        ValueError: there is no such tensor, or the router has no potentials that a gate could take up.

    >>> import torch, sinkroute
    >>> gate = torch.nn.Linear(8, 4)
    >>> gate.bias.data[0] += 3  # most tokens choose expert 0
    >>> router = sinkroute.create_router("ssr-dual", num_experts=4, top_k=1)
    >>> router.links.append(GateFold(router, gate, "bias"))
    >>> x_TD = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    >>> for step in range(3):
    ...     sinkroute.set_step(router, step)
    ...     routes = router(gate(x_TD))
    >>> sinkroute.end_step(router)
    >>> bool(gate(x_TD).argmax(1).bincount().max() < 105)  # a share is 100
    True
    """

    def __init__(self, router: Router, owner: nn.Module, name: str) -> None:
        served = router.serving()
        if not router.potentials() or (served is not None and not served.plain and served.on != "logits"):
            on = "" if served is None or served.plain else f", but a bias on {served.on}"
            raise ValueError(
                f"{type(router).__name__} has no potentials of logits{on}, which a gate could take up; take a router "
                'that has, such as "ssr-dual" with bias_on="logits"'
            )
        self.router, self.owner, self.name = router, owner, name
        self._what = f"{type(router).__name__} moves {name} of {type(owner).__name__}"
        self._shape: tuple[int, ...] | None = None
        self._width = (*shape_of(self.find()), 0)[1]
        self._trace = Trace(self._what)
        self._tokens: Tensor | None = None
        self._step: tuple[Tensor, Tensor] | None = None
        if self._width:
            assert router.state is not None  # it holds potentials
            router.state.add_sums(token=self._width, spread=1, seen=1)

    def find(self) -> Tensor:
        """What is moved, (E,) or (E, D)."""
        found: Any = self.owner
        for part in self.name.split("."):
            found = getattr(found, part, None)
        experts = self.router.num_experts
        shape = shape_of(found) if isinstance(found, Tensor) else ()
        if self._shape is None and (len(shape) not in (1, 2) or shape[0] != experts):
            raise ValueError(
                f"gate must have a bias of shape ({experts},) or a weight of shape ({experts}, D) as {self.name}, "
                f"got {self.owner}; make it with nn.Linear(d_model, num_experts)"
            )
        is_built = self._shape is not None
        self._shape = self._shape or shape
        if is_built or not found.is_meta:  # models are built on the meta device, too
            require_whole(found, self._shape, self._what)
        whole: Tensor = found
        return whole

    # -- a pass: where tokens have a part in common ------------------------------------------------------------------

    def _counts(self) -> bool:
        # Where only steps with a plan move potentials, only their tokens are looked at.
        return bool(self._width) and self.router.training and self.router.sinkhorn_now is not False

    def see(self, tokens: Tensor) -> None:
        if self._counts() and not recomputing():
            self._tokens = tokens.detach()

    @torch.no_grad()
    def count(self, token_mask: Tensor | None) -> dict[str, Tensor]:
        if not self._counts():
            return {}
        if self._tokens is None:
            raise RuntimeError(
                f"the potentials of {type(self.router).__name__} go into a weight, for which the tokens must be known: "
                "call see(tokens) of router.links before the router"
            )
        tokens_TD, self._tokens = self._tokens.flatten(0, -2).float(), None
        seen = torch.full((1,), len(tokens_TD), dtype=torch.float64, device=tokens_TD.device)
        if token_mask is not None:
            seen = token_mask.sum().double().view(1)
            tokens_TD = tokens_TD.masked_fill(~token_mask[:, None], 0.0)  # padding may be anything
        token_D = tokens_TD.sum(0)
        unit_D = token_D / token_D.norm().clamp(min=1e-20)
        with torch.autocast(tokens_TD.device.type, enabled=False):
            along_T = tokens_TD @ unit_D
        return {"token": token_D.double(), "spread": along_T.square().sum().double().view(1), "seen": seen}

    # -- a step ------------------------------------------------------------------------------------------------------

    def learn(self, sums: Mapping[str, Tensor]) -> None:
        if self._width:
            mean_D = sums["token"] / sums["seen"].clamp(min=1)
            # Σ x / Σ (m̂·x)², m̂ along the mean of its micro-batch: where these differ, it is the shorter for that.
            self._step = mean_D, sums["token"] / sums["spread"].clamp(min=1e-20)

    @torch.no_grad()
    def push(self) -> None:
        step, self._step = self._step, None
        if self._width and step is None:  # no step is over: a state was loaded
            return
        moved, bias_E = self.find(), self.router.potentials()[0].double()
        require_trained(moved, self._what)
        self._trace.compare(moved)
        move = bias_E if step is None else torch.outer(bias_E, step[1])
        # A solve or a pass that failed on a device, which cannot say so, is not kept.
        move = torch.where(move.isfinite().all(), move, 0.0)
        self._trace.before(moved, None if step is None else step[0].nan_to_num())
        taken = self.add(moved, move)
        self._trace.after(moved)
        self.router.rebase((taken if step is None else taken @ step[0].nan_to_num()).to(bias_E.device))

    def add(self, moved: Tensor, move: Tensor) -> Tensor:
        """Add `move` to the gate's tensor, of any dtype, which may be sharded.

        Returns:
            What of it the tensor has taken up, float64.
        """
        return add(moved, move)
