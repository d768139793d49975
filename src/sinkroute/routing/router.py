"""The base of all routers: what they check, count and share.

A router turns logits into `Routes`. In training each method has its own rule (`route`); when serving they are plain
top-k of the model's own scores, so that a model trained with them runs in every engine. (Methods that need something
beside the model's weights to serve say so.)
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import deque
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, get_args

import torch
from torch import Tensor, nn

from sinkroute._errors import NonFiniteLogits, require_numbers, unknown_name
from sinkroute.kernels.normal import normal_like
from sinkroute.kernels.storage import holds_values, plain
from sinkroute.kernels.topk import topk
from sinkroute.routing.beside import checked_mask
from sinkroute.routing.draws import hash63, uniform
from sinkroute.routing.gate import LinearGate
from sinkroute.routing.losses.inputs import LossInputs
from sinkroute.routing.losses.registry import LOSSES, LossesLike, check_coefficient, read_losses
from sinkroute.routing.ranks import Group, Ranks
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import GroupScore, Score, limit_to_groups, scores, weigh
from sinkroute.routing.state import RouterState, recomputing
from sinkroute.transport import Plan, solve

__all__ = ["CommonOptions", "Link", "Router", "Serving", "Ties"]

# A float dtype that torch cannot convert; not every build has it.
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)

# After so many passes without set_step, accumulation and recomputation cannot explain it: somebody forgot.
_PASSES_BEFORE_WARNING = 64

# Nor after so many of one step, however often set_step was called for it.
_PASSES_OF_A_STEP = 4096

# What a rank gives instead of its load when it refuses its logits: below 0 with any loads, however many ranks do so.
_REFUSED = -(2**50)

# Passes of a step that are remembered until they are repeated; more are not under way at once.
_REMEMBERED = 256


Ties = Literal["first", "spread"]


class CommonOptions(TypedDict, total=False):
    """The keyword options that every router takes; see `Router`."""

    norm_topk: bool | None
    score: Score
    groups: int
    top_groups: int | None
    group_score: GroupScore
    route_scale: float
    ties: Ties
    losses: LossesLike
    process_group: Group
    seed: int
    layer: int | None


class Serving(NamedTuple):
    """What is added before a top-k of logits or scores.

    Attributes:
        bias_E: (E,), added for the choice and not to the weights; None: nothing.
        on: what it is added to, the `"logits"` or their `"scores"`.
    """

    bias_E: Tensor | None = None
    on: Literal["logits", "scores"] = "logits"

    @property
    def plain(self) -> bool:
        """Whether nothing is added."""
        return self.bias_E is None


class Link(Protocol):
    """Ties a router's state to a tensor of the model that it is plugged into."""

    def pull(self) -> None:
        """Take over what the model's tensor was set to since the last step."""

    def push(self) -> None:
        """Set the model's tensor to what the state has become."""


class Router(nn.Module):
    """Logits in, `Routes` out. Subclasses override `route`, and what else their method needs.

    Args:
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        norm_topk: whether the weights are renormalised over the chosen K. None: yes for K > 1; no for K = 1, where the
            one weight would be the constant 1 and the gate would get no gradient.
        score: what the model makes of logits: `"softmax"` over the experts, or `"sigmoid"` or `"sqrtsoftplus"`,
            each by itself.
        groups: the experts stand in so many groups (DeepSeek-V2 and V3); divides E. 1: no groups.
        top_groups: a token chooses experts of so many groups. None: of all.
        group_score: a group is as good as its best expert (`"max"`) or its best two together (`"top2-sum"`).
        route_scale: factor of all weights (`routed_scaling_factor`).
        ties: which of equal values is chosen: the lower expert (`"first"`), or, in training, one that is drawn for each
            token (`"spread"`), so that equal experts get equal loads: for a gate of zeros and for experts that are
            copies of one another. Serving is always `"first"`.
        losses: auxiliary losses beside those of the method: names, or name → coefficient. See `LOSSES`. One that the
            method has already is computed once, with this coefficient.
        process_group: the ranks whose tokens are balanced together: a `ProcessGroup` or `"world"`. None: for a plan,
            which is solved in every forward pass, this rank alone; for what is counted over a batch (biases, moving
            averages, the global loss), all ranks. Ranks outside a given group are taken to hold the same tokens as
            one in it (tensor parallelism), and draw the same noise.
        seed: of all random draws.
        layer: part of the key of the random draws; None: `sinkroute.set_step` numbers the routers of a model in order.

    Attributes:
        state: what the method remembers from step to step (in the `state_dict`), or None.
        correction_E: (E,) what the model that the router is plugged into adds in its own choice, without weighing
            (`e_score_correction_bias`), or None. Plain top-k includes it; methods that choose otherwise do not look.
        correction_on: whether it is added to the `"scores"` or to the `"logits"`.
        links: what the state is to agree with, such as that model's own bias.

    Raises:
        TypeError, ValueError: sizes that do not fit, an unknown name, a number out of range.
    """

    # The gate may give so many numbers per token and expert; the first E are the logits.
    logit_parts = 1
    state: RouterState | None
    # Whether the method depends on the step: then it warns where set_step is never called.
    needs_step = False
    # Whether it serves by the top-k of any gate's logits; not if it has a gate or a rule that no other model has.
    serves_any_gate = True
    # Whether it moves the gate that `bind_part` tells it of, and is to `see` what that gate is given.
    moves_gate = False

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        norm_topk: bool | None = None,
        score: Score = "softmax",
        groups: int = 1,
        top_groups: int | None = None,
        group_score: GroupScore = "top2-sum",
        route_scale: float = 1.0,
        ties: Ties = "first",
        losses: LossesLike = (),
        process_group: Group = None,
        seed: int = 0,
        layer: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("top_k", top_k), ("seed", seed), ("groups", groups)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        if num_experts < 1:
            raise ValueError(f"num_experts must be 1 or more, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts={num_experts}, got {top_k}; "
                "a token cannot visit an expert twice"
            )
        for name, choice, choices in (
            ("score", score, Score),
            ("group_score", group_score, GroupScore),
            ("ties", ties, Ties),
        ):
            if choice not in get_args(choices):
                raise unknown_name(name, choice, get_args(choices))
        if groups < 1 or num_experts % groups:
            raise ValueError(f"groups must divide num_experts={num_experts}, got {groups}; 1 means no groups")
        top_groups = groups if top_groups is None else top_groups
        if not 1 <= top_groups <= groups or top_groups * (num_experts // groups) < top_k:
            raise ValueError(
                f"top_groups must be between 1 and groups={groups} and hold top_k={top_k} experts "
                f"({num_experts // groups} in a group), got {top_groups}"
            )
        require_numbers(route_scale=route_scale)
        if not math.isfinite(route_scale):
            raise ValueError(f"route_scale must be a finite number, got {route_scale}; 1.0 leaves weights as they are")
        if norm_topk not in (True, False, None):
            raise TypeError(f"norm_topk must be True, False or None, got {norm_topk!r}")
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int)):
            raise TypeError(f"layer must be an int or None, got {layer!r}")
        self.num_experts, self.top_k = num_experts, top_k
        self.norm_topk = top_k > 1 if norm_topk is None else norm_topk
        self.score, self.groups, self.top_groups, self.group_score = score, groups, top_groups, group_score
        self.route_scale = float(route_scale)
        self.ties = ties
        if ties == "spread":
            self.needs_step = True
        self.losses = read_losses(losses)
        self.process_group = Ranks(process_group)
        self.batch_ranks = Ranks("world") if self.process_group == Ranks(None) else self.process_group
        self.seed, self.layer, self.layer_is_given = seed, layer, layer is not None
        self.step, self.micro_batch, self.step_was_set = 0, 0, False
        self.total_steps: int | None = None
        self.state = None
        self.correction_E: Tensor | None = None
        self.correction_on: Literal["scores", "logits"] = "scores"
        self.links: list[Link] = []
        self._passes_of_call = self._passes_of_step = 0  # in training, since set_step was called, and for this step
        self._warned_of_passes = False
        with torch.inference_mode(False):  # or it could not be written to outside it
            # There always, on the CPU: no parameter, no buffer.
            self._noise_seed = torch.zeros((), dtype=torch.int64, device="cpu")
        self._noise_key: tuple[int, ...] | None = None  # of that seed
        self._step_load_E: Tensor | None = None
        # By pass: its micro-batch, and its load with what `batch_load` made of it; or the leaf of its loss.
        self._step_loads: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)
        self._loss_leaves: deque[tuple[int, Tensor]] = deque(maxlen=_REMEMBERED)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"

    def add_loss(self, name: str, coefficient: float) -> None:
        """For methods that are a loss: compute it too, with this coefficient."""
        self.losses = {name: check_coefficient("coefficient", coefficient, LOSSES[name].coefficient), **self.losses}

    def refuse_groups(self) -> None:
        """For methods that cannot keep a token's experts in some groups; called when they are made.

        Raises:
            ValueError: the router's tokens may choose from some groups only.
        """
        if self.top_groups < self.groups:
            raise ValueError(
                f"top_groups={self.top_groups} of groups={self.groups}: {type(self).__name__} cannot keep a token's "
                "experts in some groups; take ssr-l or ssr-s, or all groups"
            )

    def check_step(self, step: int, total_steps: int | None) -> None:
        """Refuse a step for which `prepare_step` would fail, before any router of a model is moved.

        Raises:
            ValueError: a schedule that is not told how long the training is, or leaves its bounds.
        """

    def make_gate(self, d_model: int) -> nn.Module:
        """The module that turns tokens (T, D) into the logits (T, E) that this router takes: a bias-free linear map."""
        return LinearGate(d_model, self.num_experts)

    def choice_bias(self) -> Serving | None:
        """What the method adds before its top-k, in this mode; None: nothing. Asked anew for each choice."""
        return None

    def serving(self) -> Serving | None:
        """How the method serves, in either mode: by the top-k of a gate's logits and this; None: by something else."""
        return (self.choice_bias() or Serving()) if self.serves_any_gate else None

    def takes_correction(self) -> bool:
        """Whether `correction_E` takes part in the choice, in training too: not where the method has another rule."""
        return type(self).route is Router.route and self.choice_bias() is None

    def is_plain(self) -> bool:
        """Whether in this mode and step the method does no more than plain top-k (of a model that its state is in)."""
        if self.training:
            return self.takes_correction() and not self.losses and self.ties == "first"
        serving = self.serving()
        return serving is not None and (serving.plain or bool(self.links))

    def forward(self, logits_TE: Tensor, token_mask: Tensor | None = None, *, plain: Routes | None = None) -> Routes:
        """Route T tokens.

        Args:
            logits_TE: (T, E) logits of any float dtype; computed with in float32 (float64 stays float64). T may be 0.
            token_mask: (T,) bool, True for real tokens. Padding is in no marginal, load or loss; its logits may be
                anything.
            plain: plain top-k of these logits where the model has done it already, finished weights included: taken
                as it is where the method would do the same (`is_plain`), so that a model that the router is plugged
                into keeps its own bits.

        Raises:
            TypeError: a dtype that is not float, a mask that is no bool tensor.
            ValueError: a wrong shape; non-finite logits of a real token (checked on CPU only: elsewhere it would stall
                the device); on a CPU, another rank has refused its logits in a pass for which the ranks talk.
        """
        all_TX, token_mask = self._checked_together(logits_TE, token_mask)
        logits_TE = all_TX[:, : self.num_experts]
        if self.training:
            self._count_pass()
        if plain is not None and self.is_plain():
            routes = plain
        else:
            routes, plain = self.route(all_TX, token_mask) if self.training else self.serve(all_TX, token_mask), None
        experts_TK, weights_TK, chosen_TK = routes.experts, routes.weights, routes.chosen
        if self.route_scale != 1 and plain is None:
            weights_TK = weights_TK * self.route_scale
        if token_mask is not None:
            weights_TK = weights_TK * token_mask[:, None]
            chosen_TK = token_mask[:, None] if chosen_TK is None else chosen_TK & token_mask[:, None]
        if chosen_TK is not None:
            chosen_TK = chosen_TK.expand_as(experts_TK)
        load_E = self._count(experts_TK, chosen_TK)
        routes = replace(routes, weights=weights_TK, load=load_E, chosen=chosen_TK)
        if not self.training:
            return routes
        if self.state is not None and not recomputing():
            self.state.note(load_E, self.step_sums(all_TX, routes, token_mask))
        aux_loss = self._auxiliary_loss(logits_TE, routes, token_mask)
        if aux_loss is None:
            return routes
        aux_loss, weights_TK = self._keep_gradient(aux_loss, weights_TK)
        return replace(routes, weights=weights_TK, aux_loss=aux_loss)

    # -- what a method overrides -------------------------------------------------------------------------------------

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        """The method's rule in training. `logits_TE` is float32 or float64, finite, and 0 where masked; it has more
        than E columns if the gate of the method gives more."""
        return self.score_topk(logits_TE[:, : self.num_experts])

    def serve(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        """The method's rule in `eval()`."""
        return self.score_topk(logits_TE[:, : self.num_experts])

    def prepare_step(self) -> None:
        """Decide what depends on the step alone; called by `set_step`, and once when a router is made."""

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        """What this micro-batch adds to `state.sums`, beside its load."""
        return {}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        """Bring `state` up to date after a step, given the load (int64) and the sums of the whole batch."""

    # -- what methods choose and weigh with --------------------------------------------------------------------------

    def score_topk(self, logits_TE: Tensor) -> Routes:
        """The top-k of the scores and `choice_bias`, weighted by the scores: how methods serve."""
        return self.choose_by(self._selection(logits_TE, self.choice_bias()), logits_TE)

    def served_experts(self, logits_TE: Tensor) -> Tensor:
        """(T, K) int64: the choice as in `eval()`, in either mode; of equal values the lower expert."""
        return self._choose(self._selection(logits_TE, self.serving()), None)

    def _selection(self, logits_TE: Tensor, added: Serving | None) -> Tensor:
        """(T, E) what top-k goes by, with what the method adds, or else the model that it is plugged into."""
        bias_E, on = added or Serving()
        if bias_E is None and self.correction_E is not None:
            bias_E, on = self.correction_E, self.correction_on
        if bias_E is not None:
            values_TE = logits_TE.detach()
            values_TE = scores(values_TE, self.score) if on == "scores" else values_TE
            return values_TE + bias_E.to(values_TE.dtype)
        if self.top_groups < self.groups and self.group_score == "top2-sum":
            return scores(logits_TE, self.score)
        # Logits are in the order of their scores, and tell apart what a softmax or sigmoid rounds to the same number.
        return logits_TE

    def choose_by(self, selection_TE: Tensor, logits_TE: Tensor) -> Routes:
        """The K largest of `selection_TE` within the groups, weighted by the scores of `logits_TE`."""
        experts_TK = self.choose(selection_TE)
        return Routes(experts_TK, self.weigh(logits_TE, experts_TK))

    def choose(self, selection_TE: Tensor) -> Tensor:
        """(T, K) int64: the K largest of each row, in its best groups; see `topk`."""
        return self._choose(selection_TE, self.tie_seed())

    def _choose(self, selection_TE: Tensor, ties: Tensor | None) -> Tensor:
        if self.top_groups < self.groups:
            selection_TE = limit_to_groups(selection_TE, self.groups, self.top_groups, self.group_score, ties)
        return topk(selection_TE, self.top_k, ties)

    def choose_in(self, plan: Plan) -> Tensor:
        """(T, K) int64: the K largest entries of each row of a plan, in its best groups."""
        if self.top_groups == self.groups:
            if self.tie_seed() is None:
                return plan.topk(self.top_k)[1]
            # Before the division by reg, after which distinct entries may underflow to ties.
            return self.choose((plan.cost + plan.potentials).detach())
        return self.choose(plan.matrix().detach())  # groups are judged by the sums of entries

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """The scores of these experts, renormalised over them with `norm_topk`."""
        return weigh(logits_TE, experts_TK, self.score, self.norm_topk)

    def _count(self, experts_TK: Tensor, counted_TK: Tensor | None) -> Tensor:
        # Not bincount: it would wait for the device to learn its output's size.
        if counted_TK is None:
            ones_R = torch.ones_like(experts_TK).flatten()
        else:
            ones_R = counted_TK.expand_as(experts_TK).flatten().long()
        load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=experts_TK.device)
        return load_E.scatter_add(0, experts_TK.flatten(), ones_R)

    # -- losses ------------------------------------------------------------------------------------------------------

    def _auxiliary_loss(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> Tensor | None:
        total, load_E = routes.aux_loss, routes.load
        inputs = LossInputs(
            logits_TE, routes.experts, routes.chosen, load_E, token_mask, self.score, lambda: self.batch_load(load_E)
        )
        for name, coefficient in self.losses.items():
            loss = coefficient * LOSSES[name].function(inputs)
            total = loss if total is None else total + loss
        return total

    def batch_load(self, load_E: Tensor) -> Tensor:
        """(E,) int64: the load over all ranks and the micro-batches of this step up to this one. A collective call."""
        if recomputing():
            known = [(own_E, batch_E) for part, own_E, batch_E in self._step_loads if part == self.micro_batch]
            # Several passes under one key: a repetition has the load of its own pass. One pass: nothing to compare,
            # and a device need not be waited for.
            for own_E, batch_E in reversed(known):
                if len(known) == 1 or torch.equal(own_E, load_E):
                    return batch_E
        batch_E = self.batch_ranks.sum(load_E.clone())
        if not torch.compiler.is_compiling() and _is_refused(batch_E):
            raise ValueError("another rank refused its logits, its error says why; here they are right")
        if self.step_was_set:
            batch_E = batch_E if self._step_load_E is None else batch_E + self._step_load_E
            self._step_load_E = batch_E
            if not torch.compiler.is_compiling():  # nothing compiled looks it up, and each index would be a graph
                self._step_loads.append((self.micro_batch, load_E, batch_E))
        return batch_E

    def _keep_gradient(self, aux_loss: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the loss's gradient alive under reentrant activation checkpointing.

        There the forward pass runs without a graph, and what it leaves beside its output, as `Routes` does, gets no
        gradient. So the loss is handed out as a leaf, which collects the gradient that it is given; when the pass is
        repeated inside the backward pass, that gradient is passed on to the loss of the repetition.

        Compiled code cannot ask whether it is a repetition: checkpoint compiled layers with `use_reentrant=False`.
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return aux_loss, weights_TK
        if not torch.is_grad_enabled():
            leaf = aux_loss.detach().requires_grad_()
            self._loss_leaves.append((self.micro_batch, leaf))
            return leaf, weights_TK
        if recomputing():
            # The last that a loss has reached: there are others where a layer is used several times, and where several
            # forward passes come before a backward pass; one without a gradient is of a pass that was a trial.
            leaves = (leaf for part, leaf in reversed(self._loss_leaves) if part == self.micro_batch)
            found = next((leaf for leaf in leaves if leaf.is_leaf and leaf.grad is not None), None)
            if found is not None:
                weights_TK = _AddGradient.apply(weights_TK, aux_loss, found.grad)
                found.grad = None  # this one has been passed on
        return aux_loss, weights_TK

    # -- steps and random draws --------------------------------------------------------------------------------------

    def set_step(self, step: int, micro_batch: int = 0, total_steps: int | None = None) -> None:
        """See `sinkroute.set_step`, which also ends the step before and numbers the layers."""
        if (step, True) != (self.step, self.step_was_set):
            self._step_load_E = None
            self._step_loads.clear()
            self._loss_leaves.clear()
            self._passes_of_step = 0
        self._passes_of_call = 0
        self.step, self.micro_batch, self.step_was_set = step, micro_batch, True
        self.total_steps = self.total_steps if total_steps is None else total_steps
        if self.state is not None:
            self.state.begin(step)
        self._update_noise_seed()
        self.prepare_step()

    def end_step(self, totals: Tensor) -> None:
        """The step is over: `totals` are `state.pending()`, summed over the ranks."""
        assert self.state is not None
        for link in self.links:
            link.pull()
        self.finish_step(*self.state.split(totals))
        self.state.end()
        for link in self.links:
            link.push()

    def draw_uniform(self, tag: str, *, per_layer: bool) -> float:
        """A number in [0, 1) keyed by the step; the same on every rank. `per_layer`: and by layer and micro-batch."""
        where = (self.layer or 0, self.micro_batch) if per_layer else ()
        return uniform(tag, self.seed, self.step, *where)

    def draw_normal(self, reference: Tensor) -> Tensor:
        """Standard normal noise keyed by layer, step and micro-batch, and by the rank in `batch_ranks`.

        Ranks of a group have other tokens; those outside it that hold the same tokens (tensor parallelism) must draw
        the same.
        """
        return normal_like(reference.detach(), self.noise_seed())

    def noise_seed(self) -> Tensor:
        """Of `draw_normal`'s noise: 0-d int64 on the CPU."""
        if not torch.compiler.is_compiling():  # there it is of the last set_step
            self._update_noise_seed()
        return self._noise_seed

    def tie_seed(self) -> Tensor | None:
        """What orders equal values here and now (see `topk`); None: the lower expert comes first."""
        return self.noise_seed() if self.training and self.ties == "spread" else None

    def _update_noise_seed(self) -> None:
        key = (self.seed, self.layer or 0, self.step, self.micro_batch, self.batch_ranks.rank)
        if key != self._noise_key:
            # A function that torch.func transforms may write to nothing from outside; this is no value of such a one.
            with torch._C._DisableFuncTorch():
                self._noise_seed.fill_(hash63("noise", *key))
            self._noise_key = key

    def _count_pass(self) -> None:
        """Notice that nobody tells the steps, which nothing here can do without: what is summed over one would grow."""
        if torch.compiler.is_compiling() or recomputing():
            return
        self._passes_of_call += 1
        self._passes_of_step += 1
        # A step that was told may have that many passes, before it is told nobody waits for one.
        allowed = _PASSES_BEFORE_WARNING - (not self.step_was_set)
        if self._passes_of_call <= allowed and self._passes_of_step <= _PASSES_OF_A_STEP:
            return
        passes = max(self._passes_of_call, self._passes_of_step)
        self._passes_of_call = self._passes_of_step = 0
        of_batch = any(LOSSES[name].of_batch for name in self.losses)
        if of_batch:
            self._step_load_E = None
        if self._warned_of_passes or not (self.needs_step or of_batch):
            return
        self._warned_of_passes = True
        warnings.warn(
            f"{type(self).__name__} has been trained {passes} times for step {self.step}: its random draws repeat, its "
            f"state does not move{', the load of its global batch begins anew' if of_batch else ''}. Call "
            "sinkroute.set_step(model, step) before every training step, with micro_batch= where a step has several.",
            stacklevel=3,
        )

    # -- input -------------------------------------------------------------------------------------------------------

    def withdraw(self, device: torch.device) -> None:
        """Take part, with nothing to give, in the collective calls that other ranks make in this pass.

        For a rank that is about to raise: the others would wait for it. On a CPU they raise in the first call.
        """
        if self.training and not recomputing() and any(LOSSES[name].of_batch for name in self.losses):
            self.batch_ranks.sum(torch.full((self.num_experts,), _REFUSED, dtype=torch.int64, device=device))

    def _withdraw_from_plan(self, device: torch.device, tol: float, max_passes: int | None) -> bool:
        """`withdraw` from a `solve` over `process_group`; whether the other ranks know now, and call no more."""
        group = self.process_group.group
        if group is None:
            return False
        nothing = torch.empty(0, self.num_experts, dtype=torch.int64, device=device)
        with contextlib.suppress(TypeError):  # integers are refused, and solve tells the others
            solve(nothing, tol=tol, max_passes=max_passes, process_group=group)
        return device.type == "cpu"

    def _checked_together(self, logits_TE: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            return self._checked(logits_TE, token_mask)
        try:
            return self._checked(logits_TE, token_mask)
        except (TypeError, ValueError):
            self.withdraw(logits_TE.device if isinstance(logits_TE, Tensor) else torch.device("cpu"))
            raise

    def _checked(self, logits_TE: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(logits_TE, Tensor) or not logits_TE.is_floating_point():
            kind = logits_TE.dtype if isinstance(logits_TE, Tensor) else type(logits_TE).__name__
            raise TypeError(f"logits_TE must be a float tensor, got {kind}; pass the gate's scores")
        if logits_TE.dtype == _PACKED:
            raise TypeError(f"logits_TE is {_PACKED}, two numbers in one; pass the gate's scores as torch.bfloat16")
        logits_TE = plain("logits_TE", logits_TE)
        widths = (self.num_experts, self.num_experts * self.logit_parts)
        if logits_TE.ndim != 2 or logits_TE.shape[1] not in widths:
            raise ValueError(
                f"logits_TE must have shape (tokens, num_experts={self.num_experts}), got {tuple(logits_TE.shape)}; "
                "flatten batch and sequence into one dimension of tokens"
            )
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        token_mask = checked_mask(token_mask, logits_TE, logits_TE.shape[:1])
        if token_mask is not None:
            logits_TE = logits_TE.masked_fill(~token_mask[:, None], 0.0)
        if logits_TE.device.type == "cpu" and holds_values(logits_TE) and not torch.compiler.is_compiling():
            self._check_finite(logits_TE)
        return logits_TE, token_mask

    @staticmethod
    def _check_finite(logits_TE: Tensor) -> None:
        # One sum instead of a mask of T×E flags: it is finite unless an entry is not, or (rarely) it overflows.
        if math.isfinite(logits_TE.detach().sum().item()):
            return
        bad = torch.nonzero(~torch.isfinite(logits_TE))
        if len(bad):
            token, expert = bad[0].tolist()
            raise NonFiniteLogits(
                f"logits_TE[{token}, {expert}] is {logits_TE[token, expert].item()}, one of {len(bad)} non-finite "
                "scores; training has probably diverged: lower the learning rate or clip gradients "
                "(padding belongs in token_mask)"
            )


def _is_refused(batch_E: Tensor) -> bool:
    """Whether a rank gave `_REFUSED`; a device is not waited for."""
    return batch_E.device.type == "cpu" and holds_values(batch_E) and int(batch_E[0]) < 0


class _AddGradient(torch.autograd.Function):
    """The identity of its first argument; `loss` gets the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad, scale, None
