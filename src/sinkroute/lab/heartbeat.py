"""Each process of a run tells the others twice a second that it lives and what it is doing.

They tell it to the store at which they met. So a process that waits in vain can say for whom, and one that failed can
leave behind why. Engines know less: gloo says that a connection was closed, NCCL says nothing until its time limit.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

__all__ = ["SILENT_SECONDS", "Heartbeat", "StoreLost"]

BEAT_SECONDS = 0.5
SILENT_SECONDS = 45.0
"""So long without a beat, and a process is gone. Python's lock may be held for seconds: by a slow disk, by a swap."""
GRACE_SECONDS = 10.0
"""So long a process may take to notice that another one failed; one that is stuck in a collective never does."""
GOODBYE_SECONDS = 3.0
"""So long rank 0, where the store may live, waits at its end for the others to have read it."""


class StoreLost(Exception):
    """The store does not answer: it lives in rank 0, or in the launcher beside it."""


class Heartbeat:
    """The beats of this process, and what it hears of the others.

    Args:
        store: at which the processes met; a connection beside it is opened, since a store's calls wait for each other.
        number: of processes.
        index: of this one.
        session: tells the beats of one start of the processes from those of an earlier one.
    """

    def __init__(self, store: Any, number: int, index: int, session: str = "") -> None:
        self.number, self.index = number, index
        self.doing = "starting"
        self.busy = False  # with what needs no other process, and may take as long as it likes
        self._store = dist.PrefixStore(f"sinkroute/{session}", store.clone())
        self._seen: dict[int, tuple[str, float]] = {}
        self._failure: dict[str, Any] | None = None
        self._ended = threading.Event()
        self.tell(f"where/{index}", f"{socket.gethostname()}, process {os.getpid()}")
        self._thread = threading.Thread(target=self._beat, name="sinkroute-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    # -- the store --

    def tell(self, key: str, value: Any) -> None:
        """Leave something that JSON holds under a key."""
        with _lost():
            self._store.set(key, json.dumps(value))

    def told(self, keys: list[str]) -> bool:
        """Whether all of these were told."""
        with _lost():
            return bool(self._store.check(keys))

    def hear(self, key: str) -> Any:
        """What was told under a key; None: nothing yet."""
        with _lost():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    # -- the others --

    def where(self, rank: int) -> str:
        """`rank 1 (node7, process 4711)`."""
        known = self.hear(f"where/{rank}")
        return f"rank {rank}" + (f" ({known})" if known else "")

    def doing_of(self, rank: int) -> str:
        """What a process said last that it was doing."""
        return str((self.hear(f"beat/{rank}") or [0, "starting"])[1])

    def silent(self, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those whose last new beat was seen longer ago. Ask again and again: what nobody looks at is not seen."""
        now, found = time.monotonic(), []
        for rank in ranks:
            beat = str(self.hear(f"beat/{rank}"))
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
            if now - self._seen[rank][1] > seconds:
                found.append(rank)
        return found

    def fail(self, what: dict[str, Any]) -> None:
        """Leave behind why this process ends; of several that fail, the first is the cause."""
        with _lost():
            if self._store.add("failures", 1) == 1:
                self._store.set("failure", json.dumps(what))

    def failure(self) -> dict[str, Any] | None:
        """What the first process that failed left behind; once heard it is known, also without the store."""
        if self._failure is None:
            self._failure = self.hear("failure")
        return self._failure

    def end(self) -> None:
        """No more beats. Rank 0 waits a moment for the others: the store may be in it."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)
        with contextlib.suppress(StoreLost):
            self.tell(f"left/{self.index}", True)
            others = [rank for rank in range(self.number) if rank != self.index]
            until = time.monotonic() + GOODBYE_SECONDS * (self.index == 0)
            while time.monotonic() < until and not all(
                self.told([f"left/{rank}"]) or rank in self.silent([rank], 3 * BEAT_SECONDS) for rank in others
            ):
                time.sleep(0.05)

    # -- the thread --

    def _beat(self) -> None:
        others = [rank for rank in range(self.number) if rank != self.index]
        count, failed_at = 0, None
        doing, since = self.doing, time.monotonic()
        while True:
            now, words = time.monotonic(), None
            if doing != self.doing or self.busy:
                doing, since = self.doing, now
            try:
                self.tell(f"beat/{self.index}", [count, self.doing])
                if (failure := self.failure()) is not None:
                    failed_at = failed_at or now
                    if now - failed_at > GRACE_SECONDS:
                        words = f"rank {failure['rank']} ({failure['where']}): {failure['words']}"
                elif now - since > SILENT_SECONDS / 2 and (lost := self.silent(others, SILENT_SECONDS)):
                    words = f"{', '.join(map(self.where, lost))} did not answer for {SILENT_SECONDS:.0f} s"
            except StoreLost:
                failed_at = failed_at or now
                if now - failed_at > SILENT_SECONDS:
                    words = "rank 0, at whose address the processes met, is gone"
            if words is not None and not self.busy and not self._ended.is_set():
                # The main thread is stuck where no exception of Python reaches it.
                sys.stderr.write(
                    f"error: {words}. Rank {self.index} was waiting for the others ({self.doing}) and ends too; "
                    "the same command continues from the last checkpoint.\n"
                )
                sys.stderr.flush()
                os._exit(1)
            count += 1
            if self._ended.wait(BEAT_SECONDS):
                return


@contextlib.contextmanager
def _lost() -> Any:
    """Whatever a store raises when it is out of reach, under one name."""
    try:
        yield
    except RuntimeError as error:
        raise StoreLost(str(error)) from error
