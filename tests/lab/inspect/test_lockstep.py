from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sinkroute.lab.inspect.lockstep import run_in_lockstep


class Net(nn.Module):
    """Calls its second part twice, with glue between."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.parts
        y = third(second(first(x) * 2).relu() + second(x))
        self.out.append(y)
        return y


def nothing() -> None:
    pass


def test_each_pass_gives_what_it_gives_alone_to_the_last_bit() -> None:
    net = Net()
    inputs = [torch.randn(size, 4) for size in (1, 5, 2)]
    with torch.no_grad():
        alone = [net(x).clone() for x in inputs]
    net.out = []
    run_in_lockstep([lambda x=x: net(x) for x in inputs], list(net.parts), lambda part: nothing)
    assert all(map(torch.equal, net.out, alone))
    assert not any(y.requires_grad for y in net.out)


def test_a_part_is_entered_by_all_before_the_next_and_left_once() -> None:
    net, seen = Net(), []
    names = {part: place for place, part in enumerate(net.parts)}
    for part in net.parts:
        part.register_forward_hook(lambda part, args, out: seen.append(f"call {names[part]}"))

    def enter(part: nn.Module) -> Callable[[], None]:
        seen.append(f"enter {names[part]}")
        return lambda: seen.append(f"leave {names[part]}")

    run_in_lockstep([lambda: net(torch.randn(2, 4))] * 2, list(net.parts), enter)
    expected = [line for part, calls in ((0, 2), (1, 4), (2, 2)) for line in
                (f"enter {part}", *[f"call {part}"] * calls, f"leave {part}")]  # fmt: skip
    assert [line for line in seen if "call" not in line] == [line for line in expected if "call" not in line]
    assert sorted(seen) == sorted(expected)


def test_parts_are_as_before_afterwards() -> None:
    net = Net()
    run_in_lockstep([lambda: net(torch.randn(2, 4))], list(net.parts), lambda part: nothing)
    assert not any("forward" in vars(part) for part in net.parts)
    assert net(torch.randn(2, 4)).requires_grad


@pytest.mark.parametrize("where", ["pass", "part", "enter"])
def test_an_error_comes_out_and_no_thread_stays(where: str) -> None:
    net, before = Net(), threading.active_count()
    calls = [0]

    def enter(part: nn.Module) -> Callable[[], None]:
        calls[0] += 1
        if where == "enter" and calls[0] == 2:
            raise RuntimeError("no such shard")
        return nothing

    def run() -> None:
        net(torch.randn(2, 4))
        if where == "pass":
            raise RuntimeError("no such shard")

    if where == "part":
        net.parts[1].register_forward_pre_hook(lambda part, args: None)
        net.parts[1].forward = lambda x: (_ for _ in ()).throw(RuntimeError("no such shard"))
    with pytest.raises(RuntimeError, match="no such shard"):
        run_in_lockstep([run, run, run], list(net.parts), enter)
    assert threading.active_count() == before
