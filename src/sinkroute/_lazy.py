"""Names of a package that are loaded when first asked for, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package: `__getattr__ = lazily(__name__, {"Augment": "augment"})`.

    Args:
        package: its dotted name.
        homes: public name → the module of the package that holds it. These modules are attributes, too.

    >>> lazily("sinkroute", {"solve": "transport"})("solve").__module__
    'sinkroute.transport.solve'
    """
    modules = set(homes.values())

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
