"""What the lab can train: each task knows its batches, its loss and its evaluation; the training loop knows none.

- `windows` and `streams`: language models without and with a memory;
- `images`: classifiers;
- `base`: what the training loop asks of them.
"""

from sinkroute.lab.tasks.base import Task
from sinkroute.lab.tasks.registry import load_data, make_task

__all__ = ["Task", "load_data", "make_task"]
