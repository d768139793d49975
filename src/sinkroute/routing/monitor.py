"""What the routers of a model do while it trains and serves, for any method, seen from outside.

A forward hook on every router adds to sums that stay on its device: counts of choices, MaxVio of each pass
(arXiv 2408.15664), what the method tells of its plan and its loss. Nothing is waited for and no rank is asked until
somebody wants the numbers: then one transfer, and one collective call for all layers.

- Training and evaluation are apart, by the router's mode. A forward pass that is repeated for activation checkpointing
  counts once. A pass without a real token counts nowhere.
- A pass is one call of a router on one rank: a micro-batch. `max_vio` is the mean over passes, `max_vio_global` that of
  the summed loads.
- The detailed tier also looks at the logits that the router is given. p is the softmax of a token's logits (or their
  sigmoids over the sum of these); "plain top-k" is that of the same logits, which is how most methods serve: of equal
  ones the lower expert, whatever `ties` says for training.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import operator
import os
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from sinkroute._errors import unknown_name
from sinkroute.kernels.operations import uncompiled
from sinkroute.routing.attached import named_routers
from sinkroute.routing.metrics import load_metrics, max_violation, router_entropy
from sinkroute.routing.ranks import Group, Ranks
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.state import recomputing

__all__ = ["LoadMonitor"]

Tier = Literal["brief", "detailed"]
Mode = Literal["train", "eval"]

_SUMS = (
    "tokens",  # real ones
    "passes",
    "places",  # for experts that tokens were offered: K each, or fewer where the method takes fewer
    "excess",  # experts of a token beyond K
    "max_vio",
    "losses",  # passes with an auxiliary loss
    "aux_loss",
    "sinkhorn_passes",
    "assigned_passes",  # whose branch is not "softmax"
    "max_vio_assigned",
    "plans",  # passes that told of a plan
    "plan_error",
    "plan_passes",
)
_DETAILED_SUMS = ("router_entropy", "assigned_tokens", "moved_tokens", "max_vio_topk")
_TABLE = (
    "tokens",
    "passes",
    "max_vio",
    "max_vio_global",
    "entropy",
    "cv",
    "dead",
    "drop_rate",
    "sinkhorn_share",
)
# What wrappers insert into the path of a module.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


class LoadMonitor:
    """Watches the routers of a model. It is attached when made, and a context manager that removes itself.

    Args:
        model: holds routers; a `DistributedDataParallel` or a compiled model may be given too. What `torch.compile`
            has compiled before does not know the hooks: attach first, or call `torch.compiler.reset()`.
        tier: `"brief"`, or `"detailed"`, which also measures the logits: it costs some operations on T × E numbers.

    Attributes:
        layers: the names: each router's path in the model, without a trailing `.router` and what wrappers insert.

    Raises:
        ValueError: a model without routers, or an unknown tier.

    >>> import sinkroute
    >>> model = nn.ModuleDict({"ffn": sinkroute.MoE(d_model=8, d_hidden=16, num_experts=4, top_k=2)})
    >>> with sinkroute.LoadMonitor(model) as monitor:
    ...     for step in range(3):
    ...         sinkroute.set_step(model, step)
    ...         _ = model["ffn"](torch.randn(5, 8))
    >>> metrics = monitor.metrics(reset=True)
    >>> metrics["ffn"]["passes"], metrics["ffn"]["tokens"], sum(metrics["ffn"]["load"])
    (3, 15, 30)
    """

    def __init__(self, model: nn.Module, tier: Tier = "brief") -> None:
        if tier not in get_args(Tier):
            raise unknown_name("tier", tier, get_args(Tier))
        self.model, self.tier = model, tier
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
        self._routers = _routers(model)
        self._watches = {name: _Watch(router, tier, device) for name, router in self._routers.items()}
        self._handles: list[RemovableHandle] = []
        self.attach()

    @property
    def layers(self) -> list[str]:
        return list(self._routers)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def attach(self) -> LoadMonitor:
        """Watch (again); nothing happens to a monitor that is attached. What was counted before stays."""
        if not self._handles:
            self._handles = [
                router.register_forward_hook(self._watches[name], with_kwargs=True)
                for name, router in self._routers.items()
            ]
        return self

    def remove(self) -> None:
        """Take all hooks off the model; what was counted can still be read."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> LoadMonitor:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- numbers -----------------------------------------------------------------------------------------------------

    def metrics(
        self, mode: Mode = "train", *, reset: bool = False, process_group: Group = None
    ) -> dict[str, dict[str, Any]]:
        """What was counted since the last reset, by layer.

        `load` (list of E counts), `tokens`, `passes`; `max_vio` (mean over passes) and, of the summed load,
        `max_vio_global`, `entropy`, `cv`, `dead` and `dead_share` (under 1 % of the mean load); `drop_rate`, the share
        of the places for experts that tokens were offered (K each) and no expert took; `aux_loss`, mean over passes
        that had one; `sinkhorn_share` and `assigned_share` of passes, and means over such: `plan_error`,
        `plan_error_max`, `plan_passes` of plans, `max_vio_assigned`. An assigned pass is one whose branch is not
        `"softmax"`: a Sinkhorn step, a linear assignment, expert choice.

        Detailed also `router_entropy`, mean over tokens of H(p) in nats, and over assigned passes: `disagreement`, the
        share of tokens whose set of experts is not that of plain top-k; `max_vio_topk` of plain top-k; and `gap`,
        `max_vio_topk − max_vio_assigned`: the balance that is lost between training and serving.

        A layer that saw no token is balanced (`max_vio` 0, `entropy` 1); a mean of nothing is None.

        Args:
            mode: passes in training mode or in `eval()`.
            reset: begin anew with this mode.
            process_group: sum over these ranks (`"world"`: all): a collective call, with the same layers on each.
                None: this rank alone.
        """
        _check_mode(mode)
        totals = self._totals(mode, Ranks(process_group).group)
        if reset:
            self.reset(mode)
        return {name: watch.describe(*totals[name]) for name, watch in self._watches.items()}

    def reset(self, mode: Mode | None = None) -> None:
        """Begin anew with one mode, or with both."""
        if mode is not None:
            _check_mode(mode)
        for watch in self._watches.values():
            for name, counts in watch.counts.items():
                if mode in (None, name):
                    counts.zero()

    def _totals(self, mode: Mode, group: dist.ProcessGroup | None) -> dict[str, tuple[Tensor, list[float], float]]:
        """By layer, over the ranks: load (int64), sums, largest plan error. One transfer, one collective call."""
        packs = [watch.counts[mode].pack() for watch in self._watches.values()]
        packed = torch.cat([pack.to(packs[0].device) for pack in packs])
        ranks = [packed]
        if group is not None:
            Ranks(group).require_alike(
                [len(pack) for pack in packs],
                packed.device,
                "the ranks of process_group must watch the same layers in the same tier; give a group of ranks that do",
            )
            # Gathered, not reduced: most is summed, but not all.
            ranks = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
            dist.all_gather(ranks, packed, group=group)
        by_rank = torch.stack(ranks).cpu().split([len(pack) for pack in packs], dim=1)
        totals = {}
        for (name, watch), part in zip(self._watches.items(), by_rank, strict=True):
            sums = part[:, :-1].sum(0)
            load_E, rest = sums[: watch.num_experts].long(), sums[watch.num_experts :].tolist()
            totals[name] = load_E, rest, part[:, -1].amax().item()
        return totals

    # -- a fixed batch -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Where a batch goes in `eval()`: layer → (T, K) int64 experts of its real tokens, on the CPU.

        Of the same batch at two times, `sinkroute.routing.metrics.routing_fluctuation` and `saturation` tell how far
        the routes have moved. The pass is counted nowhere, and every module is left in the mode it was in. Call it
        between steps: `MoE.routes` is of the probe afterwards.

        Args:
            inputs: what the model is called with.
            named: and by keyword.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self._routers}

        def collect(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], routes: Routes) -> None:
            _, mask_T = _inputs(*args, **kwargs)
            found[name].append((routes.experts if mask_T is None else routes.experts[mask_T]).cpu())

        modes = [(module, module.training) for module in self.model.modules()]
        with contextlib.ExitStack() as undo:
            if "torch._dynamo" in sys.modules:  # a compiled model would not know the hooks
                undo.enter_context(torch.compiler.set_stance("force_eager"))
            for name, router in self._routers.items():
                self._watches[name].paused = True
                undo.callback(setattr, self._watches[name], "paused", False)
                hook = router.register_forward_hook(
                    lambda _, args, kwargs, routes, name=name: collect(name, args, kwargs, routes), with_kwargs=True
                )
                undo.callback(hook.remove)
            for module, was_training in modes:
                undo.callback(setattr, module, "training", was_training)
            self.model.eval()
            self.model(*inputs, **named)
        empty = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        return {name: torch.cat(parts) if parts else empty for name, parts in found.items()}

    # -- outputs -----------------------------------------------------------------------------------------------------

    def write(
        self,
        path: str | os.PathLike[str],
        step: int,
        *,
        mode: Mode = "train",
        reset: bool = False,
        process_group: Group = None,
    ) -> None:
        """Append `{"step": ..., "mode": ..., "layers": metrics()}` as one line of JSON.

        The line is handed to the system at once and survives the process; one that a killed process left torn is cut
        off, so that the file is JSONL at all times. NaN and infinity become null, which JSON lacks words for.

        Args:
            path: the file; made if it is not there.
            step: any integer.
            mode, reset, process_group: see `metrics`. With a group the first of its ranks writes, for all of them.

        Raises:
            OSError: the file cannot be written.
        """
        step = operator.index(step)
        layers = self.metrics(mode, reset=reset, process_group=process_group)
        group = Ranks(process_group).group
        if group is not None and dist.get_rank(group) != 0:
            return
        finite = {
            layer: {name: None if _is_not_finite(value) else value for name, value in values.items()}
            for layer, values in layers.items()
        }
        _append(Path(path), json.dumps({"step": step, "mode": mode, "layers": finite}, allow_nan=False))

    def to_pandas(self, mode: Mode = "train", *, process_group: Group = None) -> Any:
        """`metrics()` as a `pandas.DataFrame`: a row per layer, a column per metric.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas; metrics() and write() do without") from error
        metrics = self.metrics(mode, process_group=process_group)
        return pandas.DataFrame(list(metrics.values()), index=pandas.Index(list(metrics), name="layer"))

    def table(self, mode: Mode = "train", *, process_group: Group = None) -> str:
        """The most important of `metrics()` as text, a line per layer.

        >>> import sinkroute
        >>> router = sinkroute.create_router("softmax", num_experts=4, top_k=1)
        >>> with LoadMonitor(router) as monitor:
        ...     _ = router(torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        >>> print(monitor.table())
        layer   tokens  passes  max_vio  max_vio_global  entropy     cv  dead  drop_rate  sinkhorn_share
        router       4       1    1.000           1.000    0.500  1.000     2      0.000           0.000
        """
        metrics = self.metrics(mode, process_group=process_group)
        rows = [["layer", *_TABLE]]
        rows += [[name, *(_shown(values[column]) for column in _TABLE)] for name, values in metrics.items()]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells))
            for cells in (zip(row, widths, strict=True) for row in rows)
        )


class _Counts:
    """What one router did in one mode, in tensors on its device: never replaced by a pass, only added to."""

    def __init__(self, num_experts: int, names: tuple[str, ...], device: torch.device) -> None:
        # In inference mode they would become tensors that nothing outside it may add to.
        with torch.inference_mode(False):
            self.load_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
            # Counts too: float64 holds them exactly up to 2^53.
            self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
            self.plan_error_max = torch.zeros((), dtype=torch.float64, device=device)

    @uncompiled
    def move(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # as above
            self.load_E = self.load_E.to(device)
            self.sums = {name: value.to(device) for name, value in self.sums.items()}
            self.plan_error_max = self.plan_error_max.to(device)

    def zero(self) -> None:
        for value in (self.load_E, *self.sums.values(), self.plan_error_max):
            value.zero_()

    def pack(self) -> Tensor:
        """Load, sums, largest plan error in one float64 vector."""
        return torch.cat([self.load_E.double(), torch.stack([*self.sums.values(), self.plan_error_max])])


class _Watch:
    """The hook of one router."""

    def __init__(self, router: Router, tier: Tier, device: torch.device) -> None:
        self.num_experts, self.detailed, self.paused = router.num_experts, tier == "detailed", False
        names = _SUMS + (_DETAILED_SUMS if self.detailed else ())
        self.counts = {mode: _Counts(router.num_experts, names, device) for mode in get_args(Mode)}

    def __call__(self, router: Router, args: tuple[Any, ...], kwargs: dict[str, Any], routes: Routes) -> None:
        if self.paused:
            return
        logits_TE, token_mask = _inputs(*args, **kwargs)
        if router.training:
            self._note_training(router, logits_TE, token_mask, routes)
        elif not recomputing():
            self._note(self.counts["eval"], router, logits_TE, token_mask, routes)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model, or one that is saved, is nobody's business: its hook does nothing.
        return _ignoring, ()

    @uncompiled  # compiled code cannot tell a repetition
    def _note_training(self, router: Router, logits_TE: Tensor, token_mask: Tensor | None, routes: Routes) -> None:
        if not recomputing():
            self._note(self.counts["train"], router, logits_TE, token_mask, routes)

    @torch.no_grad()
    def _note(
        self, counts: _Counts, router: Router, logits_TE: Tensor, token_mask: Tensor | None, routes: Routes
    ) -> None:
        if len(logits_TE) == 0:
            return
        if counts.load_E.device != routes.load.device:
            counts.move(routes.load.device)
        sums = counts.sums
        tokens: int | Tensor = len(logits_TE) if token_mask is None else token_mask.sum()
        busy = 1 if isinstance(tokens, int) else tokens > 0
        max_vio = max_violation(routes.load)  # 0 if all is masked, like all else that is added
        width = routes.experts.shape[1]
        counts.load_E.add_(routes.load)
        sums["tokens"].add_(tokens)
        sums["passes"].add_(busy)
        sums["places"].add_(tokens * min(width, router.top_k))
        sums["max_vio"].add_(max_vio)
        if width > router.top_k:
            chosen_TK = torch.ones_like(routes.experts) if routes.chosen is None else routes.chosen
            sums["excess"].add_((chosen_TK.sum(-1) - router.top_k).clamp(min=0).sum())
        if routes.aux_loss is not None:
            sums["losses"].add_(busy)
            sums["aux_loss"].add_(routes.aux_loss)
        if routes.branch == "sinkhorn":
            sums["sinkhorn_passes"].add_(busy)
        if routes.branch != "softmax":
            sums["assigned_passes"].add_(busy)
            sums["max_vio_assigned"].add_(max_vio)
        if routes.plan_error is not None and routes.plan_passes is not None:
            error = routes.plan_error * busy
            sums["plans"].add_(busy)
            sums["plan_error"].add_(error)
            sums["plan_passes"].add_(routes.plan_passes * busy)
            counts.plan_error_max.copy_(torch.maximum(counts.plan_error_max, error))
        if self.detailed:
            self._note_logits(sums, router, logits_TE, token_mask, tokens, routes)

    def _note_logits(
        self,
        sums: dict[str, Tensor],
        router: Router,
        logits_TE: Tensor,
        token_mask: Tensor | None,
        tokens: int | Tensor,
        routes: Routes,
    ) -> None:
        # As the router reads them.
        logits_TE = logits_TE[:, : self.num_experts]
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        if token_mask is not None:
            logits_TE = logits_TE.masked_fill(~token_mask[:, None], 0.0)
        entropy_T = router_entropy(logits_TE, router.score)
        sums["router_entropy"].add_((entropy_T if token_mask is None else entropy_T * token_mask).double().sum())
        if routes.branch == "softmax":
            return
        top_TE = _members(router.served_experts(logits_TE), None, logits_TE)
        differs_T = (top_TE != _members(routes.experts, routes.chosen, logits_TE)).any(-1)
        if token_mask is not None:
            top_TE, differs_T = top_TE & token_mask[:, None], differs_T & token_mask
        sums["assigned_tokens"].add_(tokens)
        sums["moved_tokens"].add_(differs_T.sum())
        sums["max_vio_topk"].add_(max_violation(top_TE.sum(0)))

    def describe(self, load_E: Tensor, totals: list[float], plan_error_max: float) -> dict[str, Any]:
        """The metrics of this layer; see `LoadMonitor.metrics`."""
        sums = dict(zip(self.counts["train"].sums, totals, strict=True))
        of_load = load_metrics(load_E)
        passes, assigned, plans = sums["passes"], sums["assigned_passes"], sums["plans"]
        kept = int(load_E.sum()) - sums["excess"]
        metrics: dict[str, Any] = {
            "tokens": int(sums["tokens"]),
            "passes": int(passes),
            "max_vio": sums["max_vio"] / passes if passes else 0.0,
            "max_vio_global": of_load["max_vio"],
            "entropy": of_load["entropy"],
            "cv": of_load["cv"],
            "dead": of_load["dead"],
            "dead_share": of_load["dead"] / self.num_experts,
            "drop_rate": _mean(sums["places"] - kept, sums["places"]),
            "aux_loss": _mean(sums["aux_loss"], sums["losses"]),
            "sinkhorn_share": _mean(sums["sinkhorn_passes"], passes),
            "assigned_share": _mean(assigned, passes),
            "max_vio_assigned": _mean(sums["max_vio_assigned"], assigned),
            "plan_error": _mean(sums["plan_error"], plans),
            "plan_error_max": plan_error_max if plans else None,
            "plan_passes": _mean(sums["plan_passes"], plans),
        }
        if self.detailed:
            metrics["router_entropy"] = _mean(sums["router_entropy"], sums["tokens"])
            metrics["disagreement"] = _mean(sums["moved_tokens"], sums["assigned_tokens"])
            metrics["max_vio_topk"] = _mean(sums["max_vio_topk"], assigned)
            metrics["gap"] = _mean(sums["max_vio_topk"] - sums["max_vio_assigned"], assigned)
        metrics["load"] = load_E.tolist()
        return metrics


def _routers(model: nn.Module) -> dict[str, Router]:
    inner = model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else model
    paths = named_routers(inner)
    if not paths:
        raise ValueError(
            f"model {type(model).__name__} holds no sinkroute router: there is nothing to watch; pass the model that "
            "holds the sinkroute.MoE layers, or one with routers from sinkroute.create_router"
        )
    named: dict[str, Router] = {}
    for path, router in paths.items():
        path = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        name = path.removesuffix(".router") or "router"
        named[path if name in named else name] = router  # a router may hold another as its `.router`
    return named


def _inputs(
    logits_TE: Tensor, token_mask: Tensor | None = None, *, plain: object = None
) -> tuple[Tensor, Tensor | None]:
    """What a router was called with, by position or by name."""
    return logits_TE, token_mask


def _members(experts_TK: Tensor, chosen_TK: Tensor | None, like_TE: Tensor) -> Tensor:
    """(T, E) bool: whether an expert is in the token's set."""
    members_TE = torch.zeros_like(like_TE, dtype=torch.bool)
    if chosen_TK is None:
        return members_TE.scatter_(1, experts_TK, True)
    return members_TE.scatter_(1, experts_TK, chosen_TK)


def _ignoring() -> Any:
    return _ignore


def _ignore(*_: object) -> None:
    """The hook of a copied router."""


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _append(path: Path, line: str) -> None:
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                whole, _, tail = file.read().rpartition(b"\n")
                try:
                    json.loads(tail)
                    file.write(b"\n")
                except ValueError:  # torn
                    file.truncate(len(whole) + 1 if whole else 0)
        file.write(line.encode() + b"\n")
