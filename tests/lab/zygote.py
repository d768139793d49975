"""Imports all that the lab needs, once, then forks a process for each job on its standard input: `python zygote.py`.

A job is a line of JSON: `{"words": of the command line, "env": variables, "log": file, "hooks": file, "hook": [function
of that file, its arguments]}`, answered by the process id. A number asks for that process's exit code: null while it
runs.
"""

import atexit
import importlib.util
import json
import os
import signal
import sys
import threading
import traceback

import torch
import torch._dynamo

from sinkroute.cli import main


def child(job):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["env"])
    torch.set_num_threads(1)
    if job["hook"]:
        name, arguments = job["hook"]
        spec = importlib.util.spec_from_file_location("hooks", job["hooks"])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        getattr(module, name)(**arguments)
    return main(job["words"])


def answer(line):
    job = json.loads(line)
    if isinstance(job, int):
        pid, status = os.waitpid(job, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = child(job)
    except BaseException:
        traceback.print_exc()
    # What the interpreter does at its end, without going back into the loop of the parent.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    real = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        real.write(json.dumps(answer(line)) + "\n")
        real.flush()
