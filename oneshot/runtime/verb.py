"""Stages that are verbs: `oneshot.prune` is a folder of this package and, for its users, a function.

Python binds a subpackage to its parent's attribute of the same name as soon as anything imports it, so a function of
that name would vanish. A module can be called, though, if its class can.
"""

import importlib
import sys
import types


def make_callable(package: str, function: str) -> None:
    """Make the package called `package` callable: a call goes to `function`, "module:name", imported when it is called.
    """
    module, name = function.split(":")

    class Verb(types.ModuleType):
        def __call__(self, *args, **kwargs):
            return getattr(importlib.import_module(module), name)(*args, **kwargs)

    sys.modules[package].__class__ = Verb
