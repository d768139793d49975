"""The same training by the trainers that people use, wrapped in each way; `plain.plain_run` is what it must find."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import plain
import torch
import torch.distributed as dist
import transformers
from plain import LR, MICRO_BATCHES, ROWS, STEPS, VOCAB, Method, Run
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import sinkroute
from sinkroute.adapters.hf import RouterCallback

TRAINERS = {  # to the loss
    "accelerate loop": "causal",
    "Trainer": "causal",
    "TRL SFT": "causal",
    "TRL DPO": "preference",
    "TRL GRPO": "policy",
}
WRAPPERS = ("single", "DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")
CHECKPOINTING = {"off": None, "reentrant": True, "not reentrant": False}


class Cell(NamedTuple):
    trainer: str
    wrapper: str
    checkpointing: str
    method: str

    def __str__(self) -> str:
        return " | ".join(self)


def run(cell: Cell, folder: Path) -> Run:
    """Train by this trainer, on all ranks; what is saved goes into the folder, which all of them name alike."""
    method = plain.METHODS[cell.method]
    model, handle = plain.patched(method)
    before = torch.stack([gate.weight.detach().clone() for gate in plain.gates(model)])
    monitor = None if handle is None else sinkroute.LoadMonitor(model)
    train = loop if cell.trainer == "accelerate loop" else fit
    losses = torch.tensor(train(cell, method, model, handle, folder))
    moved = torch.stack([_whole(gate.weight) for gate in plain.gates(model)]) - before
    if monitor is None:
        loads = plain.plain_run(TRAINERS[cell.trainer], cell.method).loads
    else:
        loads = torch.tensor([row["load"] for row in monitor.metrics(process_group="world").values()])
    if dist.is_initialized():
        dist.barrier()  # all is saved
    unset_hf_deepspeed_config()  # or what is loaded is sharded, too
    with torch.no_grad():
        served = type(model).from_pretrained(folder).eval()(input_ids=plain.probe()).logits
    return Run(losses, losses, moved, loads, served)


def _whole(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    found: Any = parameter.detach()
    return (found.full_tensor() if hasattr(found, "full_tensor") else found).clone()


def stand_for_accelerators(wrapper: str) -> None:
    """Have accelerate shard over processes on the CPU, which by itself it does over devices only."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if wrapper.startswith("ZeRO"):
        # Nothing is compiled: gloo alone.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def _check_wrapper(cell: Cell, accelerator: Any) -> None:
    """A run that was wrapped in another way than asked proves nothing."""
    kinds = {"single": "NO", "DDP": "MULTI_CPU", "FSDP2": "FSDP"}
    kind = accelerator.distributed_type.value
    if kind != kinds.get(cell.wrapper, "DEEPSPEED"):
        raise AssertionError(f"{cell} was wrapped as {kind}")


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _zero(stage: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES // world(),
        "zero_optimization": {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }


# -- a loop that is written by hand, with accelerate ----------------------------------------------------------------


def loop(cell: Cell, method: Method, model: Any, handle: Any, folder: Path) -> list[float]:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    options: dict[str, Any] = {}
    if cell.wrapper == "FSDP2":
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            state_dict_type="FULL_STATE_DICT",
        )
    elif cell.wrapper.startswith("ZeRO"):
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=_zero(cell.wrapper[-1]))
    else:
        options["gradient_accumulation_steps"] = MICRO_BATCHES // world()
    accelerator = Accelerator(cpu=cell.wrapper in ("single", "DDP"), **options)
    _check_wrapper(cell, accelerator)
    if CHECKPOINTING[cell.checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[cell.checkpointing]})
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    rows, losses = plain.texts(), []
    for step in range(STEPS):
        losses.append(0.0)
        for micro_batch in range(MICRO_BATCHES // world()):
            number = step * MICRO_BATCHES + micro_batch + accelerator.process_index
            if handle is not None:
                sinkroute.set_step(wrapped, step, micro_batch, micro_batches=MICRO_BATCHES // world())
            with accelerator.accumulate(wrapped):
                loss = wrapped(**plain.labelled(rows[number * ROWS : (number + 1) * ROWS])).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses[-1] += accelerator.reduce(loss.detach(), "mean").item() / (MICRO_BATCHES // world())
        if handle is not None:
            sinkroute.end_step(wrapped)
    state = accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        accelerator.unwrap_model(wrapped).save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()
    return losses


# -- transformers' Trainer and those of TRL --------------------------------------------------------------------------


def _arguments(cell: Cell, folder: Path) -> dict[str, Any]:
    reentrant = CHECKPOINTING[cell.checkpointing]
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "use_cpu": cell.wrapper in ("single", "DDP"),
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES // world(),
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": None if reentrant is None else {"use_reentrant": reentrant},
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "bf16": False,
        "remove_unused_columns": False,
    }
    if cell.wrapper != "single":
        arguments["ddp_backend"] = "gloo"
    if cell.wrapper == "FSDP2":
        arguments |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    if cell.wrapper.startswith("ZeRO"):
        arguments["deepspeed"] = _zero(cell.wrapper[-1])
    return arguments


def fit(cell: Cell, method: Method, model: Any, handle: Any, folder: Path) -> list[float]:
    trainer = _MAKERS[cell.trainer](model, method, _arguments(cell, folder))
    _check_wrapper(cell, trainer.accelerator)
    if handle is not None:
        RouterCallback(handle).attach(trainer)
    trainer.train()
    trainer.save_model(str(folder))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def make_trainer(model: Any, method: Method, arguments: dict[str, Any]) -> transformers.Trainer:
    rows = [{"row": row} for row in plain.texts()]
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=lambda batch: plain.labelled([item["row"] for item in batch]),
    )


def tokenizer() -> Any:
    """A word for each number: `t17`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": plain.PAD, "<eos>": plain.EOS} | {f"t{number}": number for number in range(2, VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def spoken(ids: list[int]) -> str:
    return " ".join(f"t{number}" for number in ids if number != plain.EOS)


def make_sft(model: Any, method: Method, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in plain.texts()]),
        processing_class=tokenizer(),
    )


def make_dpo(model: Any, method: Method, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {name: " " * (name != "prompt") + spoken(ids) for name, ids in pair.items()} for pair in plain.preferences()
    ]
    for row in rows:
        row["chosen"], row["rejected"] = row["chosen"] + " <eos>", row["rejected"] + " <eos>"
    return DPOTrainer(
        model=model,
        ref_model=plain.make_model(method),
        args=DPOConfig(**arguments, beta=plain.BETA, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def make_grpo(model: Any, method: Method, arguments: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    # The pairs of a micro-batch stay together.
    grpo_trainer.shuffle_sequence_dict = lambda batch: batch
    _with_fixed_completions(model)
    del arguments["train_sampling_strategy"]
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(number % 2 == 0) for number in range(len(completions))],
        args=GRPOConfig(
            **arguments,
            num_generations=2,
            max_completion_length=6,
            shuffle_dataset=False,
            loss_type="grpo",
            steps_per_generation=MICRO_BATCHES // world(),
        ),
        train_dataset=Dataset.from_list([{"prompt": spoken(prompt)} for prompt in plain.prompts()]),
        processing_class=tokenizer(),
    )


def _with_fixed_completions(model: Any) -> None:
    """The model generates as it does, and then something else is taken for what it wrote."""
    generate: Callable[..., Tensor] = model.generate

    def fixed(*args: Any, **kwargs: Any) -> Tensor:
        generate(*args, **kwargs)
        asked = kwargs["input_ids"]
        rows = [[*row.tolist(), *plain.completion(row.tolist(), number % 2)] for number, row in enumerate(asked)]
        return plain.padded(rows)["input_ids"]

    model.generate = fixed


_MAKERS: dict[str, Callable[[Any, Method, dict[str, Any]], Any]] = {
    "Trainer": make_trainer,
    "TRL SFT": make_sft,
    "TRL DPO": make_dpo,
    "TRL GRPO": make_grpo,
}
