"""Hugging Face transformers: `patch` puts a router into a model, in place, and takes it out again.

`RouterCallback` runs the routers of a patched model in transformers' `Trainer`.
"""

from typing import TYPE_CHECKING, Any

from sinkroute.adapters.hf.handle import Handle
from sinkroute.adapters.hf.patch import patch

if TYPE_CHECKING:
    from sinkroute.adapters.hf.trainer import RouterCallback

__all__ = ["Handle", "RouterCallback", "patch"]


def __getattr__(name: str) -> Any:
    # transformers' Trainer takes seconds to import, which patching does not need.
    if name == "RouterCallback":
        from sinkroute.adapters.hf.trainer import RouterCallback

        return RouterCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
