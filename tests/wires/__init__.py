"""The wires of flags: a bench that runs `oneshot prune` in-process on a tiny model and looks at the far end.

    CHECKS   {flag: its check, called with a Bench}; filled by the files here, each about some of the flags
"""

import importlib
import pkgutil
from contextlib import contextmanager

import tiny
import torch

from oneshot.settings.known import known

CHECKS = {}
WEIGHTS = {}  # {(place, command line): weights} of runs that several checks compare with


def checks():
    """CHECKS, with those of every file here."""
    for m in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{m.name}")
    return CHECKS


def wire(*names):
    """Put a check under its flags' names."""
    def put(check):
        CHECKS.update(dict.fromkeys(names, check))
        return check
    return put


SMALLER = {"method": "obs", "pattern": "dense", "shrink": 0.7, "tries": 2}  # makes the model smaller, blocks too


def text_healing(b, **changed):
    """Flags of healing all weights on the place's calibration text, in six steps."""
    return {"method": "wanda", "heal": "full", "heal_data": b.place / "calibration.txt", "heal_tokens": "200",
            "heal_seqlen": 16, "heal_batch": 32} | changed


class Bench:
    """Runs of the command on what `tiny.make` left in `place`, with little in them: four windows, no measuring."""

    def __init__(self, place, tmp_path, monkeypatch, capfd):
        self.place, self.tmp, self.monkeypatch, self.capfd, self.runs = place, tmp_path, monkeypatch, capfd, 0

    def argv(self, *more, **changed):
        """The command line; names as Python has them ("alps.rho", "seqlen"), True and False turn a switch."""
        given = {"method": "sparsegpt", "pattern": "0.5", "nsamples": 4, "evaluate": "none"} | changed
        switches = [known()[name].option for name, value in given.items()
                    if isinstance(value, bool) and value != known()[name].default]
        values = {name: value for name, value in given.items() if not isinstance(value, bool)}
        return tiny.flags(self.place, "--no-dense", *switches, *more, **values)

    def code(self, *more, **changed):
        """Exit code."""
        return tiny.main(*self.argv(*more, **changed))

    def records(self, *more, **changed):
        """{(method, pattern): record} of a run that goes well, its records in a folder of their own."""
        self.runs += 1
        results = self.tmp / f"runs-{self.runs}"
        assert self.code(*more, **{"results": results} | changed) == 0, self.capfd.readouterr().err
        return tiny.records(results)

    def record(self, *more, **changed):
        """The only record of a run that goes well."""
        [record] = self.records(*more, **changed).values()
        return record

    def weights(self, *more, **changed):
        """{name: tensor} of the checkpoint that a run saves. What was run before is not run again."""
        key = (str(self.place), *map(str, self.argv(*more, **changed)))
        if key not in WEIGHTS:
            folder = self.tmp / f"out-{self.runs}"
            self.record(*more, save=folder, **changed)
            WEIGHTS[key] = tiny.weights(folder)
        return WEIGHTS[key]

    @contextmanager
    def seen(self, owner, name, note):
        """A list that gets note(arguments by position and by name, result) of each call of owner.name meanwhile."""
        found, real = [], getattr(owner, name)

        def spy(*args, **kwargs):
            result = real(*args, **kwargs)
            found.append(note(args, kwargs, result))
            return result
        with self.monkeypatch.context() as patch:
            patch.setattr(owner, name, spy)
            yield found

    @contextmanager
    def batches(self):
        """A list that gets how many windows the decoder runs on, each time."""
        from transformers.models.llama.modeling_llama import LlamaModel

        with self.seen(LlamaModel, "forward", lambda args, kwargs, _: len(kwargs["input_ids"])) as found:
            yield found

    @contextmanager
    def precisions(self, owner, name):
        """A set that gets the precision of float32 products in which owner.name is called."""
        found, real = set(), getattr(owner, name)

        def spy(*args, **kwargs):
            found.add(torch.get_float32_matmul_precision())
            return real(*args, **kwargs)
        with self.monkeypatch.context() as patch:
            patch.setattr(owner, name, spy)
            yield found


def differ(some, others):
    """Whether two checkpoints differ in any tensor."""
    assert some.keys() == others.keys()
    return any(not torch.equal(some[name], others[name]) for name in some)


def zeros(weights):
    """{linear: bool, where it is zero}."""
    return {name.removesuffix(".weight"): W == 0 for name, W in weights.items() if name.endswith("proj.weight")}
