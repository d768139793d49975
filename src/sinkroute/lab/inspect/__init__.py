"""Expert load of a Hugging Face checkpoint on a text, before any training: `sinkroute inspect MODEL --text FILE`.

`text` cuts a file into windows of tokens, `loading` brings a checkpoint into memory, `by_layer` brings it there one
layer at a time and `lockstep` takes all windows through it, `tally` counts what the routers decide and what balanced
routing would, `audit` runs it, `result` is what came out, `advice` what to do next, `table` and `page` show both.
`images` does the same for vision models of the lab. `choices` keeps what the first tokens chose, and `viewer` shows it,
packed by `viewer_pack`, in the colours of `viewer_colours`.
"""

from sinkroute.lab.inspect.advice import advice
from sinkroute.lab.inspect.audit import inspect_checkpoint
from sinkroute.lab.inspect.choices import Choices
from sinkroute.lab.inspect.images import inspect_images, is_run
from sinkroute.lab.inspect.page import write_page
from sinkroute.lab.inspect.result import Alternative, Audit, Layer
from sinkroute.lab.inspect.table import audit_table, facts, summary
from sinkroute.lab.inspect.text import InspectError
from sinkroute.lab.inspect.viewer import write_viewer

__all__ = [
    "Alternative",
    "Audit",
    "Choices",
    "InspectError",
    "Layer",
    "advice",
    "audit_table",
    "facts",
    "inspect_checkpoint",
    "inspect_images",
    "is_run",
    "summary",
    "write_page",
    "write_viewer",
]
