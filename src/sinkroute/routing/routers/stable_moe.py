"""StableMoE: learn the routes, distil them into a light router, then keep them (Dai et al., arXiv 2204.08396).

Main logits z_ij = x_i · c_j, and those of a light router that sees only what a token is: ẑ_ij = embedding(id_i) · ĉ_j.

    stage 1    experts a_i = top-k of z_i;     loss = 0.3 · balance + 0.3 · distillation
               balance      = mean_i Σ_{j in a_i} (n_j − n̄)/n̄ · sigmoid(z_ij)    n_j choices of expert j, n̄ their mean
               distillation = mean_i of the cross-entropy of softmax(ẑ_i) with a_i
    stage 2    experts = top-k of ẑ_i, frozen; no loss
    both       weights = sigmoid(z_ij)

(Section 3; the balance loss pushes down the scores of busy experts and up those of idle ones, and its counts get no
gradient.) Stage 1 is a tenth of the training. From then on, and when served, the same word always goes to the same
experts. The paper is top-1; for K > 1 the cross-entropy is the mean over a token's K experts.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute.kernels.storage import holds_values
from sinkroute.kernels.topk import topk
from sinkroute.routing.beside import checked_ids
from sinkroute.routing.card import Card
from sinkroute.routing.masked import mean_over_tokens
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.orthogonal import fill_orthogonal
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import Score, weigh
from sinkroute.routing.state import KeepsDtypes, RouterState, check_table, whole

__all__ = ["StableGate", "StableMoERouter"]

# Below every rank of a frozen choice, and finite.
_NEVER = -1e4


class StableGate(KeepsDtypes):
    """Tokens (T, D) and their ids (T,) to main and light logits, (T, 2·E); without ids to main logits, (T, E).

    Args:
        d_model: D.
        num_experts: E.
        top_k: K, experts that are kept per id when the light router is frozen.
        vocab_size: rows of the light router's table. An id takes the row id mod rows.
        light_dim: width of the table.

    Attributes:
        centroids: (E, D), of the main router.
        embeddings, light_centroids: (V, light_dim) and (E, light_dim), the light router.
        frozen_VK: (V, K) float32, what the light router chose when it was frozen, best first; −1 before. A buffer, of
            floats for the reason that `HashGate` tells.
        experts_VK: the same as int64.
        is_frozen: whether it is frozen: known without a device, which would have to be waited for.

    Raises:
        ValueError: in the forward pass, no ids although the routes are frozen.
    """

    needs_token_ids = False  # it takes them
    frozen_VK: Tensor

    @torch.inference_mode(False)  # it is to be trained and frozen, wherever it is made
    def __init__(self, d_model: int, num_experts: int, top_k: int, vocab_size: int, light_dim: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.empty(num_experts, d_model))
        self.embeddings = nn.Parameter(torch.empty(vocab_size, light_dim))
        self.light_centroids = nn.Parameter(torch.empty(num_experts, light_dim))
        self.register_buffer("frozen_VK", torch.empty(vocab_size, top_k, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initial values, nothing frozen: small centroids, so that all gates are near 1/2 at first."""
        fill_orthogonal(self.centroids, gain=0.1)
        nn.init.normal_(self.embeddings)
        fill_orthogonal(self.light_centroids, gain=0.1)
        self.frozen_VK.fill_(-1)
        self.is_frozen = False

    @property
    def experts_VK(self) -> Tensor:
        """(V, K) int64, the experts of each id since it was frozen; −1 before."""
        return whole(self.frozen_VK)

    def forward(self, x_TD: Tensor, token_ids: Tensor | None = None) -> Tensor:
        # In the dtype of the tokens, which the layer has lifted to float32: a gate in low precision is lifted too.
        dtype = x_TD.dtype
        main_TE = F.linear(x_TD, self.centroids.to(dtype))
        if token_ids is None:
            if self.is_frozen:
                raise ValueError(
                    "token_ids is None, but the routes of stable-moe are frozen by what a token is: call the layer "
                    "with token_ids=, integers of the leading shape of x"
                )
            return main_TE
        token_ids = checked_ids(token_ids, x_TD)
        row_T = token_ids % len(self.embeddings)
        light_TE = F.linear(F.embedding(row_T, self.embeddings).to(dtype), self.light_centroids.to(dtype))
        # Frozen are the choices, not the weights that led to them: these would go on moving by an optimiser's momentum
        # and weight decay. They stay in the graph with a gradient of 0, as data-parallel wrappers demand.
        frozen_TK = whole(self.frozen_VK[row_T])
        rank_K = torch.arange(frozen_TK.shape[1], device=x_TD.device, dtype=dtype)
        kept_TE = torch.full_like(light_TE, _NEVER).scatter(1, frozen_TK.clamp(min=0), -rank_K.expand(frozen_TK.shape))
        return torch.cat((main_TE, torch.where(frozen_TK[:, :1] >= 0, kept_TE, light_TE)), dim=1)

    @torch.no_grad()
    def freeze(self) -> None:
        """From now on every id has the experts that the light router chooses for it now."""
        light_VE = self.embeddings.float() @ self.light_centroids.float().t()
        chosen_VK = topk(light_VE, self.frozen_VK.shape[1])
        # What is frozen stays: a data-parallel wrapper may have filled the buffer, which `is_frozen` does not see.
        self.frozen_VK.copy_(torch.where(self.frozen_VK > -0.5, self.frozen_VK, chosen_VK))
        self.is_frozen = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_table(state_dict.get(f"{prefix}frozen_VK"), f"{prefix}frozen_VK", len(self.centroids))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.frozen_VK = self.frozen_VK.float()  # `assign=True` takes tensors as they are
        self.is_frozen = holds_values(self.frozen_VK) and bool(self.frozen_VK[0, 0] > -0.5)


class _StableState(RouterState):
    """`frozen`, and a copy of it in Python, `is_frozen`: asking the device in every step would wait for it."""

    is_frozen = False

    def freeze(self) -> None:
        self.frozen.fill_(1.0)
        self.is_frozen = True

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.is_frozen = False

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.is_frozen = holds_values(self.frozen) and float(self.frozen) >= self.frozen_from

    @property
    def frozen_from(self) -> float:
        """The least `frozen` with which the routes are frozen.

        In an average of models of both stages it is the share of those that are frozen, and their table has the same
        share of the gate's: with less than this, what the table rounds to is no model's.
        """
        return 1 - 1 / (4 * (len(self.load_E) + 1))

    def now(self) -> Tensor:
        """0-d bool, on the device: whether the routes are frozen."""
        return self.frozen >= self.frozen_from


class StableMoERouter(Router):
    """Routes that are learned first and kept afterwards.

    The gate (`make_gate`) looks at the ids of tokens: call the layer with `token_ids`. It gives 2·E numbers per token,
    main and light logits. Given main logits alone (which is what the gate makes of tokens without ids, until it is
    frozen), the router stays in stage 1.

    Here `norm_topk=None` means no: the weights are those of the paper. Without groups.

    Attributes:
        state: holds `frozen`, 0-d float32: 1.0 when stage 2 has begun, 0.0 before.
    """

    card = Card("yes", "yes", "top-k, a second gate and two losses; frozen, a look-up")
    logit_parts = 2
    needs_step = True
    serves_any_gate = False
    state: _StableState
    _warned = False

    renormalises = False
    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        freeze_step: int | None = option(
            None,
            "the step with which stage 2 begins. None: after a tenth of the training, as published; "
            "sinkroute.set_step(model, step, total_steps=...) tells how long that is. Until it does, the router stays "
            "in stage 1, with a warning",
            least=0,
        )
        balance_coefficient: float = option(0.3, "of the first loss of stage 1", least=0, published=True)
        distill_coefficient: float = option(0.3, "of the second loss of stage 1", least=0, published=True)
        vocab_size: int = option(
            8192,
            "rows of the light router's table; ids are taken modulo it. Give it the size of the vocabulary, or words "
            "share rows",
            least=1,
        )
        light_dim: int = option(50, "width of that table; 50 is the published value", least=1)
        score: Score = option("sigmoid", "what the model makes of logits; see the other routers")

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(num_experts, top_k, **options)
        self.state = _StableState(num_experts, frozen=torch.tensor(0.0, device="cpu"))
        self._gates: list[StableGate] = []  # a list, or the layer's gate would be a module of this router too

    def make_gate(self, d_model: int) -> nn.Module:
        """A `StableGate`, which this router freezes when stage 2 begins.

        Raises:
            ValueError: the router has a gate already.
        """
        if self._gates:
            raise ValueError("this stable-moe router has a gate already; make one router per layer")
        gate = StableGate(d_model, self.num_experts, self.top_k, self.vocab_size, self.light_dim)
        self._gates = [gate]
        return gate

    def prepare_step(self) -> None:
        if self.state.is_frozen:
            return
        if self.freeze_step is not None:
            freeze_step = self.freeze_step
        elif self.total_steps is not None:
            freeze_step = max(1, round(self.total_steps / 10))
        else:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "stable-moe does not freeze its routes, as it does not know how long training is: tell it, "
                    "sinkroute.set_step(model, step, total_steps=...), or give the router freeze_step",
                    stacklevel=4,  # at who calls sinkroute.set_step
                )
            return
        if self.step >= freeze_step:
            for gate in self._gates:
                gate.freeze()
            self.state.freeze()

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        routes = self.serve(logits_TE, token_mask)
        main_TE, light_TE = logits_TE[:, : self.num_experts], logits_TE[:, self.num_experts :]
        loss = self.balance_coefficient * self._balance_loss(main_TE, routes.experts, token_mask)
        if light_TE.shape[1]:
            log_light_TK = F.log_softmax(light_TE, dim=-1).gather(1, routes.experts)
            loss = loss - self.distill_coefficient * mean_over_tokens(log_light_TK.mean(1), token_mask)
            loss = torch.where(self.state.now(), 0.0, loss)
        return replace(routes, aux_loss=loss)

    def serve(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        main_TE, light_TE = logits_TE[:, : self.num_experts], logits_TE[:, self.num_experts :]
        if light_TE.shape[1] == 0:
            return self.topk(main_TE)
        # Chosen on the device: whether the routes are frozen is state, and to ask for it would wait.
        experts_TK = self.choose(torch.where(self.state.now(), light_TE, main_TE).detach())
        return Routes(experts_TK, self.weigh(main_TE, experts_TK))

    def _balance_loss(self, main_TE: Tensor, experts_TK: Tensor, token_mask: Tensor | None) -> Tensor:
        load_E = self.count(experts_TK, None if token_mask is None else token_mask[:, None]).to(main_TE.dtype)
        mean = load_E.mean().clamp(min=1 / self.num_experts)  # that of one choice: without any, the excess is 0
        excess_TK = ((load_E - load_E.mean()) / mean)[experts_TK]
        scores_TK = weigh(main_TE, experts_TK, self.score, normalise=False)
        return mean_over_tokens((excess_TK * scores_TK).sum(1), token_mask)
