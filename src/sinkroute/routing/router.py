"""The base of all routers: what they check, count and share.

A router turns scores into `Routes`. In training each method has its own rule (`route`); when serving all of them are
plain top-k of the model's own scores, so that a model trained with any of them runs in every engine.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sinkroute._errors import NonFiniteScores
from sinkroute._uncompiled import uncompiled
from sinkroute.routing.draws import normal_like, uniform
from sinkroute.routing.routes import Routes

__all__ = ["Choice", "Router"]

# After so many draws without set_step, accumulation and recomputation cannot explain it: somebody forgot.
_DRAWS_BEFORE_WARNING = 64


class Choice(NamedTuple):
    """What a method decides; the base class adds the counts and hides masked tokens."""

    experts_TK: Tensor
    weights_TK: Tensor
    branch: str = "softmax"
    plan_error: Tensor | None = None
    plan_passes: int | Tensor | None = None


class Router(nn.Module):
    """Scores in, `Routes` out. Subclasses override `route` (and `auxiliary_loss`).

    Args:
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        norm_topk: whether the weights are renormalised over the chosen K. None: yes for K > 1; no for K = 1, where the
            one weight would be the constant 1 and the gate would get no gradient.
        seed: of all random draws.
        layer: part of the key of the random draws; None: `sinkroute.set_step` numbers the routers of a model in order.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self, num_experts: int, top_k: int, *, norm_topk: bool | None = None, seed: int = 0, layer: int | None = None
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("top_k", top_k), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be 1 or more, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts={num_experts}, got {top_k}; "
                "a token cannot visit an expert twice"
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.norm_topk = top_k > 1 if norm_topk is None else norm_topk
        self.seed, self.layer, self.layer_is_given = seed, layer, layer is not None
        self.step, self.micro_batch, self.step_was_set = 0, 0, False
        self._keyless_draws = 0

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"

    def make_gate(self, d_model: int) -> nn.Module:
        """The module that turns tokens (T, D) into the logits (T, E) that this router takes: a bias-free linear map."""
        return nn.Linear(d_model, self.num_experts, bias=False)

    def forward(self, logits_TE: Tensor, token_mask: Tensor | None = None) -> Routes:
        """Route T tokens.

        Args:
            logits_TE: (T, E) scores of any float dtype; computed with in float32 (float64 stays float64). T may be 0.
            token_mask: (T,) bool, True for real tokens. Padding is in no marginal, load or loss; its scores may be
                anything.

        Raises:
            TypeError: a dtype that is not float, a mask that is not bool.
            ValueError: a wrong shape; non-finite scores of a real token (checked on CPU only: elsewhere it would stall
                the device).
        """
        logits_TE = self._checked(logits_TE, token_mask)
        choice = self.route(logits_TE, token_mask) if self.training else self.softmax_topk(logits_TE)
        experts_TK, weights_TK = choice.experts_TK, choice.weights_TK
        if token_mask is None:
            counted_R = torch.ones_like(experts_TK).flatten()
        else:
            weights_TK = weights_TK * token_mask[:, None]
            counted_R = token_mask[:, None].expand_as(experts_TK).flatten().long()
        # Not bincount: it would wait for the device to learn its output's size.
        load_E = logits_TE.new_zeros(self.num_experts, dtype=torch.int64).scatter_add_(
            0, experts_TK.flatten(), counted_R
        )
        aux_loss = self.auxiliary_loss(logits_TE, load_E, token_mask) if self.training else None
        return Routes(experts_TK, weights_TK, load_E, choice.branch, aux_loss, choice.plan_error, choice.plan_passes)

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Choice:
        """The method's rule in training. `logits_TE` is float32 or float64, finite, and 0 where masked."""
        return self.softmax_topk(logits_TE)

    def auxiliary_loss(self, logits_TE: Tensor, load_E: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """The method's loss, coefficient included, or None."""
        return None

    def softmax_topk(self, logits_TE: Tensor) -> Choice:
        """Plain top-k of the scores, weighted by their softmax: how all methods serve."""
        top_TK, experts_TK = torch.topk(logits_TE, self.top_k, dim=-1)
        return Choice(experts_TK, self._weigh(logits_TE, top_TK))

    def softmax_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Softmax weights of choices that were made otherwise."""
        return self._weigh(logits_TE, logits_TE.gather(-1, experts_TK))

    def _weigh(self, logits_TE: Tensor, chosen_TK: Tensor) -> Tensor:
        # The softmax over the chosen is the full softmax renormalised over them, in one step and without 0/0.
        if self.norm_topk:
            return torch.softmax(chosen_TK, dim=-1)
        return torch.exp(chosen_TK - torch.logsumexp(logits_TE, dim=-1, keepdim=True))

    # -- random draws ------------------------------------------------------------------------------------------------

    # Not compiled: the step is part of the key, and every new step would be compiled anew.
    @uncompiled
    def draw_uniform(self, tag: str, *, per_layer: bool) -> float:
        """A number in [0, 1) keyed by the step; the same on every rank. `per_layer`: and by layer and micro-batch."""
        self._note_keyless_draw()
        where = (self.layer or 0, self.micro_batch) if per_layer else ()
        return uniform(tag, self.seed, self.step, *where)

    @uncompiled
    def draw_normal(self, tag: str, reference: Tensor) -> Tensor:
        """Standard normal noise keyed by layer, step and micro-batch, and by the rank, whose tokens are others."""
        self._note_keyless_draw()
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return normal_like(reference, tag, self.seed, self.layer or 0, self.step, self.micro_batch, rank)

    def _note_keyless_draw(self) -> None:
        if self.step_was_set:
            return
        self._keyless_draws += 1
        if self._keyless_draws == _DRAWS_BEFORE_WARNING:
            warnings.warn(
                f"{type(self).__name__} has drawn {_DRAWS_BEFORE_WARNING} times for step 0: its draws repeat. "
                "Call sinkroute.set_step(model, step) before every training step.",
                stacklevel=2,
            )

    # -- input -------------------------------------------------------------------------------------------------------

    def _checked(self, logits_TE: Tensor, token_mask: Tensor | None) -> Tensor:
        if not isinstance(logits_TE, Tensor) or not logits_TE.is_floating_point():
            kind = logits_TE.dtype if isinstance(logits_TE, Tensor) else type(logits_TE).__name__
            raise TypeError(f"logits_TE must be a float tensor, got {kind}; pass the gate's scores")
        if logits_TE.ndim != 2 or logits_TE.shape[1] != self.num_experts:
            raise ValueError(
                f"logits_TE must have shape (tokens, num_experts={self.num_experts}), got {tuple(logits_TE.shape)}; "
                "flatten batch and sequence into one dimension of tokens"
            )
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        if token_mask is not None:
            if token_mask.dtype != torch.bool:
                raise TypeError(
                    f"token_mask must be bool with True for real tokens, got {token_mask.dtype}; use mask.bool()"
                )
            if token_mask.shape != logits_TE.shape[:1]:
                raise ValueError(
                    f"token_mask must have shape ({logits_TE.shape[0]},), one entry per token, "
                    f"got {tuple(token_mask.shape)}"
                )
            logits_TE = logits_TE.masked_fill(~token_mask[:, None], 0.0)
        if logits_TE.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_finite(logits_TE)
        return logits_TE

    @staticmethod
    def _check_finite(logits_TE: Tensor) -> None:
        # One sum instead of a mask of T×E flags: it is finite unless an entry is not, or (rarely) it overflows.
        if torch.isfinite(logits_TE.detach().sum()):
            return
        bad = torch.nonzero(~torch.isfinite(logits_TE))
        if len(bad):
            token, expert = bad[0].tolist()
            raise NonFiniteScores(
                f"logits_TE[{token}, {expert}] is {logits_TE[token, expert].item()}, one of {len(bad)} non-finite "
                "scores; training has probably diverged: lower the learning rate or clip gradients "
                "(padding belongs in token_mask)"
            )
