"""Hugging Face transformers: `patch` puts a router into a model, in place, and takes it out again."""

from sinkroute.adapters.hf.patch import Handle, patch

__all__ = ["Handle", "patch"]
