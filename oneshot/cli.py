"""The command line: flags made from RunConfig and every solver's Config, and wanda's own flags translated.

`--a-b` and `--a_b` are the same flag. A solver's flags carry its name: `--sparsegpt.damping 0.1`.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from . import solvers
from .config import RunConfig

EXAMPLES = """examples:
  python -m oneshot.run
      the built-in model, three methods, two patterns: a table in minutes
  python -m oneshot.run --model meta-llama/Llama-3.1-8B --method sparsegpt --pattern 2:4 --calibration c4 \\
      --evaluate wikitext2 --save llama-2of4 --device cuda
      a checkpoint that from_pretrained loads, and oneshot.verify proves
  python -m oneshot.run --model ./my-model --calibration my.jsonl --column text --evaluate held_out.txt

The flags of wanda's main.py (--prune_method --sparsity_ratio --sparsity_type --save --save_model --use_variant ...) work
with their meaning there.
"""

WANDA = {  # flag of wanda's main.py: what it does there
    "prune_method": "magnitude, wanda, sparsegpt",
    "sparsity_ratio": "share of zeros",
    "sparsity_type": "unstructured, 2:4, 4:8",
    "save_model": "folder for the pruned model (--save is then the folder for results)",
}


def parser():
    """The argument parser: RunConfig's fields, every solver's, and wanda's names."""
    p = argparse.ArgumentParser(
        prog="python -m oneshot.run", usage="python -m oneshot.run [flags]", formatter_class=Formatter, epilog=EXAMPLES, allow_abbrev=False,
        description="Prune a pretrained language model once, from a few calibration samples, without training; "
                    "measure what that cost.")
    groups = {}
    for f in fields(RunConfig):
        if f.metadata:
            title = f.metadata["group"]
            groups.setdefault(title, p.add_argument_group(title))
            add_flag(groups[title], f.name, f)
    found = solvers.names()
    for name in found["solver"] + found["refiner"]:
        module = solvers.module(name)
        group = p.add_argument_group(f"--method {name}", module.__doc__.strip().split("\n")[0])
        for f in fields(module.Config):
            add_flag(group, f"{name}.{f.name}", f)
    wanda = p.add_argument_group("wanda's main.py")
    for name, text in WANDA.items():
        wanda.add_argument(f"--{name}", help=text, type=float if name == "sparsity_ratio" else str)
    wanda.add_argument("--use_variant", action="store_true", help="as --wanda.use-variant")
    return p


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Prints defaults where there are any worth printing."""

    def _get_help_string(self, action):
        shown = action.default not in (None, argparse.SUPPRESS, False, True)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


def add_flag(group, name, f):
    """One dataclass field as a flag; a bool's flag turns it from its default."""
    option, help_text = name.replace("_", "-"), f.metadata["help"]
    if isinstance(f.default, bool):
        group.add_argument(f"--no-{option}" if f.default else f"--{option}", dest=name, default=f.default,
                           action="store_false" if f.default else "store_true", help=("not: " if f.default else "") + help_text)
        return
    kind = next((k for k in (int, float) if f.type == k or f.type == k | None), str)
    choices = f.metadata.get("choices")
    group.add_argument(f"--{option}", dest=name, default=f.default, type=kind, choices=choices, help=help_text,
                       metavar=None if choices else option.rsplit(".", 1)[-1].upper())


def normalise(argv, known):
    """`--a_b` as `--a-b` where only the latter is a flag."""
    out = []
    for arg in argv:
        name, eq, value = arg.partition("=")
        dashed = name.replace("_", "-")
        out.append(dashed + eq + value if name.startswith("--") and name not in known and dashed in known else arg)
    return out


def parse(argv=None):
    """The runs a command line asks for: RunConfigs, the dense one first.

    Raises ValueError naming the flag; argparse itself exits with code 2 on unknown flags.
    """
    p = parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    given = apply_wanda(vars(p.parse_args(normalise(argv, p._option_string_actions))))
    chosen = {f.name: given[f.name] for f in fields(RunConfig) if f.name in given}
    methods, texts = split(given, "method"), split(given, "pattern")
    runs = [dense_run(chosen)] if given["dense"] or "dense" in methods else []
    methods = [m for m in methods if m != "dense"]
    for text in texts:
        for method in methods:
            save = chosen["save"]
            if save and len(methods) * len(texts) > 1:
                save = str(Path(save) / f"{method}-{text.replace(':', 'of')}")
            configs = solvers.configure(method, given)
            runs.append(RunConfig(**{**chosen, "method": method, "pattern": text, "save": save, "solver": configs}))
    return runs


def dense_run(chosen):
    """The dense model's row: the same road without pruning."""
    return RunConfig(**{**chosen, "method": "dense", "pattern": "dense", "save": None})


def split(given, name):
    parts = [part.strip() for part in given[name].split(",") if part.strip()]
    if not parts:
        raise ValueError(f"--{name}: nothing given")
    return list(dict.fromkeys(parts))


def apply_wanda(given):
    """Translate the flags of wanda's main.py into ours."""
    method = given.pop("prune_method")
    ratio, kind, save_model = (given.pop(k) for k in ("sparsity_ratio", "sparsity_type", "save_model"))
    if given.pop("use_variant"):
        given["wanda.use_variant"] = True
    if method is None:
        for name, value in (("sparsity_ratio", ratio), ("sparsity_type", kind), ("save_model", save_model)):
            if value is not None:
                raise ValueError(f"--{name}: a flag of wanda's main.py, it goes with --prune_method; "
                                 "otherwise use --pattern and --save")
        return given
    if method not in ("magnitude", "wanda", "sparsegpt"):
        raise ValueError(f"--prune_method {method}: oneshot knows magnitude, wanda and sparsegpt under this flag")
    defaults = {f.name: f.default for f in fields(RunConfig)}
    given["method"], given["dense"] = method, False
    if kind in (None, "unstructured"):
        given["pattern"] = f"{ratio or 0:g}"
    elif ratio not in (None, 0.5) and kind in ("2:4", "4:8"):
        raise ValueError(f"--sparsity_ratio {ratio:g}: {kind} is 0.5")
    else:
        given["pattern"] = kind
    if not ratio:
        given["method"], given["dense"] = "dense", True  # wanda's main.py prunes nothing at ratio 0
    for name, there in (("calibration", "c4"), ("evaluate", "wikitext2")):
        if given[name] == defaults[name]:
            given[name] = there
    if given["save"]:
        given["results"] = given["save"]
    given["save"] = save_model
    return given
