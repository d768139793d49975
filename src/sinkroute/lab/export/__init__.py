"""Models of the lab as Hugging Face checkpoints: `export_run(load_run(folder), output)`.

`serving` says by which rule a mixture layer routes in `eval()`, `architectures` which class of transformers follows
that rule and what its tensors are called, `tokenizer` makes bytes of text, `agreement` measures that both models say
the same, `card` and `folder` write it down.
"""

from sinkroute.lab.export.folder import Export, export_run
from sinkroute.lab.export.serving import ExportError

__all__ = ["Export", "ExportError", "export_run"]
