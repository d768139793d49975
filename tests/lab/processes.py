"""Runs of the command line on several processes of this machine, which may be killed: see `zygote.py`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

HERE = Path(__file__).parent
# Longer than anything takes on a machine that many share: what hangs fails.
SECONDS = 400


@dataclass
class Left:
    """What the processes of a run left.

    Attributes:
        codes: exit codes; None for one that hung and was killed by the test.
        texts: what they wrote.
        seconds: from the first end of a process to the last.
    """

    codes: list[int | None]
    texts: list[str]
    seconds: float


class Processes:
    """Starts runs. A context: at its end nothing is left running."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the command line sets it before it loads torch
        }
        command = [sys.executable, str(HERE / "zygote.py")]
        self.zygote = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.zygote.stdin is not None and self.zygote.stdout is not None
        self.zygote.stdin.close()
        self.zygote.wait(timeout=SECONDS)
        self.zygote.stdout.close()

    def ask(self, job: Any) -> Any:
        assert self.zygote.stdin is not None and self.zygote.stdout is not None
        self.zygote.stdin.write(json.dumps(job) + "\n")
        self.zygote.stdin.flush()
        return json.loads(self.zygote.stdout.readline())

    def start(
        self,
        words: Sequence[Sequence[str]],
        logs: Path,
        hook: tuple[str, dict[str, Any]] | None = None,
        launcher: bool = True,
        **environment: str,
    ) -> Started:
        """`sinkroute WORDS` on as many processes as there are lists of words.

        With `launcher` the store is in this process, as torchrun has it, and survivors get a SIGTERM when one dies;
        without, it is in rank 0, as under a scheduler.
        """
        logs.mkdir(parents=True, exist_ok=True)
        store, port = None, _free_port()
        if launcher:
            store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
            port = store.port
        pids = []
        for rank, line in enumerate(words):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(words))}
            world |= {"LOCAL_WORLD_SIZE": str(len(words)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            world |= {"TORCHELASTIC_USE_AGENT_STORE": str(launcher), **environment}
            job = {"words": list(line), "env": world, "log": str(logs / f"{rank}.log")}
            pids.append(self.ask({**job, "hooks": str(HERE / "hooks.py"), "hook": hook}))
        return Started(self, pids, [logs / f"{rank}.log" for rank in range(len(words))], store)

    def run(self, words: Sequence[Sequence[str]], logs: Path, *more: Any, **options: Any) -> Left:
        return self.start(words, logs, *more, **options).wait()


class Started:
    """Processes that run."""

    def __init__(self, processes: Processes, pids: list[int], logs: list[Path], store: Any) -> None:
        self.processes, self.pids, self.logs, self.store = processes, pids, logs, store
        self.codes: list[int | None] = [None] * len(pids)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None and (ranks is None or rank in ranks):
                os.kill(pid, number)

    def wait(self, ranks: Sequence[int] | None = None, seconds: float = SECONDS) -> Left:
        """Until these have ended, by default all; what still runs then is killed."""
        until, first = time.monotonic() + seconds, 0.0
        ranks = range(len(self.pids)) if ranks is None else ranks
        while any(self.codes[rank] is None for rank in ranks) and time.monotonic() < until:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    self.codes[rank] = self.processes.ask(pid)
                    if self.codes[rank] is not None and not first:
                        first = time.monotonic()
                        if self.store is not None and self.codes[rank]:
                            self.send(signal.SIGTERM)
            time.sleep(0.02)
        ended = time.monotonic()
        codes = list(self.codes)
        self.send(signal.SIGKILL)
        for rank, pid in enumerate(self.pids):
            while self.codes[rank] is None:
                self.codes[rank] = self.processes.ask(pid)
        return Left(codes, [log.read_text() for log in self.logs], ended - first)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lines(folder: Path) -> list[tuple[float, list[list[int]]]]:
    """Of each step the loss and the loads, to the last bit."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["load"]) for line in found if line["kind"] == "train"]
