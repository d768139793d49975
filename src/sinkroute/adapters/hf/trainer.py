"""Routers in a run of transformers' `Trainer`: which step it is, what they did, and what they remember.

In transformers 5.23 `Trainer` puts the callbacks that report (TensorBoard, ...) before those that it is given: what one
of these adds to the `logs` of `on_log` comes too late for them. `RouterCallback.attach` takes the first place instead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sinkroute.adapters.hf.checkpoints import checkpoint_folder, find_checkpoint, reload_converted
from sinkroute.adapters.hf.handle import Handle, handle_of
from sinkroute.adapters.hf.quirks import scale_of
from sinkroute.routing.attached import attached, named_routers
from sinkroute.routing.monitor import LoadMonitor
from sinkroute.routing.step import end_step, set_step

__all__ = ["STATE_FILE", "RouterCallback"]

STATE_FILE = "sinkroute_routers.safetensors"
"""In each checkpoint folder: `handle.state_dict()`, if routers remember anything."""

# Of `LoadMonitor.metrics`: for every layer, and as means over the layers that have them.
_OF_LAYERS = ("max_vio", "dead")
_MEANS = ("max_vio", "max_vio_global", "entropy", "dead_share", "sinkhorn_share", "plan_error", "aux_loss")

_Self = TypeVar("_Self", bound="RouterCallback")


class RouterCallback(TrainerCallback):
    """Runs the routers of a model in transformers' `Trainer`: sets steps, logs loads, saves and resumes.

    - Before every training step `sinkroute.set_step` with the trainer's global step, with gradient accumulation before
      every micro-batch; after it `sinkroute.end_step`, so that an evaluation or a checkpoint sees what the step did.
    - The routers' losses are weighed by 1 / micro-batches, and scaled in float16 as the trainer scales its own. So they
      weigh as much whatever loss the trainer takes (`compute_loss_func`, label smoothing, TRL's), with any number of
      ranks and micro-batches.
    - Every log of the training loss has the metrics of `LoadMonitor` since the last one, over all ranks: means over
      layers (`router/max_vio`, `router/max_vio_global`, `router/entropy`, `router/dead_share`, `router/sinkhorn_share`;
      where there are plans or losses `router/plan_error`, `router/aux_loss`) and, by layer, `router/LAYER/max_vio` and
      `router/LAYER/dead`. Every log of an evaluation has those of that evaluation, with its prefix:
      `eval_router/max_vio`.
    - Every checkpoint folder has what routers remember, written by the process that writes the model; a run that is
      resumed from it goes on with the same numbers, to the last bit on a CPU. Routers that remember nothing (SSR at a
      given `probability`) write nothing. Checkpoints of a hyperparameter search have none.
    - Of a mixture of experts `Trainer` itself loses weights when it resumes, or loads the best model at the end
      (https://github.com/huggingface/transformers/issues/48805): they are put back from the checkpoint.

    `RouterCallback(handle).attach(trainer)` is what to call. Given as `Trainer(callbacks=[...])` or by
    `trainer.add_callback(...)` instead, all is the same but for the callbacks that come before, such as the trackers
    that `report_to` names and what prints: they miss the metrics, and it warns once.

    A trainer that makes its models itself (`model_init`, a hyperparameter search) trains another model than the first:
    patch it in `model_init`, and the callback goes over to the patch of the model that is trained.

    Args:
        routed: the handle that `sinkroute.patch` returned, or a model whose own parts are routers (`sinkroute.MoE`).
        checkpoint: the folder that the run is resumed from, if it lies neither in `output_dir` nor where
            `TrainingArguments(resume_from_checkpoint=...)` says.

    Attributes:
        routed, model: the handle, or the model with routers as its parts, and the model whose routers are run.
        monitor: the `LoadMonitor` of that model.

    Raises:
        ValueError: a model without routers, or a patched one in the place of its handle; when training begins, a
            trainer that trains another model, without routers.

    >>> import sinkroute, tempfile, transformers
    >>> from sinkroute.adapters.hf import RouterCallback
    >>> config = transformers.MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    >>> model = transformers.MixtralForCausalLM(config)
    >>> handle = sinkroute.patch(model, "ssr-l", probability=0.01)
    >>> texts = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    >>> settings = transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=2, logging_steps=1, use_cpu=True,
    ...     save_strategy="no", report_to="none", disable_tqdm=True)
    >>> trainer = transformers.Trainer(model, settings, train_dataset=texts)
    >>> _ = trainer.remove_callback(transformers.PrinterCallback)
    >>> callback = RouterCallback(handle).attach(trainer)
    >>> _ = trainer.train()
    >>> sorted(name for name in trainer.state.log_history[0] if "router" in name)[:3]
    ['router/dead_share', 'router/entropy', 'router/max_vio']
    """

    def __init__(self, routed: Handle | nn.Module, *, checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.routed, self.model = routed, routed.model if isinstance(routed, Handle) else routed
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        if not isinstance(routed, Handle) and any(attached(part) is not None for part in routed.modules()):
            raise ValueError(
                f"routed is the patched model {type(routed).__name__}, which does not hold the state of its routers; "
                "give the handle that sinkroute.patch returned"
            )
        self.monitor = LoadMonitor(self.model)
        self._micro_batch = 0
        self._has_warned = False
        self._trainer: Trainer | None = None

    def attach(self: _Self, trainer: Trainer) -> _Self:
        """Become the first of the trainer's callbacks, so that all others get the metrics."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._trainer = trainer
        return self

    # -- steps -------------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._follow(kwargs.get("model"))
        if self._trainer is None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"callbacks that come before RouterCallback, such as those of report_to={args.report_to} and what "
                "prints the logs, miss its metrics; call RouterCallback(handle).attach(trainer) instead of passing it "
                "in callbacks=[...] or to add_callback",
                stacklevel=2,
            )
        if state.global_step > 0 and isinstance(self.routed, Handle):
            self._restore(self._resumed_folder(args, state), args, kwargs["model"])
        self.monitor.reset()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batch = 0
        # The last step of an epoch may have fewer, which the trainer alone knows.
        steps = getattr(self._trainer, "current_gradient_accumulation_steps", args.gradient_accumulation_steps)
        if isinstance(self.routed, Handle):
            found = scale_of(kwargs.get("optimizer"))
            self.routed.loss_scale = found or self.routed.loss_scale
        set_step(self.model, state.global_step, total_steps=state.max_steps, micro_batches=steps)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._micro_batch += 1
        set_step(self.model, state.global_step, self._micro_batch, total_steps=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        end_step(self.model)

    def _follow(self, trained: nn.Module | None) -> None:
        """Run the routers of the model that is trained, if that is not the one that was given.

        Raises:
            ValueError: it has none.
        """
        ours = list(named_routers(self.model).values())
        theirs = [] if trained is None else list(named_routers(trained).values())
        if trained is None or any(router is other for router in ours for other in theirs):
            return
        routed = handle_of(trained)
        if routed is None and theirs and all(attached(part) is None for part in trained.modules()):
            self.routed = self.model = trained
        elif routed is not None:
            self.routed, self.model = routed, routed.model
        else:
            raise ValueError(
                f"RouterCallback runs the routers of another {type(self.model).__name__} than the "
                f"{type(trained).__name__} that is trained, which has none; call sinkroute.patch on the model that "
                "the trainer trains (with model_init or a hyperparameter search: in model_init, on each model)"
            )
        self.monitor.remove()
        self.monitor = LoadMonitor(self.model)

    # -- metrics -----------------------------------------------------------------------------------------------------

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        evaluation = next((name for name in logs if name.endswith("_runtime") and name != "train_runtime"), None)
        if evaluation is not None:
            metrics = self._metrics("eval", evaluation.removesuffix("runtime"))
        elif "loss" in logs:
            metrics = self._metrics("train", "")
        else:  # the summary of the run, or something of the user's own
            return
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)  # a copy of `logs` was appended before

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        self.monitor.reset("eval")  # nothing is logged: not to be taken for the next evaluation's

    def _metrics(self, mode: Literal["train", "eval"], prefix: str) -> dict[str, float]:
        router = next(iter(named_routers(self.model).values()))  # ranks that hold the same tokens count once
        layers = self.monitor.metrics(mode, reset=True, process_group=router.ranks.load.group)
        if not any(values["passes"] for values in layers.values()):
            return {}
        metrics = {}
        for name in _MEANS:
            told = [values[name] for values in layers.values() if values[name] is not None]
            if told and (name != "sinkhorn_share" or mode == "train"):
                metrics[f"{prefix}router/{name}"] = sum(told) / len(told)
        for layer, values in layers.items():
            for name in _OF_LAYERS:
                metrics[f"{prefix}router/{layer}/{name}"] = values[name]
        return metrics

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        remembered = self._state_dict()
        if not (remembered and args.should_save) or state.is_hyper_param_search:
            return
        folder = checkpoint_folder(args, state)
        draft = folder / f".{STATE_FILE}"
        save_file(dict(remembered), draft, metadata={"global_step": str(state.global_step)})
        os.replace(draft, folder / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The trainer has put the best model's weights back.
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and isinstance(self.routed, Handle):
            self._restore(Path(best), args, kwargs["model"])

    def _state_dict(self) -> Mapping[str, torch.Tensor]:
        """What the trainer does not save: routers that are parts of a model are saved with it."""
        if not isinstance(self.routed, Handle):
            return {}
        return {name: value.detach().cpu().contiguous() for name, value in self.routed.state_dict().items()}

    def _restore(self, folder: Path, args: TrainingArguments, model: nn.Module) -> None:
        """Once the trainer has loaded the checkpoint: what it has not."""
        reload_converted(model, folder, args)
        if not self._state_dict():
            return
        file = folder / STATE_FILE
        if not file.is_file():
            raise ValueError(
                f"checkpoint {folder} holds no {STATE_FILE}, without which the routers cannot go on where they were: "
                "it was saved without RouterCallback, or the run was killed just then; resume from an earlier one, or "
                "begin a new run from its model"
            )
        self.routed.load_state_dict(load_file(file))

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint that the trainer resumes from.

        Raises:
            ValueError: it is not among those that are known.
        """
        known = [self.checkpoint, args.resume_from_checkpoint, checkpoint_folder(args, state)]
        folders = [Path(folder) for folder in known if isinstance(folder, (str, Path))]
        folder = find_checkpoint(folders, state)
        if folder is None:
            raise ValueError(
                f"the run is resumed at step {state.global_step} from a folder that is not among "
                f"{', '.join(map(str, folders))}; tell where: RouterCallback(handle, checkpoint=...)"
            )
        return folder
