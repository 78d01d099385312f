"""Runs that several processes share: their command line, and the program without pictures."""

import processes
import tiny

from oneshot.report import page


def command(place, out, *more, **changed):
    """A run of 8 windows in 4 batches that saves to `out`."""
    return tiny.flags(place, *more, **{"method": "sparsegpt", "pattern": "2:4", "save": out, "batch_size": 2,
                                       "results": f"{out}.runs"} | changed)


def program(*argv):
    """The program, without pictures."""
    page._pictures = lambda records: []
    return tiny.main(*argv)


def both(folder, *argv, n=2):
    """The exit codes of n processes that run the program."""
    return processes.together(n, folder / "said", program, *argv)
