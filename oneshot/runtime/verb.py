"""Subpackages that are also functions: `oneshot.prune` is a folder of this package and, for its users, a function.

As soon as anything imports a subpackage, Python sets the parent's attribute of that name to it, so a function of the
same name would be overwritten. But a module can be called if its class defines `__call__`.
"""

import importlib
import sys
import types
from typing import Any


def make_callable(package: str, function: str) -> None:
    """Make the module named `package` callable; calls go to `function`, "module:name", imported at the first call."""
    module, name = function.split(":")

    class Verb(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

    sys.modules[package].__class__ = Verb
