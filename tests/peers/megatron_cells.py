"""Small GPT models of Megatron-Core on gloo ranks: built, trained for a few steps, watched, saved and loaded.

`python megatron_cells.py FOLDER` imports all that once, and forks ranks for each job on its standard input, a line of
JSON: `{"world": how many, "calls": [[sizes of the groups, function, arguments], ...]}`. The answer is a line too, the
ranks' exit codes; FOLDER has what each wrote, and what its calls returned. See `test_megatron_ranks.py`.
"""

import datetime
import functools
import json
import os
import sys
import traceback

import megatron_on_the_cpu
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import get_submodules
from megatron.core.transformer.transformer_config import TransformerConfig

import sinkroute
from sinkroute.adapters.megatron import make_router
from sinkroute.routing.attached import named_routers
from sinkroute.routing.state import recomputing

EXPERTS, TOP_K, LAYERS, WIDTH, WORDS, LENGTH, SEQUENCES = 8, 2, 2, 16, 32, 16, 2
SCORES = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def begin(tp=1, pp=1, vp=None, cp=1, ep=1, etp=1, mtp=0, recomputed=0):
    """Groups of these sizes, over all ranks. (`mtp` and `recomputed` are none: see `config_of`.)"""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )


def config_of(sizes, **options):
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "mtp": "mtp_num_layers",
        "recomputed": "recompute_num_layers",
    }
    said = {
        "num_layers": LAYERS * (sizes.get("vp") or 1),
        "sequence_parallel": sizes.get("tp", 1) > 1,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    if sizes.get("recomputed"):
        said |= {"recompute_granularity": "full", "recompute_method": "uniform"}
    return TransformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        ffn_hidden_size=WIDTH,
        moe_ffn_hidden_size=WIDTH,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        # Of unequal parts, which tensor-parallel experts exchange, gloo gathers none.
        moe_token_dispatcher_type="allgather" if sizes.get("etp", 1) > 1 else "alltoall",
        add_bias_linear=False,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        **{names[name]: size for name, size in ({"etp": 1} | sizes).items() if size},
        **said | options,
    )


class Model:
    """The chunks of a model that are on this rank, and Megatron's schedule for them.

    Args:
        sizes: of the groups, which have begun.
        router: ours by its name, or Megatron's own (None).
        options: of our router.
        config: Megatron's, by keyword.
    """

    def __init__(self, sizes, router, options=None, **config):
        torch.manual_seed(1)
        self.config, self.is_ours = config_of(sizes, **config), router is not None
        spec = get_gpt_layer_local_spec(num_experts=EXPERTS)
        if router is not None:
            get_submodules(spec.submodules.mlp).router = make_router(router, **(options or {}))
        if sizes.get("cp", 1) > 1:
            spec.submodules.self_attention.submodules.core_attention = megatron_on_the_cpu.NearAttention
        last = {}
        if sizes.get("mtp"):  # of two stages with embeddings Megatron cannot save those of positions
            last = {
                "mtp_block_spec": get_gpt_mtp_block_spec(self.config, spec, False),
                "position_embedding_type": "none",
            }
        chunks = range(sizes.get("vp") or 1)
        self.chunks = [
            GPTModel(
                self.config,
                spec,
                vocab_size=WORDS,
                max_sequence_length=LENGTH,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                vp_stage=chunk if len(chunks) > 1 else None,
                **last,
            )
            for chunk in chunks
        ]
        self.wrapped = [
            DistributedDataParallel(self.config, DistributedDataParallelConfig(), chunk) for chunk in self.chunks
        ]
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.no_sync_func = [part.no_sync for part in self.wrapped]
        if len(chunks) == 1:
            self.config.no_sync_func = self.config.no_sync_func[0]
        self.dp, self.cp = parallel_state.get_data_parallel_world_size(), sizes.get("cp", 1)

    def hosts(self):
        """The routers of the layers on this rank, as Megatron numbers them: those of multi-token prediction last."""
        found = (part for chunk in self.chunks for part in chunk.modules() if isinstance(part, TopKRouter))
        return {host.layer_number + self.config.num_layers * host.is_mtp_layer: host for host in found}

    def routers(self):
        """Ours, by their layers."""
        return {router.layer: router for chunk in self.chunks for router in named_routers(chunk).values()}

    def run(self, step, micro_batches, *, forward_only=False, scale=1.0):
        """The schedule for a step.

        Args:
            scale: what the loss of the model is multiplied by.

        Returns:
            The loss of each micro-batch, where the last stage is; of the other stages, none.
        """

        def forward_step(data_iterator, model):
            if not forward_only and self.is_ours:
                sinkroute.set_step(model, step)
            words_BL, places_BL = next(data_iterator)
            return model(words_BL, places_BL, None, labels=words_BL.roll(1, -1)), reduce

        def reduce(losses_BL):
            seen = {"loss": losses_BL.mean().detach()}
            if self.config.calculate_per_token_loss:
                return losses_BL.sum() * scale, torch.tensor(losses_BL.numel(), dtype=torch.int), seen
            return losses_BL.mean() * scale, seen

        for part in self.wrapped:
            part.train(not forward_only)
            part.zero_grad_buffer()
        batches = [self._words(step, part, micro_batches) for part in range(micro_batches)]
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.wrapped] if len(self.wrapped) > 1 else iter(batches),
            model=self.wrapped if len(self.wrapped) > 1 else self.wrapped[0],
            num_microbatches=micro_batches,
            seq_length=LENGTH,
            micro_batch_size=SEQUENCES,
            forward_only=forward_only,
        )
        return [float(entry["loss"]) for entry in found]

    def _words(self, step, micro_batch, micro_batches):
        """The global batch of a step is the same however it is parted."""
        replica = parallel_state.get_data_parallel_rank() * micro_batches + micro_batch
        generator = torch.Generator().manual_seed(1000 * step + replica)
        words_BL = torch.randint(WORDS, (SEQUENCES, LENGTH), generator=generator) ** 2 // WORDS
        places_BL = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
        part = parallel_state.get_context_parallel_rank()
        return tuple(whole.chunk(self.cp, 1)[part].contiguous() for whole in (words_BL, places_BL))

    def update(self, rate=0.5):
        with torch.no_grad():
            for part in self.wrapped:
                for weight in part.parameters():
                    weight.sub_(rate * weight.main_grad.view_as(weight))

    def sharded(self):
        return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(self.chunks)}

    def save(self, folder):
        if dist.get_rank() == 0:
            os.makedirs(folder)
        dist.barrier()
        state = self.sharded()
        dist_checkpointing.save(state["model0"] if len(state) == 1 else state, folder)

    def load(self, folder):
        state = dist_checkpointing.load(self.sharded()["model0"], folder)
        self.chunks[0].load_state_dict(state)


def stage():
    """The ranks that have this rank's layers, in the order of their tokens."""
    return dist.get_process_group_ranks(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))


def watched(model):
    """Layer → logits and experts of each pass, in their order, and those of its repetition; filled in training."""
    seen = {}

    def note(layer, router, args, routes):
        if router.training:
            parts = seen.setdefault(layer, {"logits": [], "experts": [], "again": []})
            if recomputing():
                parts["again"].append(routes.experts.clone())
            else:
                parts["logits"].append(args[0].detach().clone())
                parts["experts"].append(routes.experts.clone())

    for layer, router in model.routers().items():
        router.register_forward_hook(functools.partial(note, layer))
    return seen


def outcome(model):
    """What the routers hold by layer, and the losses of a batch that is the same on all layouts."""
    return {
        "state": {
            layer: {name: value.clone() for name, value in host.state_dict().items() if torch.is_tensor(value)}
            for layer, host in model.hosts().items()
        },
        "evaluated": model.run(99, 4 // model.dp, forward_only=True),
    }


def trained(sizes, router, options, config, folder, steps=4, micro_batches=2):
    """Train a model for a few steps, save it, and tell what was seen."""
    model = Model(sizes, router, options, **config)
    seen = watched(model)
    monitors = [sinkroute.LoadMonitor(chunk) for chunk in model.chunks]
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    for monitor in monitors:
        monitor.__enter__()
    losses = []
    for step in range(steps):
        losses += model.run(step, micro_batches)
        model.update()
    for chunk in model.chunks:
        sinkroute.end_step(chunk)
    loads = {}
    for chunk, monitor in zip(model.chunks, monitors, strict=True):
        layers = [each.layer for each in named_routers(chunk).values()]
        found = monitor.metrics(process_group=group).values()
        loads |= {layer: torch.tensor(part["load"]) for layer, part in zip(layers, found, strict=True)}
        monitor.__exit__(None, None, None)
    if folder is not None:
        model.save(folder)
    return {
        "stage": stage(),
        "seen": {
            layer: {name: torch.stack(parts) for name, parts in each.items() if parts} for layer, each in seen.items()
        },
        "loads": loads,
        "losses": losses,
        **outcome(model),
    }


def resumed(sizes, router, options, config, folder):
    """What a checkpoint of other ranks is on these."""
    model = Model(sizes, router, options, **config)
    model.load(folder)
    return outcome(model)


def gate_gradients(sizes, router, options, config, micro_batches):
    """The gradients of the gates by losses beside the model's alone, and what the gates were given."""
    model = Model(sizes, router, options, **config)
    seen = {}

    def apart(layer, host, args):
        if not recomputing():
            seen.setdefault(layer, []).append(args[0].detach().clone().flatten(0, -2))
        return (args[0].detach(), *args[1:])  # what comes after this gate has no part in its gradient

    for layer, host in model.hosts().items():
        host.register_forward_pre_hook(functools.partial(apart, layer))
    model.run(0, micro_batches, scale=0.0)
    return {
        "stage": stage(),
        "gates": {
            layer: {
                "gradient": host.weight.main_grad.clone(),
                "weight": host.weight.detach().clone(),
                "inputs": torch.stack(seen[layer]),
            }
            for layer, host in model.hosts().items()
        },
    }


def without_sequence_parallelism(sizes):
    """What Megatron says of a step."""
    try:
        Model(sizes, "ssr-l", sequence_parallel=False).run(0, 1)
    except ValueError as error:
        return str(error)
    return ""


def moved_copies(sizes, steps=3):
    """Gates in bfloat16 whose float32 copies are on the ranks in turn, as with a distributed optimiser.

    Returns:
        `messages` of each end of a step, by how many numbers they had; `moved`, how far the gates are from where they
        began; `apart`, how far they were from their copies; and `refused`, what is said where no rank has a copy.
    """
    model = Model(sizes, "ssr-dual", num_layers=4)
    own, ranks = dist.get_rank(), stage()
    for layer, host in model.hosts().items():
        host.weight.data = host.weight.detach().bfloat16()
        mine = ranks[layer % len(ranks)] == own
        host.weight.main_param, host.weight.main_param_sharded = host.weight.detach().float() if mine else None, True
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    first = {layer: host.weight.detach().float().clone() for layer, host in model.hosts().items()}
    messages, reduce, apart = [], dist.all_reduce, 0.0

    def counted(values, *args, **options):
        messages[-1].append(values.numel())
        return reduce(values, *args, **options)

    for step in range(steps):
        model.run(step, 1)
        messages.append([])
        dist.all_reduce = counted
        for chunk in model.chunks:
            sinkroute.end_step(chunk)
        dist.all_reduce = reduce
        for host in model.hosts().values():  # as the optimiser does: copies are written over the gates, on all ranks
            written = torch.zeros_like(host.weight, dtype=torch.float32)
            if host.weight.main_param is not None:
                apart = max(apart, float((host.weight.float() - host.weight.main_param).abs().max()))
                written.copy_(host.weight.main_param)
            dist.all_reduce(written, group=group)
            host.weight.data.copy_(written)
    moved = min(float((host.weight.float() - first[layer]).abs().max()) for layer, host in model.hosts().items())
    for host in model.hosts().values():
        host.weight.main_param = None
    model.run(steps, 1)
    refused = ""
    try:
        sinkroute.end_step(model.chunks[0])
    except ValueError as error:
        refused = str(error)
    return {"messages": messages, "apart": apart, "moved": moved, "refused": refused}


# -- ranks -----------------------------------------------------------------------------------------------------------


def on_a_rank(rank, world, calls, folder, seconds):
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    found = []
    for sizes, function, arguments in calls:
        begin(**sizes)
        found.append(globals()[function](sizes, *arguments))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another is still talking


def fork(function, *arguments):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    megatron_on_the_cpu.stand_in()
    for number, line in enumerate(sys.stdin):
        job, folder = json.loads(line), f"{sys.argv[1]}/{number}"
        os.makedirs(folder)
        pids = [fork(on_a_rank, rank, job["world"], job["calls"], folder, 120) for rank in range(job["world"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
