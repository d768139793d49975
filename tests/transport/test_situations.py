"""Situations of which users of other solvers and routers reported crashes, races or wrong answers."""

import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sinkroute import balanced_topk, create_router, set_step, solve
from sinkroute.kernels.topk import topk


def answers(logits_TE, seed=3):
    """All that is computed from logits, each on another way."""
    wanted_TE = logits_TE.detach().clone().requires_grad_()
    solve(wanted_TE, differentiable=True).matrix().square().sum().backward()
    router = create_router("ssr-s", num_experts=logits_TE.shape[1], top_k=2, probability=1.0, noise=0.3)
    set_step(router, seed)
    routes = router(logits_TE)
    soft = solve(logits_TE, 0.1, cost="softmax").topk(2)
    return [*solve(logits_TE, 0.05).topk(2), *soft, *balanced_topk(logits_TE, 2)[:2], routes.experts, wanted_TE.grad]


def test_several_threads_at_once_compute_what_one_does():
    torch.manual_seed(0)
    problems = [torch.randn(1024, 32) + torch.linspace(0, skew, 32) for skew in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(answers, problems))
    for alone, other in zip(map(answers, problems), together, strict=True):
        assert all(map(torch.equal, alone, other))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", ["odd address", "file that is for reading only", "shared memory"])
def test_logits_may_lie_anywhere(tmp_path, place, dtype):
    torch.manual_seed(0)
    logits_TE = torch.randn(256, 16).to(dtype)
    content = logits_TE.view(torch.uint8).numpy().tobytes()
    if place == "odd address":
        other_TE = torch.frombuffer(bytearray(b"." + content), dtype=dtype, offset=1).view(256, 16)
    elif place == "shared memory":
        other_TE = logits_TE.clone().share_memory_()
    else:
        (tmp_path / "logits").write_bytes(content)
        with open(tmp_path / "logits", "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        other_TE = torch.frombuffer(memory, dtype=dtype).view(256, 16)
    assert all(map(torch.equal, answers(other_TE), answers(logits_TE)))


@pytest.mark.slow  # 9 s on one core
def test_more_logits_than_a_32_bit_integer_can_count():
    torch.manual_seed(0)
    logits_TE = torch.randn(1, 1024).expand((1 << 21) + 5, 1024)  # rows 0 apart: no memory
    plan = solve(logits_TE, 0.5)
    experts_TK = plan.topk(2)[1]
    assert plan.column_error < 1e-3 and bool((experts_TK == experts_TK[0]).all())
    assert bool((topk(logits_TE, 1) == logits_TE[0].argmax()).all())
