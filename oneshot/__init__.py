"""oneshot: prune a language model once, prove what it cost, run it faster.

    import oneshot
    model, tokenizer = oneshot.load("demo")
    record = oneshot.prune(model, tokenizer, method="sparsegpt", pattern="2:4")
    model.save_pretrained("demo-2of4")

The command line is `oneshot --help`. Importing this package teaches transformers to load packed
checkpoints.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time they are imported when first needed, see below
    from .measure.perplexity import perplexity
    from .models import load
    from .pipeline.api import prune

__version__ = "0.1.0"
__all__ = ["load", "perplexity", "prune"]

_FOUND_IN = {"load": ".models", "perplexity": ".measure.perplexity"}


def __getattr__(name):
    """Import torch and transformers when they are first needed: the version and `--help` take no seconds."""
    if name == "prune":  # a stage and a function, see runtime/verb.py
        return importlib.import_module(".prune", __name__)
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FOUND_IN[name], __name__), name)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Runs `then` once transformers' quantizers are imported, whoever imports them and whenever (importing them here
    would cost every user of this package seconds)."""

    module = "transformers.quantizers"

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            importlib.import_module(".checkpoint.packed", __name__)

        spec.loader.exec_module = exec_module
        return spec


if _WhenImported.module in sys.modules:
    importlib.import_module(".checkpoint.packed", __name__)
else:
    sys.meta_path.insert(0, _WhenImported())
