"""What a tensor is: plain memory, something that torch opens by itself, or what only looks like a tensor."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sinkroute
from sinkroute.kernels.storage import address, holds_values, is_traced, is_watched, plain, readable, uncached

SOURCES = Path(sinkroute.__file__).parent


class Named(torch.Tensor):
    pass


def test_addresses_are_taken_in_one_place_only():
    takers = {
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if re.search(r"\bdata_ptr\(|__cuda_array_interface__|\.untyped_storage\(", path.read_text())
    }
    assert takers == {"kernels/storage.py"}


@pytest.mark.parametrize(
    "x", [torch.zeros(3), torch.zeros(0), nn.Parameter(torch.zeros(3)), torch.zeros(3).as_subclass(Named)]
)
def test_memory_by_any_name_is_readable(x):
    assert readable(x) and isinstance(address(x), int)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, device="meta"),
        torch.zeros(0, device="meta"),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch._efficientzerotensor((3,)),
        torch.nested.nested_tensor([torch.zeros(3)]),
        torch.masked.masked_tensor(torch.zeros(3), torch.ones(3, dtype=torch.bool)),
    ],
)
def test_what_is_no_memory_has_no_address(x):
    assert not readable(x)
    with pytest.raises(TypeError, match="has no numbers at an address"):
        address(x)


def test_wrappers_of_torch_func_are_not_readable_whichever_they_are():
    seen = []

    def look(x):
        seen.append((readable(x), readable(torch.zeros(2)), is_watched()))
        return x.sum()

    torch.func.grad(look)(torch.zeros(3))
    torch.vmap(look)(torch.zeros(2, 3))
    torch.func.functionalize(look)(torch.zeros(3))
    torch.func.jvp(look, (torch.zeros(3),), (torch.zeros(3),))
    assert seen == [(False, False, True)] * 4


def test_a_tracer_is_noticed_and_a_mode_that_only_counts_is_no_tracer():
    from torch.utils.flop_counter import FlopCounterMode

    traced = []
    torch.jit.trace(lambda x: (traced.append(is_traced()), x + 1)[1], torch.zeros(2), check_trace=False)
    with FlopCounterMode(display=False):
        assert is_watched() and not is_traced() and holds_values(torch.zeros(2))
    assert traced == [True] and not is_traced()


def test_selective_checkpointing_is_nobody_who_looks_on():
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    seen = []

    def look(x):
        seen.append((is_watched(), readable(x)))
        return (x @ x).sin()

    def contexts():
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    checkpoint(look, torch.ones(2, 2, requires_grad=True), use_reentrant=False, context_fn=contexts).sum().backward()
    assert seen == [(False, True)] * 2


def test_selective_checkpointing_does_not_see_what_is_uncached():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    from torch.utils.flop_counter import FlopCounterMode

    seen, passes = [], []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    @uncached
    def once_more_each_time(x):
        passes.append(None)
        for _ in passes:
            x = x.sin()
        return x

    def contexts():
        def policy(context, func, *args, **kwargs):
            assert "sin" not in str(func)
            return func is torch.ops.aten.mm.default

        return create_selective_checkpoint_contexts(policy)

    x = torch.full((2, 2), 0.5, requires_grad=True)
    with FlopCounterMode(display=False) as flops, Operations():  # others go on, and do not begin anew
        y = checkpoint(lambda x: once_more_each_time(x @ x), x, use_reentrant=False, context_fn=contexts)
        assert flops.get_total_flops() == 16 and "aten.sin.default" in seen
        y.sum().backward()
    assert len(passes) == 2 and x.grad.isfinite().all()


def test_plain_memory_is_passed_on_as_it_is():
    for x in (torch.zeros(3), nn.Parameter(torch.zeros(3)), torch.zeros(3, 2).T, None, [1.0]):
        assert plain("x", x) is x


def test_a_subclass_of_memory_keeps_its_gradient():
    x = torch.ones(3, requires_grad=True)
    plain("x", (2 * x).as_subclass(Named)).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_a_user_mode_sees_one_operation_and_the_same_plan():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    logits_TE = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with Names() as mode:
        weights_TK, experts_TK = sinkroute.solve(logits_TE).topk(2)
    want = sinkroute.solve(logits_TE).topk(2)
    assert torch.equal(weights_TK, want[0]) and torch.equal(experts_TK, want[1])
    assert mode.names.count("sinkroute.solve.default") == mode.names.count("sinkroute.plan_topk.default") == 1


def test_the_ranks_of_a_plan_are_refused_under_a_tracer():
    with pytest.raises(NotImplementedError, match="process_group and reduce are not for"):
        torch.vmap(lambda x: sinkroute.solve(x, reduce=lambda total: total).potentials)(torch.zeros(2, 3, 4))
