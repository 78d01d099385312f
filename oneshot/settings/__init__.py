"""Settings: what a run is asked to do, from the command line, from Python or from a sweep's YAML.

    config       RunConfig: one model, one method, one pattern
    known        all flags, derived from their metadata
    values       whether a given value is of its flag's kind
    flags        the command line
    wanda_flags  the flags of Wanda's main.py, translated to oneshot's
    presets      what `--method best` stands for

Each stage declares its own flags next to the code that uses them (runtime/flag.py); nothing is listed twice.
"""

from .config import RunConfig
from .flags import parse, parser
from .known import Known, known

__all__ = ["Known", "RunConfig", "known", "parse", "parser"]
