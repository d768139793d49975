"""The processes of a run: they agree on what one of them found, and all end when one of them does.

What one process does alone (reading a file, writing a checkpoint) is told to the others through the store at which they
met, not by a collective call: there is no time limit for that as long as the one lives, and a failure is raised on all,
with its words. Collective calls do the rest, and have the time limit.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from sinkroute._errors import RankLost, SinkrouteError
from sinkroute.lab.heartbeat import BEAT_SECONDS, SILENT_SECONDS, Heartbeat, StoreLost
from sinkroute.lab.interrupt import Interrupted, StopRequest

__all__ = ["PeerFailed", "Peers", "join", "shared"]

T = TypeVar("T")

# What a collective call raises when another process is gone or late. gloo and DDP have no class for it.
_BROKEN = re.compile(r"gloo[/:]|\[c10d\]|NCCL|ProcessGroup|Connection (closed|reset)|Broken pipe|pair closure")


class PeerFailed(SinkrouteError):
    """Another process of the run failed; the message is that process's."""


def shared(error: T) -> T:
    """Mark an error that all processes raise at the same place: nobody has to be told."""
    error.of_all = True  # type: ignore[attr-defined]
    return error


class Peers:
    """The processes of a run, this one among them. See `join`.

    Attributes:
        number: how many.
        index: of this one; 0 is the main one.
        minutes: the time limit of a collective call.
        stop: whether somebody asked the run to stop. Schedulers and torchrun ask the rest when one process is gone.
        cure: how to continue after a failure, said with it.
    """

    def __init__(self, number: int, index: int, minutes: float) -> None:
        self.number, self.index, self.minutes = number, index, minutes
        self.stop: StopRequest | None = None
        self.cure = "The same command continues."
        self._calls = 0
        self._heart: Heartbeat | None = None
        if number > 1:
            # A launcher that starts the processes anew keeps its store, with the beats of those before.
            session = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._heart = Heartbeat(dist.distributed_c10d._get_default_store(), number, index, session)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def at(self, doing: str) -> None:
        """Say where this process is: others name it if they wait in vain."""
        if self._heart is not None:
            self._heart.doing = doing

    @contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Within it, this process needs no other and may take as long as it likes."""
        if self._heart is None:
            yield
            return
        before, self._heart.doing, self._heart.busy = self._heart.doing, doing, True
        try:
            yield
        finally:
            self._heart.doing, self._heart.busy = before, False

    def on_main(self, doing: str, work: Callable[[], T]) -> T:
        """What `work()` gives on the main process, as JSON holds it, on all. They wait for it however long it takes.

        Raises:
            PeerFailed: on the others, what the main one raises.
        """
        if self._heart is None:
            return work()
        key = self._next_key()
        if not self.is_main:
            answer = self._wait(doing, {key: 0})[key]
            if answer["error"] is not None:
                raise shared(_as_heard(answer["error"], self.cure))
            return answer["value"]
        try:
            with self.alone(doing):
                value = work()
        except Exception as error:
            self._heart.tell(key, {"error": self._described(error)})
            shared(error)
            raise
        self._heart.tell(key, {"error": None, "value": value})
        return value

    def each(self, doing: str, work: Callable[[], T]) -> T:
        """What `work()` gives here, once it has been done on all processes.

        Raises:
            PeerFailed: it failed on another; of several, the lowest rank's words.
        """
        if self._heart is None:
            return work()
        failed: Exception | None = None
        try:
            with self.alone(doing):
                value = work()
        except Exception as error:
            failed = error
        outcomes = self.gather(doing, None if failed is None else self._described(failed))
        first = self.on_main(doing, lambda: next((found for found in outcomes if found is not None), None))
        if failed is not None:
            raise shared(failed)
        if first is not None:
            raise shared(_as_heard(first, self.cure))
        return value

    def gather(self, doing: str, value: T) -> list[T]:
        """The values of all processes by rank, as JSON holds them, on the main one; nothing on the others."""
        if self._heart is None:
            return [value]
        key = self._next_key()
        self._heart.tell(f"{key}/{self.index}", [value])
        if not self.is_main:
            return []
        found = self._wait(doing, {f"{key}/{rank}": rank for rank in range(self.number)})
        return [heard for (heard,) in found.values()]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Within it, a failure of one process ends all, and says of which it is and how to continue."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self._heart is None or getattr(error, "of_all", False):
                raise
            if (found := self._explained(error)) is not None:
                raise shared(found) from error
            shared(error)
            raise

    def where(self, rank: int) -> str:
        """`rank 1 (node7, process 4711)`."""
        return f"rank {rank}" if self._heart is None else self._heart.where(rank)

    def _next_key(self) -> str:
        self._calls += 1
        return f"call/{self._calls}"

    def _described(self, error: BaseException) -> dict[str, Any]:
        assert self._heart is not None
        words = str(error) or type(error).__name__
        where = self._heart.hear(f"where/{self.index}")
        return {"rank": self.index, "where": where, "kind": type(error).__name__, "words": words}

    def _wait(self, doing: str, keys: dict[str, int]) -> dict[str, Any]:
        """What was told under these keys, by the ranks named; until then, whether those live."""
        heart = self._heart
        assert heart is not None
        before, heart.doing = heart.doing, f"waiting for others: {doing}"
        pause, looked = 0.002, time.monotonic()
        while not heart.told(list(keys)):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)
            if time.monotonic() < looked + BEAT_SECONDS:
                continue
            looked = time.monotonic()
            if (failure := heart.failure()) is not None:
                raise shared(_as_heard(failure, self.cure))
            late = {rank for key, rank in keys.items() if rank != self.index and not heart.told([key])}
            # Whoever is asked to stop while it waits may have been asked because the other is gone.
            limit = 8 * BEAT_SECONDS if self.stop else SILENT_SECONDS
            if lost := heart.silent(late, limit):
                raise self._ended(self._lost(lost))
        heart.doing = before
        return {key: heart.hear(key) for key in keys}

    def _explained(self, error: BaseException) -> SinkrouteError | Interrupted | None:
        """What is behind an error that only this process has; None: its own fault, and the others are told."""
        heart = self._heart
        assert heart is not None
        others = [rank for rank in range(self.number) if rank != self.index]
        try:
            broken = isinstance(error, (StoreLost, RankLost, dist.DistError)) or (
                isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None
            )
            if not broken:
                heart.fail(self._described(error))
                return None
            until = time.monotonic() + 8 * BEAT_SECONDS
            lost: list[int] = []
            while time.monotonic() < until and not lost:
                if (failure := heart.failure()) is not None:
                    return _as_heard(failure, self.cure)
                lost = heart.silent(others, 4 * BEAT_SECONDS)
                time.sleep(BEAT_SECONDS / 5)
            return self._ended(self._lost(lost) if lost else self._late(error))
        except StoreLost:
            return RankLost(
                f"rank 0, at whose address the processes met, is gone while rank {self.index} was at: {heart.doing}. "
                f"{self.cure}"
            )

    def _ended(self, words: str) -> RankLost:
        """The error to raise, once the others can hear of it."""
        assert self._heart is not None
        found = shared(RankLost(words))
        self._heart.fail(self._described(found))
        return found

    def _lost(self, lost: list[int]) -> str:
        heart = self._heart
        assert heart is not None
        names = " and ".join(f"{heart.where(rank)}, last heard of at: {heart.doing_of(rank)}" for rank in lost)
        alive = ", ".join(str(rank) for rank in range(self.number) if rank not in lost)
        return (
            f"{'a process is' if len(lost) == 1 else 'processes are'} gone, killed or out of reach: {names}. "
            f"Ranks that still answer: {alive}. {self.cure}"
        )

    def _late(self, error: BaseException) -> str:
        heart = self._heart
        assert heart is not None
        ranks = "; ".join(f"rank {rank} at: {heart.doing_of(rank)}" for rank in range(self.number))
        return (
            f"the processes lost touch, and all still answer ({ranks}). A process that is late by more than "
            f"train.timeout_minutes={self.minutes:g} is not waited for. The engine says: {str(error).splitlines()[0]}. "
            f"{self.cure}"
        )


def _as_heard(failure: dict[str, Any], cure: str) -> SinkrouteError | Interrupted:
    """The failure of another process, as this one raises it."""
    if failure["kind"] == "RankLost":
        return RankLost(failure["words"])
    if failure["kind"] == "Interrupted":
        return Interrupted(failure["words"])
    words = f"rank {failure['rank']} ({failure['where']}): {failure['words'].rstrip('.')}."
    return PeerFailed(words if "same command" in words else f"{words} {cure}")


_joined: Peers | None = None


def join(minutes: float = 10.0, stop: StopRequest | None = None) -> Peers:
    """Meet the other processes of the launcher (torchrun, accelerate launch, a scheduler); they meet once.

    Args:
        minutes: how long a collective call may wait for the others.
        stop: whether somebody asked the run to stop.

    Raises:
        RankLost: not all processes came within that time.

    >>> join().on_main("counting", lambda: 1 + 1)
    2
    """
    global _joined
    try:
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(minutes=minutes))
    except (RuntimeError, TimeoutError) as error:
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            raise
        raise RankLost(
            f"not all {os.environ.get('WORLD_SIZE', '')} processes came to {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within train.timeout_minutes={minutes:g}; start all of them with the "
            f"same command. The engine says: {str(error).splitlines()[0]}"
        ) from error
    if state.num_processes == 1:
        return Peers(1, 0, minutes)
    if _joined is None:
        _joined = Peers(state.num_processes, state.process_index, minutes)
    if stop is not None:
        _joined.stop = stop
    return _joined
