"""Megatron-Core on the CPU: what stands in for CUDA in our tests, and a pytest plugin for Megatron's.

`stand_in()` lets a process run Megatron's models over gloo. As a plugin this file runs the router tests of a checkout
of Megatron-LM, with our router in place of Megatron's:

    MEGATRON_REPO=.../Megatron-LM ROUTER=ssr-l OPTIONS='{"probability": 0.0, "noise": 0.0}' \
        python -m pytest -p megatron_on_the_cpu --noconftest .../tests/unit_tests/transformer/moe/test_routers.py

ROUTER left out: with Megatron's own, to see what passes anyhow. Stand-ins there: groups of one rank talk by gloo, those
of several are fakes that say nothing; the test helpers, whose imports want the whole training framework, are small
stand-ins here.
"""

import contextlib
import json
import os
import queue
import random
import sys
import types

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer import torch_norm
from megatron.core.transformer.moe import moe_layer, moe_utils, token_dispatcher
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore


class _OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream, or an event on one, to code that would wait for it."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return self

    def synchronize(self):
        pass


class _Generators:
    """Megatron's CUDA generators: the CPU's own is used."""

    def is_initialized(self):
        return False

    def fork(self, name=None):
        return contextlib.nullcontext()


def _norm(config, hidden_size, eps=1e-5, **options):
    """Megatron refuses torch's norm under sequence parallelism, for the sake of its gradients: this one is marked."""
    norm = (torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm)(hidden_size, eps)
    for weight in norm.parameters():
        weight.sequence_parallel = config.sequence_parallel
    return norm


class NearAttention(torch.nn.Module):
    """Attention of a token to itself: what is left on a CPU with context parallelism, which torch's cannot do."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, **kwargs):
        copies = query.shape[2] // value.shape[2]
        return value.repeat_interleave(copies, 2).flatten(2)


def stand_in():
    """From now on this process runs Megatron on the CPU: tensors stay where they are, streams are none."""
    _OnTheCpu().__enter__()
    for kind in (torch.Tensor, torch.nn.Module):
        kind.cuda = lambda self, *args, **kwargs: self
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = _Stream
    torch.cuda.synchronize = lambda *args: None
    for module in (tensor_parallel, parallel_random, layers, moe_utils):
        module.get_cuda_rng_tracker = _Generators
    # Or each rank that saves a checkpoint starts another process, which outlives it.
    filesystem_async._results_queue = queue.Queue()
    # Where a backward pass repeats a forward pass, the mode does not reach.
    fused_softmax.get_default_causal_mask = lambda size: torch.ones(size, size).triu(1).bool()
    parallel_random._get_all_rng_states = tuple
    parallel_random._set_all_rng_states = lambda *states: None
    # Sizes of parts go to the host on a GPU only, and the exchange wants numbers.
    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, **options: (
            tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
        )
    torch_norm.WrappedTorchNorm.__new__ = lambda cls, *args, **options: _norm(*args, **options)


class Utils:
    """What Megatron's tests know by this name."""

    @staticmethod
    def initialize_model_parallel(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, expert_model_parallel_size=1, **sizes
    ):
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        world = max(tensor_model_parallel_size * pipeline_model_parallel_size, expert_model_parallel_size)
        store = dist.HashStore() if world == 1 else FakeStore()
        dist.init_process_group("gloo" if world == 1 else "fake", store=store, rank=0, world_size=world)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            create_gloo_process_groups=world == 1,
            **sizes,
        )

    @staticmethod
    def destroy_model_parallel():
        parallel_state.destroy_model_parallel()


def _set_random_seed(seed_, data_parallel_random_init=False):
    random.seed(seed_)
    torch.manual_seed(seed_)


def _stand_in(name, **contents):
    module = types.ModuleType(name)
    module.__path__ = [os.path.join(os.environ["MEGATRON_REPO"], *name.split("."))] if name.startswith("tests") else []
    vars(module).update(contents)
    sys.modules[name] = module


def _plug_in(router, options):
    """Every `MoESubmodules` that is made gets our router."""
    from sinkroute.adapters.megatron import make_router

    made = moe_layer.MoESubmodules.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.router = make_router(router, **options)

    moe_layer.MoESubmodules.__init__ = make


def pytest_configure(config):
    config.addinivalue_line("markers", "internal: Megatron's")
    torch.set_num_threads(1)
    stand_in()
    _stand_in("megatron.training")
    _stand_in("megatron.training.initialize", _set_random_seed=_set_random_seed)
    _stand_in("tests")
    _stand_in("tests.unit_tests")
    _stand_in("tests.unit_tests.test_utilities", Utils=Utils)
    if router := os.environ.get("ROUTER"):
        _plug_in(router, json.loads(os.environ.get("OPTIONS", "{}")))


_IS_AVAILABLE = torch.cuda.is_available


def pytest_collection(session):
    torch.cuda.is_available = lambda: True  # what tests ask, when they are read, to be left out


def pytest_collection_finish(session):
    torch.cuda.is_available = _IS_AVAILABLE
