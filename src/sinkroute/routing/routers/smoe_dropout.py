"""SMoE-Dropout: a gate that stays random, and more experts as training goes on (Chen et al., arXiv 2303.01610).

    experts = top-k_t of z,    weights = softmax over these k_t,    k_t grows from K to E over the training

The gate cannot collapse, as it does not learn. Few experts at first, all of them at last: like a dropout that fades. A
model trained so may be served with any number of experts.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinkroute._errors import require_count
from sinkroute.kernels.topk import topk
from sinkroute.routing.card import Card
from sinkroute.routing.draws import hash63
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.schedules import Linear, ScheduleLike, check_bounds, make_schedule

__all__ = ["SMoEDropoutRouter"]


class SMoEDropoutRouter(Router):
    """Top-k of a frozen random gate, with a k that grows while training.

    In training the routes have `k_now` columns, which is a function of the step alone.

    Here `norm_topk=None` means yes for any K: a gate that does not learn needs no gradient. Without groups.

    Raises:
        TypeError, ValueError: in `set_step`, a schedule in `training_k` that is not told how long it is.

    >>> import sinkroute
    >>> router = sinkroute.create_router("smoe-dropout", num_experts=8, top_k=2)
    >>> for step in (0, 50, 100):
    ...     sinkroute.set_step(router, step, total_steps=100)
    ...     router(torch.randn(3, 8)).experts.shape[1]
    2
    5
    8
    """

    card = Card("no", "no", "top-k with a k that grows to E")
    needs_step = True
    serves_any_gate = False
    _warned = False

    renormalises = True
    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        training_k: ScheduleLike | None = option(
            None,
            "experts per token in training, rounded: a number, a schedule (sinkroute.routing.schedules) or a function "
            'of the step, from 1 to E. None: "linear(top_k, num_experts)" over the whole training, whose length '
            "sinkroute.set_step(model, step, total_steps=...) tells; until then top_k, with a warning",
        )
        serving_top_k: int | None = option(None, "experts per token in eval(), 1 to E. None: top_k", least=1)

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        if self.serving_top_k is not None:
            require_count("serving_top_k", self.serving_top_k, 1, num_experts)
        growth = Linear(top_k, num_experts) if self.training_k is None else self.training_k
        self._schedule = make_schedule("training_k", growth, least=1, most=num_experts)
        self.k_now = top_k
        if self.training_k is not None:
            with contextlib.suppress(ValueError):  # a schedule that spans the training: set_step says how long that is
                self.check_step(self.step, None)
                self.prepare_step()

    def make_gate(self, d_model: int) -> nn.Module:
        """A linear map with a bias, uniform within 1/√D, that is not trained.

        It is drawn from the router's seed and layer. The layers of a model must not be alike: a router that was not
        told its layer takes a number from torch's generator instead, as any initial weight does.
        """
        return _FixedGate(d_model, self.num_experts, self.seed, self.layer)

    def check_step(self, step: int, total_steps: int | None) -> None:
        total_steps = self.total_steps if total_steps is None else total_steps
        if self.training_k is not None or total_steps is not None:
            check_bounds("training_k", self._schedule(step, total_steps), 1, self.num_experts)

    def prepare_step(self) -> None:
        if self.training_k is None and self.total_steps is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"smoe-dropout stays at top_k={self.top_k} experts per token, as it does not know how long "
                    "training is: tell it, sinkroute.set_step(model, step, total_steps=...), or give the router "
                    "training_k",
                    stacklevel=4,  # at who calls sinkroute.set_step
                )
            return
        self.k_now = round(self._schedule(self.step, self.total_steps))

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        return self._topk(logits_TE, self.k_now)

    def serve(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        return self._topk(logits_TE, self.serving_top_k or self.top_k)

    def _topk(self, logits_TE: Tensor, k: int) -> Routes:
        experts_TK = topk(logits_TE, k, self.tie_seed())
        return Routes(experts_TK, self.weigh(logits_TE, experts_TK))


class _FixedGate(nn.Linear):
    """A linear map that is drawn from a key, and not trained."""

    _key: int | None = None

    @torch.inference_mode(False)
    def __init__(self, d_model: int, num_experts: int, seed: int, layer: int | None) -> None:
        super().__init__(d_model, num_experts)
        layer = int(torch.randint(2**62, (), device="cpu")) if layer is None else layer
        self._key = hash63("gate", seed, layer)
        self.requires_grad_(False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self._key is None:  # nn.Linear is being made: the layer is not known yet
            super().reset_parameters()
            return
        generator, bound = torch.Generator("cpu").manual_seed(self._key), 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            drawn = torch.rand(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
            parameter.copy_((2 * drawn - 1) * bound)
