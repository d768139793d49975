"""What tests do to a process of a run from inside: `kill -9` at a chosen place, and other mishaps. See `zygote.py`."""

import functools
import os
import signal

from sinkroute.lab import checkpoint, run, training
from sinkroute.lab.peers import Peers
from sinkroute.lab.tasks.text import TextTask
from sinkroute.routing.routers import plan

RANK = int(os.environ["RANK"])
now = {"step": -1, "doing": ""}


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


def kill(rank, at, step):
    """Kill this process if it is that rank, at that place, in the first step from `step` on in which it comes there."""
    if rank != RANK:
        return

    def count(_, number, *__, **___):
        now["step"] = number

    before(training, "set_step", count)

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
        "writing": (checkpoint, "_digest", then()),
        "renaming": (checkpoint, "complete", then()),
        "pruning": (checkpoint.shutil, "rmtree", then(lambda path, **_: "draft" not in str(path) and die())),
        "barrier": (Peers, "_wait" if RANK else "on_main", then(when("writing"))),
        "evaluation": (Peers, "_wait", then(when("evaluating"))) if RANK else (TextTask, "text", then()),
        "start": (run, "make_task", die),
    }
    before(*places[at])


def shard():
    """Accelerate gives FSDP2 to GPUs only. A CPU can do it: the stand-in lets it."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def start(self, *arguments, **options):
        original(self, *arguments, **options)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options["fsdp_plugin"]

    AcceleratorState.__init__ = start
