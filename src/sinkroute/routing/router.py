"""The base of all routers: what they check, count and share.

A router turns logits into `Routes`. In training each method has its own rule (`route`); when serving they are plain
top-k of the model's own scores, so that a model trained with them runs in every engine. (Methods that need something
beside the model's weights to serve say so.)
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sinkroute._errors import require_count
from sinkroute.kernels.normal import normal_like
from sinkroute.kernels.storage import uncached
from sinkroute.kernels.topk import topk
from sinkroute.routing.card import Card
from sinkroute.routing.clock import Clock, Draws, warn_of_passes
from sinkroute.routing.draws import uniform
from sinkroute.routing.firing import PlanCount
from sinkroute.routing.gate import LinearGate
from sinkroute.routing.ledger import talking
from sinkroute.routing.logits import checked_logits
from sinkroute.routing.losses.auxiliary import AuxiliaryLosses
from sinkroute.routing.losses.inputs import LossInputs
from sinkroute.routing.losses.registry import read_losses
from sinkroute.routing.options import CommonOptions, checked_groups, described
from sinkroute.routing.ranks import RouterRanks
from sinkroute.routing.routes import Routes
from sinkroute.routing.scores import limit_to_groups, scores, weigh
from sinkroute.routing.serving import Link, Serving
from sinkroute.routing.state import RouterState, recomputing
from sinkroute.transport.collectives import Account

__all__ = ["Router"]


class Router(nn.Module):
    """Logits in, `Routes` out. Subclasses override `route`, and what else their method needs.

    Args:
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        options: by keyword, those of `Options`.

    Attributes:
        options: what the router was made with. What is in use are the attributes of the same names.
        state: what the method remembers from step to step (in the `state_dict`), or None.
        ranks: whose tokens a plan balances, whose loads are counted, whose tokens differ.
        correction_E: (E,) what the model that the router is plugged into adds in its own choice, without weighing
            (`e_score_correction_bias`), or None. Plain top-k includes it; methods that choose otherwise do not look.
        correction_on: whether it is added to the `"scores"` or to the `"logits"`.
        sent: what passes send to other ranks, by mode; not the loss of the global batch where it is compiled.
        links: what the state is to agree with, such as that model's own bias.
        balances: False in `sinkroute.no_balancing`, where passes in training mode are routed as when serving.

    Raises:
        TypeError, ValueError: sizes that do not fit, an unknown name, a number out of range.
    """

    # The options of the method; a subclass has a subclass of them.
    Options: ClassVar[type[CommonOptions]] = CommonOptions
    # What `sinkroute routers` says of it.
    card: ClassVar[Card] = Card("no", "no", "top-k")
    # Losses of the method: name → the option that holds the coefficient.
    own_losses: ClassVar[Mapping[str, str]] = {}
    # Whether the weights are renormalised with norm_topk=None; None: for K > 1.
    renormalises: ClassVar[bool | None] = None
    # Whether a token may choose from some groups of experts only.
    keeps_groups: ClassVar[bool] = True
    # The gate may give so many numbers per token and expert; the first E are the logits.
    logit_parts: ClassVar[int] = 1
    # Whether the method depends on the step: then it warns where set_step is never called.
    needs_step = False
    # Whether it serves by the top-k of any gate's logits; not if it has a gate or a rule that no other model has.
    serves_any_gate: ClassVar[bool] = True
    # Whether it serves with potentials that are in the gate: it has to be given a `GateFold`, or to make its gate.
    moves_gate: ClassVar[bool] = False
    # What `sinkroute.set_inference` may choose from.
    inference_modes: ClassVar[tuple[str, ...]] = ("none",)
    inference: str = "none"
    # Whether this step is routed by a plan; None: the method has no steps of two kinds.
    sinkhorn_now: bool | None = None
    plan_count: PlanCount | None = None  # of a method that is to make plans now and then
    state: RouterState | None
    norm_topk: bool
    top_groups: int
    layer: int | None
    seed: int

    if TYPE_CHECKING:  # options are attributes, too

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # `help(...)` shows what the fields say.
        fill = textwrap.TextWrapper(110, subsequent_indent="    ", break_on_hyphens=False).fill
        rows = (fill(f"{each.name}: {each.kind} = {each.default}. {each.about}.") for each in described(cls.Options))
        options = textwrap.indent("\n".join(rows), "    ")
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nOptions:\n{options}\n"

    def __init__(self, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__()
        require_count("num_experts", num_experts, 1)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k must be between 1 and num_experts={num_experts}, got {top_k!r}; "
                "a token cannot visit an expert twice"
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.options = self.Options(**options)
        for each in fields(self.options):
            setattr(self, each.name, getattr(self.options, each.name))
        self.ranks = RouterRanks.of(self.options.process_group)
        self.top_groups = checked_groups(self.options, num_experts, top_k, type(self).__name__, self.keeps_groups)
        if self.options.norm_topk is None:
            self.norm_topk = top_k > 1 if self.renormalises is None else self.renormalises
        if self.ties == "spread":
            self.needs_step = True
        own = {name: getattr(self, coefficient) for name, coefficient in self.own_losses.items()}
        self.losses: dict[str, float] = own | read_losses(self.options.losses)
        self.layer_is_given = self.layer is not None
        self.clock, self._draws, self._auxiliary = Clock(), Draws(), AuxiliaryLosses(self.losses)
        self.state = None
        self.correction_E: Tensor | None = None
        self.correction_on: Literal["scores", "logits"] = "scores"
        self.links: list[Link] = []
        self.balances, self._warned_of_passes = True, False
        self.sent = {"train": Account(), "eval": Account()}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}"

    def make_gate(self, d_model: int) -> nn.Module:
        """The module that turns tokens (T, D) into the logits (T, E) that this router takes: a bias-free linear map."""
        return LinearGate(d_model, self.num_experts)

    # -- a pass ------------------------------------------------------------------------------------------------------

    @uncached  # what is noted in the first pass alone, and a choice that is found once
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
            RankLost: another rank has gone, in such a pass.
        """
        logits_TX, token_mask = self._checked(logits_TE, token_mask)  # (T, E) or (T, logit_parts · E)
        logits_TE = logits_TX[:, : self.num_experts]
        if self.training:
            self._count_pass()
        if plain is not None and self.is_plain():
            routes = plain  # (T, K)
        else:
            routes = self.route(logits_TX, token_mask) if self.training else self.serve(logits_TX, token_mask)
            if self.route_scale != 1:
                routes = replace(routes, weights=routes.weights * self.route_scale)
        if token_mask is not None:
            routes = routes.without_padding(token_mask)
        routes = replace(routes, load=self.count(routes.experts, routes.chosen))  # (E,)
        if not self.training:
            return routes
        if self.state is not None and not recomputing():
            sums = self.step_sums(logits_TX, routes, token_mask)
            for link in self.links:
                sums = {**sums, **link.count(token_mask)}
            self.state.note(routes.load, sums)
        return self._with_losses(routes, logits_TE, token_mask)

    def _checked(self, logits_TE: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if torch.compiler.is_compiling():
            return checked_logits(logits_TE, token_mask, self.num_experts, self.logit_parts)
        try:
            return checked_logits(logits_TE, token_mask, self.num_experts, self.logit_parts)
        except Exception:  # the other ranks would wait for this one
            self.withdraw(logits_TE.device if isinstance(logits_TE, Tensor) else torch.device("cpu"))
            raise

    def _with_losses(self, routes: Routes, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        choice = routes.experts, routes.chosen, routes.load
        inputs = LossInputs(logits_TE, *choice, token_mask, self.score, lambda: self.batch_load(routes.load))
        if (loss := self._auxiliary.total(inputs, routes.aux_loss)) is None:
            return routes
        loss, weights_TK = self._auxiliary.keep_gradient(loss, routes.weights, self.micro_batch)
        return replace(routes, weights=weights_TK, aux_loss=loss)

    # -- what a method overrides -------------------------------------------------------------------------------------

    def route(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        """The method's rule in training. `logits_TE` is float32 or float64, finite, and 0 where masked; it has more
        than E columns if the gate of the method gives more."""
        return self.topk(logits_TE[:, : self.num_experts])

    def serve(self, logits_TE: Tensor, token_mask: Tensor | None) -> Routes:
        """The method's rule in `eval()`."""
        return self.topk(logits_TE[:, : self.num_experts])

    def choice_bias(self) -> Serving | None:
        """What the method adds before its top-k, in this mode; None: nothing. Asked anew for each choice."""
        return None

    def serving(self) -> Serving | None:
        """How the method serves, in either mode: by the top-k of a gate's logits and this; None: by something else."""
        return (self.choice_bias() or Serving()) if self.serves_any_gate else None

    def potentials(self) -> tuple[Tensor, ...]:
        """What the state holds that is added to logits or scores, (E,) each: first that which serves."""
        served = self.serving()
        return () if served is None or served.bias_E is None else (served.bias_E,)

    def rebase(self, moved_E: Tensor) -> None:
        """What `moved_E` (E,) says has been added to the gate: all that is added to its logits is less by that."""
        for potentials_E in self.potentials():
            potentials_E.sub_(moved_E)

    def takes_correction(self) -> bool:
        """Whether `correction_E` takes part in the choice, in training too: not where the method has another rule."""
        return type(self).route is Router.route and self.choice_bias() is None

    def is_plain(self) -> bool:
        """Whether in this mode and step the method does no more than plain top-k (of a model that its state is in)."""
        if self.training:
            return self.takes_correction() and not self.losses and self.ties == "first"
        return (serving := self.serving()) is not None and (serving.plain or bool(self.links))

    def check_step(self, step: int, total_steps: int | None) -> None:
        """Refuse a step for which `prepare_step` would fail, before any router of a model is moved.

        Raises:
            ValueError: a schedule that is not told how long the training is, or leaves its bounds.
        """

    def prepare_step(self) -> None:
        """Decide what depends on the step alone; called by `set_step`, and once when a router is made."""

    def step_sums(self, logits_TE: Tensor, routes: Routes, token_mask: Tensor | None) -> dict[str, Tensor]:
        """What this micro-batch adds to `state.sums`, beside its load."""
        return {}

    def finish_step(self, load_E: Tensor, sums: dict[str, Tensor]) -> None:
        """Bring `state` up to date after a step, given the load (int64) and the sums of the whole batch."""

    def withdraw(self, device: torch.device) -> None:
        """Take part, with nothing to give, in the collective calls that other ranks make in this pass.

        For a rank that is about to raise: the others would wait for it. On a CPU they raise in the first call.
        """
        if self.training and not recomputing():
            self._auxiliary.withdraw(self.num_experts, self.ranks.load, device)

    # -- what methods choose and weigh with --------------------------------------------------------------------------

    def topk(self, logits_TE: Tensor) -> Routes:
        """The top-k of the scores and `choice_bias`, weighted by the scores: how methods serve."""
        experts_TK = self.choose(self.selection(logits_TE, self.choice_bias()))
        return Routes(experts_TK, self.weigh(logits_TE, experts_TK))

    def selection(self, logits_TE: Tensor, added: Serving | None) -> Tensor:
        """(T, E) what top-k goes by, with what the method adds, or else the model that it is plugged into."""
        bias_E, on = added or Serving()
        if bias_E is None and self.correction_E is not None:
            bias_E, on = self.correction_E, self.correction_on
        if bias_E is not None:
            values_TE = logits_TE.detach()
            values_TE = scores(values_TE, self.score) if on == "scores" else values_TE
            values_TE = values_TE + bias_E.to(values_TE.dtype)
            if added is None or on == "scores" or self.group_score == "max" or self.top_groups == self.groups:
                return values_TE
            # Groups are judged by scores, as where the bias is a part of the gate.
            return values_TE.where(self.within_groups(scores(values_TE, self.score), None).isfinite(), -torch.inf)
        if self.top_groups < self.groups and self.group_score == "top2-sum":
            return scores(logits_TE, self.score)
        # Logits are in the order of their scores, and tell apart what a softmax or sigmoid rounds to the same number.
        return logits_TE

    def choose(self, selection_TE: Tensor, *, spread: bool = True) -> Tensor:
        """(T, K) int64: the K largest of each row, in its best groups. `spread=False`: ties go to the lower expert."""
        ties = self.tie_seed() if spread else None
        return topk(self.within_groups(selection_TE, ties), self.top_k, ties)

    def within_groups(self, selection_TE: Tensor, ties: Tensor | None) -> Tensor:
        """`selection_TE` with −inf outside each token's best groups, where it may choose from some only."""
        if self.top_groups == self.groups:
            return selection_TE
        return limit_to_groups(selection_TE, self.groups, self.top_groups, self.group_score, ties)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """The scores of these experts, renormalised over them with `norm_topk`."""
        return weigh(logits_TE, experts_TK, self.score, self.norm_topk)

    def plain_experts(self, logits_TE: Tensor) -> Tensor:
        """(T, K) int64: the choice without the method, by the model's scores; of equal values the lower expert."""
        return self.choose(self.selection(logits_TE, None), spread=False)

    def count(self, experts_TK: Tensor, chosen_TK: Tensor | None) -> Tensor:
        """(E,) int64: how many choices each expert has; `chosen_TK` says which places are some, None: all."""
        # Not bincount: it would wait for the device to learn its output's size.
        ones_TK = torch.ones_like(experts_TK) if chosen_TK is None else chosen_TK.expand_as(experts_TK).long()
        load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=experts_TK.device)
        return load_E.scatter_add(0, experts_TK.flatten(), ones_TK.flatten())

    def batch_load(self, load_E: Tensor) -> Tensor:
        """(E,) int64: the load over all ranks and the micro-batches of this step up to this one. A collective call."""
        with nullcontext() if torch.compiler.is_compiling() else talking(self):
            return self._auxiliary.batch_load(load_E, self.ranks.load, self.micro_batch, keep=self.clock.told)

    # -- steps and random draws --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step that `set_step` told last."""
        return self.clock.step

    @property
    def micro_batch(self) -> int:
        """The micro-batch within the step."""
        return self.clock.micro_batch

    @property
    def total_steps(self) -> int | None:
        """The length of the training, or None where nobody told."""
        return self.clock.total_steps

    def set_step(self, step: int, micro_batch: int = 0, **lengths: int | None) -> None:
        """See `sinkroute.set_step`, which also ends the step before and numbers the layers."""
        if self.clock.set(step, micro_batch, **lengths):
            self._auxiliary.forget()
        if self.state is not None:
            self.state.begin(step)
        self._update_draws()
        self.prepare_step()

    def end_step(self, totals: Tensor) -> None:
        """The step is over: `totals` are `state.pending()`, summed over the ranks."""
        assert self.state is not None
        for link in self.links:
            link.pull()
        load_E, sums = self.state.split(totals)
        self.finish_step(load_E, sums)
        self.state.end()
        for link in self.links:
            link.learn(sums)
            link.push()

    def draw_uniform(self, tag: str, *, per_layer: bool) -> float:
        """A number in [0, 1) keyed by the step; the same on every rank. `per_layer`: and by layer and micro-batch."""
        where = (self.layer or 0, self.micro_batch) if per_layer else ()
        return uniform(tag, self.seed, self.step, *where)

    def draw_normal(self, reference: Tensor) -> Tensor:
        """Standard normal noise keyed by layer, step and micro-batch, and by the rank in `ranks.noise`.

        Ranks of a group have other tokens; those outside it that hold the same tokens (tensor parallelism) must draw
        the same.
        """
        return normal_like(reference.detach(), self.noise_seed())

    def noise_seed(self) -> Tensor:
        """Of `draw_normal`'s noise: 0-d int64 on the CPU."""
        if not torch.compiler.is_compiling():  # there it is of the last set_step
            self._update_draws()
        return self._draws.seed

    def tie_seed(self) -> Tensor | None:
        """What orders equal values here and now (see `topk`); None: the lower expert comes first."""
        return self.noise_seed() if self.training and self.ties == "spread" else None

    def _update_draws(self) -> None:
        self._draws.update(self.seed, self.layer or 0, self.step, self.micro_batch, self.ranks.noise.rank)

    def _count_pass(self) -> None:
        """Notice that nobody tells the steps, which nothing here can do without: what is summed over one would grow."""
        if torch.compiler.is_compiling() or recomputing() or not (passes := self.clock.count_pass()):
            return
        of_batch = self._auxiliary.of_batch
        if of_batch:
            self._auxiliary.begin_batch()
        if self._warned_of_passes or not (self.needs_step or of_batch):
            return
        self._warned_of_passes = True
        warn_of_passes(type(self).__name__, passes, self.step, of_batch)
