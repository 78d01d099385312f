"""Settings: what a run is asked to do, from the command line, from Python, from a sweep's YAML.

    config       RunConfig: one model, one method, one pattern
    known        every flag there is, and what its metadata says of it
    flags        the command line
    wanda_flags  the flags of wanda's main.py in ours
    presets      what `--method best` stands for

Each stage declares its own flags beside the code that uses them (runtime/flag.py); nothing is listed twice.
"""

from .config import RunConfig
from .flags import parse, parser
from .known import Known, known

__all__ = ["Known", "RunConfig", "known", "parse", "parser"]
