"""What the routers of a model do while it trains and serves, for any method, seen from outside.

A forward hook on every router (`watch`) adds to sums that stay on its device: counts of choices, MaxVio of each pass
(arXiv 2408.15664), what the method tells of its plan and its loss. No device is waited for and no rank is asked until
somebody wants the numbers: then two transfers, and one collective call for all layers.

- Training and evaluation are apart, by the router's mode.
- A pass is one call of a router on one rank: a micro-batch. `max_vio` is the mean over passes, `max_vio_global` that of
  the summed loads.
- The detailed tier also looks at the logits that the router is given. p is the softmax of a token's logits (or their
  sigmoids over the sum of these). "Plain top-k" is that of the same logits, which is how most methods serve: of equal
  ones the lower expert, whatever `ties` says for training.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from sinkroute._errors import RankLost, unknown_name
from sinkroute.routing.attached import named_routers, require_model
from sinkroute.routing.log_file import append_line
from sinkroute.routing.ranks import Group, Ranks
from sinkroute.routing.router import Router
from sinkroute.routing.routes import Routes
from sinkroute.routing.step import STEP_ENDS
from sinkroute.routing.text_table import text_table
from sinkroute.routing.watch import Mode, Tier, Watch, called_with
from sinkroute.routing.whole_steps import WholeSteps

__all__ = ["LoadMonitor"]

# Of the table.
_COLUMNS = ("tokens", "passes", "max_vio", "max_vio_global", "entropy", "cv", "dead", "drop_rate", "sinkhorn_share")
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
        require_model(model)
        self.model, self.tier = model, tier
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
        self._routers = _watchable(model)
        self._watches = {name: Watch(router, tier, device) for name, router in self._routers.items()}
        self._steps = {
            mode: WholeSteps([watch.counts[mode] for watch in self._watches.values()]) for mode in get_args(Mode)
        }
        self._handles: list[RemovableHandle] = []
        self._ends = STEP_ENDS.now()
        self.attach()

    @property
    def layers(self) -> list[str]:
        return list(self._routers)

    # -- hooks -------------------------------------------------------------------------------------------------------

    def attach(self) -> LoadMonitor:
        """Watch (again); nothing happens to a monitor that is attached. What was counted before stays."""
        if not self._handles:
            for name, router in self._routers.items():
                self._watches[name].skip_sent(router)
                self._handles.append(router.register_forward_hook(self._watches[name], with_kwargs=True))
        return self

    def remove(self) -> None:
        """Take all hooks off the model; what was counted can still be read."""
        self._note_sent()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note_sent(self) -> None:
        if self._handles:
            for name, router in self._routers.items():
                self._watches[name].note_sent(router)

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
        that had one; `sinkhorn_share` and `assigned_share` of passes, `branches`, the passes of each, and `plans`, how
        many told of a plan; means over such: `plan_error`, `plan_error_max`, `plan_passes` of plans,
        `max_vio_assigned`. An assigned pass is one whose branch is not `"softmax"`: a Sinkhorn step, a linear
        assignment, expert choice. `collectives`, `messages` and `bytes`: what a rank sends in a pass to those that it
        plans with, mean over passes (see `sinkroute.transport.collectives` for the words, and `step_ends` for what is
        sent between passes). `max_vio_step` is the MaxVio of whole steps, mean over those that `end_step` closed.

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
        try:
            found = self._gathered(mode, Ranks(process_group))
        except RankLost as lost:
            raise lost.during("LoadMonitor.metrics") from lost.__cause__
        whole = self._steps[mode].max_vio()
        metrics = {
            name: watch.describe(found[name]) | {"max_vio_step": of_steps}
            for (name, watch), of_steps in zip(self._watches.items(), whole, strict=True)
        }
        if reset:
            self.reset(mode)
        return metrics

    def end_step(self, mode: Mode = "train", *, process_group: Group = None) -> dict[str, Tensor]:
        """Close a step: layer → (E,) int64, the load of all its passes, on the device of the counts.

        A step's load is that of its whole batch, over micro-batches and ranks, which single passes do not show. From
        then on `metrics` has `max_vio_step`. Call it once per optimiser step; in evaluation, once per batch.

        Args:
            mode: whose passes.
            process_group: sum over these ranks: a collective call, once per step on each. None: this rank alone.

        >>> import sinkroute
        >>> router = sinkroute.create_router("softmax", num_experts=2, top_k=1)
        >>> with LoadMonitor(router) as monitor:
        ...     for logits_TE in (torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0, 1.0], [0, 1]])):
        ...         _ = router(logits_TE)  # two micro-batches
        >>> monitor.end_step()["router"].tolist()
        [2, 2]
        >>> found = monitor.metrics()["router"]
        >>> found["max_vio"], found["max_vio_step"]
        (1.0, 0.0)
        """
        _check_mode(mode)
        return dict(zip(self._watches, self._steps[mode].end(Ranks(process_group)), strict=True))

    def steps(self) -> dict[str, int]:
        """Of the training steps that `end_step` closed since the last reset: `steps`, and `sinkhorn_steps`, in which a
        layer of this rank had a pass by the Sinkhorn branch."""
        return {"steps": self._steps["train"].number, "sinkhorn_steps": self._steps["train"].sinkhorn}

    def step_ends(self) -> dict[str, Any]:
        """What this process sent at the ends of steps, where routers are brought up to date: all layers in one call.

        `steps`, and means over them: `collectives`, `messages`, `bytes`. Since the last reset of what passes in
        training did; of all models of the process.

        >>> import sinkroute
        >>> router = sinkroute.create_router("loss-free", num_experts=4, top_k=1)
        >>> with LoadMonitor(router) as monitor:
        ...     for step in range(3):
        ...         sinkroute.set_step(router, step)
        ...         _ = router(torch.randn(6, 4))
        >>> monitor.step_ends()  # two have ended; one rank has nobody to talk to
        {'steps': 2, 'collectives': 0.0, 'messages': 0.0, 'bytes': 0.0}
        """
        (steps, sent), then = STEP_ENDS.now(), self._ends
        steps, sent = steps - then[0], sent - then[1]
        return {"steps": steps} | {name: count / max(steps, 1) for name, count in sent._asdict().items()}

    def reset(self, mode: Mode | None = None) -> None:
        """Begin anew with one mode, or with both."""
        if mode is not None:
            _check_mode(mode)
        self._note_sent()
        if mode != "eval":
            self._ends = STEP_ENDS.now()
        for watch in self._watches.values():
            for name, counts in watch.counts.items():
                if mode in (None, name):
                    counts.clear()
        for name, steps in self._steps.items():
            if mode in (None, name):
                steps.begin()

    def _gathered(self, mode: Mode, ranks: Ranks) -> dict[str, Tensor]:
        """Layer → what each rank counted, (ranks, N), on the CPU. One transfer, one collective call."""
        self._note_sent()
        parts = [watch.counts[mode].all_N() for watch in self._watches.values()]
        sizes, device = [len(part) for part in parts], parts[0].device
        ranks.require_alike(
            sizes,
            device,
            "the ranks of process_group must watch the same layers in the same tier; give a group of ranks that do",
        )
        # Gathered, not reduced: most is summed, but not all.
        by_rank = ranks.gather(torch.cat([part.to(device) for part in parts])).cpu()
        return dict(zip(self._watches, by_rank.split(sizes, dim=1), strict=True))

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

        def collect(name: str, args: Any, kwargs: Any, routes: Routes) -> None:
            _, mask_T = called_with(*args, **kwargs)
            found[name].append((routes.experts if mask_T is None else routes.experts[mask_T]).cpu())

        modes = [(module, module.training) for module in self.model.modules()]
        with contextlib.ExitStack() as undo:
            if "torch._dynamo" in sys.modules:  # a compiled model would not know the hooks
                undo.enter_context(torch.compiler.set_stance("force_eager"))
            self._note_sent()
            for name, router in self._routers.items():
                self._watches[name].paused = True
                undo.callback(setattr, self._watches[name], "paused", False)
                undo.callback(self._watches[name].skip_sent, router)
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
        """Append `{"step": ..., "mode": ..., "layers": metrics()}` as one line of JSON; of training also `step_ends`.

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
        ends = {"step_ends": self.step_ends()} if mode == "train" else {}
        layers = self.metrics(mode, reset=reset, process_group=process_group)
        if Ranks(process_group).rank == 0:
            append_line(Path(path), {"step": step, "mode": mode, "layers": layers} | ends)

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
        return "\n".join([text_table("layer", _COLUMNS, metrics), *self._talk(mode, metrics)])

    def _talk(self, mode: Mode, metrics: dict[str, dict[str, Any]]) -> list[str]:
        """Lines of the table about what is sent, where anything is."""
        lines, ends = [], self.step_ends()
        calls, size = (sum(of[name] or 0 for of in metrics.values()) for name in ("collectives", "bytes"))
        if calls:
            lines.append(f"sent in a pass of all layers: {calls:.3g} collectives, {size:,.0f} bytes")
        if mode == "train" and ends["collectives"]:
            calls, size = ends["collectives"], ends["bytes"]
            lines.append(f"sent at the end of a step: {calls:.3g} collectives, {size:,.0f} bytes")
        return lines


def _watchable(model: nn.Module) -> dict[str, Router]:
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


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
