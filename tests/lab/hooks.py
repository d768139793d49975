"""What tests do to a process of a run from inside: `kill -9` at a chosen place, and other mishaps. See `zygote.py`."""

import errno
import functools
import os
import signal
import time

from sinkroute._errors import NonFiniteLogits
from sinkroute.lab import checkpoint, heartbeat, peers, run, training
from sinkroute.lab.peers import Peers
from sinkroute.lab.tasks.text import TextTask
from sinkroute.routing.routers import plan

RANK = int(os.environ.get("RANK", "0"))
now = {"step": -1}


def before(owner, name, what):
    """Call `what(arguments)` before each call of a function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments, **options):
        what(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def counting():
    """Keep `now["step"]` up to date."""

    def count(_, number, *__, **___):
        now["step"] = number

    before(training, "set_step", count)


def kill(rank, at, step):
    """Kill this process if it is that rank, at that place, in the first step from `step` on in which it comes there."""
    if rank != RANK:
        return

    counting()

    def then(what=die):
        def look(*arguments, **options):
            if now["step"] >= step:
                what(*arguments, **options)

        return look

    def when(words):
        def look(_, doing, *__):
            if doing.startswith(words):
                die()

        return look

    places = {
        "step": (training, "_key_dropout", then()),
        "update": (training, "end_step", then()),
        "plan": (plan, "solve", then()),
        "agreement": (training, "_agreed", then()),
        # Half of a checkpoint is written; or all of it, under another name; or the name too.
        "writing": (checkpoint, "digest", then()),
        "renaming": (checkpoint, "complete", then()),
        "pruning": (checkpoint.shutil, "rmtree", then(lambda path, **_: "draft" not in str(path) and die())),
        "barrier": (Peers, "_wait" if RANK else "on_main", then(when("writing"))),
        "evaluation": (Peers, "_wait", then(when("evaluating"))) if RANK else (TextTask, "text", then()),
        "start": (run, "make_task", die),
    }
    before(*places[at])


def in_step(rank, step, what):
    """Do something in that process at the beginning of that step."""
    counting()

    def look(*_):
        if rank == RANK and now["step"] == step:
            what()

    before(training, "_key_dropout", look)


def poison(rank, step, patience=None):
    """Scores that are not finite, on one rank only; with `patience` the others are stuck beyond Python's reach."""

    def refuse():
        raise NonFiniteLogits("logits of token 0 are not finite")

    if patience is not None:
        heartbeat.GRACE_SECONDS = patience
        in_step(1 - rank, step, lambda: time.sleep(3600))
    in_step(rank, step, refuse)


def freeze(rank, step, patience):
    """A machine that is out of reach, with its connections still open."""
    heartbeat.SILENT_SECONDS = peers.SILENT_SECONDS = patience
    in_step(rank, step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def tarry(rank, step, seconds):
    """A rank that is late."""
    in_step(rank, step, lambda: time.sleep(seconds))


def ponder(seconds):
    """An evaluation that takes its time."""
    before(TextTask, "text", lambda *_: time.sleep(seconds))


def fill(step):
    """A disk that is full when the checkpoint of that step is written."""

    def full(folder, number, *_):
        if number == step:
            raise_full = OSError(errno.ENOSPC, "No space left on device")
            checkpoint.save_file = lambda *_: (_ for _ in ()).throw(raise_full)

    before(checkpoint.Snapshot, "write", lambda _, *rest: full(*rest))


def shard(**killed):
    """Accelerate gives FSDP2 to GPUs only. A CPU can do it: the stand-in lets it. `killed`: as `kill` has it."""
    if killed:
        kill(**killed)
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def start(self, *arguments, **options):
        original(self, *arguments, **options)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options["fsdp_plugin"]

    AcceleratorState.__init__ = start
