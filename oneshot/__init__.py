"""oneshot: prune a pretrained language model in one shot, measure exactly what that cost, run it faster.

    import oneshot
    model, tokenizer = oneshot.load("demo")
    record = oneshot.prune(model, tokenizer, method="sparsegpt", pattern="2:4")
    model.save_pretrained("demo-2of4")

The command line is `oneshot --help`. Importing this package registers the packed 2:4 checkpoint format with
transformers, so that plain `from_pretrained` loads it.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time these are imported on first use, see __getattr__
    from .measure.perplexity import perplexity
    from .models import load
    from .pipeline.api import fit, heal, prune, shrink

__version__ = "0.1.0"
__all__ = ["fit", "heal", "load", "perplexity", "prune", "shrink"]

_FOUND_IN = {"load": ".models", "perplexity": ".measure.perplexity", "fit": ".pipeline.api",
             "shrink": ".pipeline.api"}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only on first use, so that `oneshot --version` and `--help` answer at once."""
    if name in ("heal", "prune"):  # both subpackages and functions, see runtime/verb.py
        return importlib.import_module(f".{name}", __name__)
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FOUND_IN[name], __name__), name)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the packed format as soon as anybody imports transformers' quantizers.

    Importing them here instead would cost every user of this package several seconds.
    """

    module = "transformers.quantizers"

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        """Called by Python's import system: the module's ordinary spec, extended by the registration."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            importlib.import_module(".checkpoint.packed", __name__)

        spec.loader.exec_module = exec_module
        return spec


if _WhenImported.module in sys.modules:
    importlib.import_module(".checkpoint.packed", __name__)
else:
    sys.meta_path.insert(0, _WhenImported())
