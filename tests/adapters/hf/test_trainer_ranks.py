"""A router's loss in transformers' `Trainer`: the same gradient of the gate on however many ranks."""

import contextlib
import functools
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import transformers

import sinkroute
from sinkroute.adapters.hf import RouterCallback

ROWS, LENGTH = 8, 12
CELLS = {
    2: {"DDP": {}, "DDP, accumulated": {}, "tp2": {"tp_size": 2}},
    4: {"DDP": {}, "DDP, accumulated": {}, "fsdp2·tp2": {"tp_size": 2, "fsdp_size": 2}},
}


def rows():
    """With as much padding in each: a loss is a mean over the tokens of a pass."""
    drawn = torch.randint(3, 64, (3 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    real = (torch.arange(LENGTH) < LENGTH - 3).long()
    return [
        {
            "input_ids": (ids * real).tolist(),
            "attention_mask": real.tolist(),
            "labels": ids.masked_fill(real == 0, -100).tolist(),
        }
        for ids in drawn
    ]


class Unshuffled(transformers.Trainer):
    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Seen(transformers.TrainerCallback):
    """The gate's gradient of the first step."""

    def __init__(self, gate):
        self.gate, self.gradient = gate, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.gradient is None:
            grad = self.gate.weight.grad
            self.gradient = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()


@contextlib.contextmanager
def saved(model):
    """A folder with the model, of rank 0, which alone writes."""
    is_spread = dist.is_initialized() and dist.get_world_size() > 1
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        if is_spread:
            dist.broadcast_object_list(folder, src=0)
        model.save_pretrained(folder[0])
        if is_spread:
            dist.barrier()
        yield folder[0]
        if is_spread:
            dist.barrier()


def trained(method, accumulate=1, **layout):
    """Losses, the gate's first gradient, and the metrics of the first step."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        rank = str(dist.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # the group is there
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, pad_token_id=0, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    with saved(transformers.MixtralForCausalLM(config)) as folder:
        spread = {"distributed_config": transformers.distributed.DistributedConfig(**layout)} if layout else {}
        model = transformers.MixtralForCausalLM.from_pretrained(folder, **spread)
        handle = sinkroute.patch(model, method, coefficient=1.0)
        shares = world // layout.get("tp_size", 1)
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=ROWS // shares // accumulate,
            gradient_accumulation_steps=accumulate,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not layout,
            ddp_backend="gloo" if world > 1 else None,
        )
        trainer = Unshuffled(model, arguments, train_dataset=rows())
        RouterCallback(handle).attach(trainer)
        seen = Seen(model.model.layers[0].mlp.gate)
        trainer.add_callback(seen)
        trainer.train()
    first = trainer.state.log_history[0]
    metrics = {name: first[name] for name in ("router/max_vio_global", "router/entropy", "router/aux_loss")}
    return {
        "loss": torch.tensor([log["loss"] for log in trainer.state.log_history[:2]]),
        "gradient": seen.gradient,
        "metrics": metrics,
    }


def stand_for_accelerators():
    """Have accelerate take parallel layouts on the CPU, which by itself it takes on devices only."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def _cells():
    found = {}
    for name, layout in CELLS[dist.get_world_size()].items():
        if layout:
            stand_for_accelerators()
        for method in ("global-load-balance", "z-loss"):
            if "accumulated" in name and method == "global-load-balance":
                continue  # the load of a batch is known when its last micro-batch is
            found[f"{name} {method}"] = trained(method, 2 if "accumulated" in name else 1, **layout)
    return found


@functools.cache
def alone(method):
    return trained(method)


def compare(ranks):
    for name in ranks[0]:
        one = alone(name.rsplit(" ", 1)[1])
        for rank in ranks:
            torch.testing.assert_close(rank[name]["loss"], one["loss"], rtol=0, atol=2e-3, msg=name)
            scale = one["gradient"].abs().max()
            difference = (rank[name]["gradient"] - one["gradient"]).abs().max() / scale
            assert difference < 0.01, (name, difference)
            if "accumulated" not in name:
                assert rank[name]["metrics"]["router/entropy"] == pytest.approx(one["metrics"]["router/entropy"])


def test_two_ranks_train_a_gate_as_one_process_does(run_ranks):
    compare(run_ranks(_cells, 2))


@pytest.mark.ranks
def test_four_ranks_train_a_gate_as_one_process_does(run_ranks):
    compare(run_ranks(_cells, 4))
