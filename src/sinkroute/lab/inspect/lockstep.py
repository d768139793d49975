"""Several forward passes of one model side by side, so that each of its parts is entered by all before the next is.

With the parts' weights somewhere slow, this reads each part once for all passes instead of once for each. Every pass
is the model's own code on its own batch, so what comes out is what single passes would give, to the last bit, whatever
masks and positions a model hands to its layers.

Each pass is a thread that stops where it calls a part; the caller's thread runs the part for one pass after another.
Only one thread runs at any time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

__all__ = ["run_in_lockstep"]

_here = threading.local()


class _Stopped(BaseException):
    """Ends a pass that nobody waits for any more."""


class _Pass:
    """One forward pass, in a separate thread.

    Attributes:
        part: the part that it wants to call next; None: it is over.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.part: nn.Module | None = None
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._error: BaseException | None = None
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()
        self._wait()

    def _run(self, call: Callable[[], object]) -> None:
        _here.current = self
        try:
            with torch.no_grad():  # the mode is a thread's
                call()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self.part = None
        self._asked.put(None)

    def ask(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the pass's thread: hand the call of a part to the caller's."""
        self.part, self._arguments = part, (args, kwargs)
        del args, kwargs  # the caller's thread lets go of them while the part runs
        self._asked.put(None)
        answer = self._answers.get()
        if isinstance(answer, _Stopped):
            raise answer
        return answer

    def advance(self, forward: Callable[..., Any]) -> None:
        """In the caller's thread: run the part, and the pass to where it calls the next."""
        args, kwargs = self._arguments
        self._arguments = ((), {})
        self._answers.put(forward(*args, **kwargs))
        self._wait()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._answers.put(_Stopped())
            self._thread.join()

    def _wait(self) -> None:
        self._asked.get()
        if self._error is not None:
            raise self._error


@torch.no_grad()
def run_in_lockstep(
    passes: Sequence[Callable[[], object]],
    parts: Sequence[nn.Module],
    enter: Callable[[nn.Module], Callable[[], None]],
    advanced: Callable[[], None] = lambda: None,
) -> None:
    """Run forward passes of a model part by part.

    Args:
        passes: each makes one.
        parts: modules, none inside another.
        enter: is called before a part is, and returns what is to be called after all passes went through it.
        advanced: is called whenever a pass went through a part.

    Raises:
        What a pass, a part or `enter` raises; all passes are ended then.
    """
    with _asking(parts) as forwards:
        running: list[_Pass] = []
        try:
            for call in passes:
                running.append(_Pass(call))
            while waiting := [one for one in running if one.part is not None]:
                part = waiting[0].part
                assert part is not None
                leave = enter(part)
                try:
                    for one in waiting:
                        while one.part is part:
                            one.advance(forwards[part])
                            advanced()
                finally:
                    leave()
        finally:
            for one in running:
                one.stop()


@contextmanager
def _asking(parts: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Callable[..., Any]]]:
    """Parts whose calls go through the pass that makes them, and what they were."""

    def asking(part: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            current: _Pass = _here.current
            return current.ask(part, args, kwargs)

        return forward

    forwards = {part: part.forward for part in parts}
    for part in parts:
        part.forward = asking(part)
    try:
        yield forwards
    finally:
        for part in parts:
            del part.forward
