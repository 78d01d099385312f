"""The command line: flags made from RunConfig and every part's Config, and wanda's own flags translated.

`--a-b` and `--a_b` are the same flag. The flags of a part (solver, refiner, allocation, recovery) carry its name:
`--sparsegpt.damping 0.1`.
"""

import argparse
import difflib
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

from .. import heal
from ..prune import allocate, solvers
from . import presets
from .config import RunConfig, listed
from ..quantise.rtn import widths

EXAMPLES = """examples:
  python -m oneshot.run
      the built-in model, three methods, two patterns: a table in minutes
  python -m oneshot.run --model meta-llama/Llama-3.1-8B --method sparsegpt --pattern 2:4 --calibration c4 \\
      --evaluate wikitext2 --save llama-2of4 --device cuda
      a checkpoint that from_pretrained loads, and oneshot.verify proves
  python -m oneshot.run --model ./my-model --calibration my.jsonl --column text --evaluate held_out.txt

The flags of wanda's main.py (--prune_method --sparsity_ratio --sparsity_type --save --save_model --use_variant ...)
work with their meaning there.
"""

WANDA = {  # flag of wanda's main.py: what it does there
    "prune_method": "magnitude, wanda, sparsegpt",
    "sparsity_ratio": "share of zeros (default: 0, nothing is pruned)",
    "sparsity_type": "unstructured, 2:4, 4:8",
    "save_model": "folder for the pruned model (--save is then the folder for results)",
}
UNSET = object()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the program does. Raises ValueError."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            close = difflib.get_close_matches(unknown[1].partition("=")[0], self._option_string_actions, 1)
            message = f"{unknown[1]}: no such flag" + (f", did you mean {close[0]}?" if close else "")
        raise ValueError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def parser():
    """The argument parser: RunConfig's fields, every part's, and wanda's names."""
    p = Parser(prog="python -m oneshot.run", usage="python -m oneshot.run [flags]", formatter_class=Formatter,
               epilog=EXAMPLES, allow_abbrev=False,
               description="Prune a pretrained language model once, from a few calibration samples, without training; "
                           "measure what that cost.")
    groups = {}
    for f in fields(RunConfig):
        if f.metadata:
            title = f.metadata["group"]
            groups.setdefault(title, p.add_argument_group(title))
            add_flag(groups[title], f.name, f)
    found = solvers.names()
    p.add_argument_group("--method best", presets.explain())
    for flag, package, names in (("method", solvers, found["solver"] + found["refiner"]),
                                 ("allocate", allocate, allocate.names()), ("recover", heal, heal.names())):
        for name in names:
            module = package.module(name)
            group = p.add_argument_group(f"--{flag} {name}", module.__doc__.strip().split("\n")[0])
            for f in fields(module.Config):
                add_flag(group, f"{name}.{f.name}", f)
    wanda = p.add_argument_group("wanda's main.py")
    for name, text in WANDA.items():
        wanda.add_argument(f"--{name}", help=text, type=float if name == "sparsity_ratio" else str)
    wanda.add_argument("--use_variant", action="store_true", help="as --wanda.use-variant")
    wanda.add_argument("--eval_zero_shot", action="store_true", help="as --tasks zeroshot7")
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
        if f.default:
            option, help_text = f"no-{option}", f"do not {help_text}"
        group.add_argument(f"--{option}", dest=name, default=f.default, help=help_text,
                           action="store_false" if f.default else "store_true")
        return
    kind = next((k for k in (int, float) if f.type == k or f.type == k | None), str)
    choices = f.metadata.get("choices")
    group.add_argument(f"--{option}", dest=name, default=f.default, type=kind, choices=choices, help=help_text,
                       metavar=None if choices else option.rsplit(".", 1)[-1].upper())


def normalise(argv, known):
    """Flags as they are known, whether written with underscores or dashes."""
    spelt = {name.replace("_", "-"): name for name in known}
    parts = [arg.partition("=") for arg in argv]
    return [spelt.get(name.replace("_", "-"), name) + eq + value if name.startswith("--") else name + eq + value
            for name, eq, value in parts]


def parse(argv=None):
    """The runs a command line asks for: RunConfigs, the dense one last: what is wrong with the others shows at once.

    Raises ValueError naming the flag.
    """
    p = parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    unset = argparse.Namespace(**{a.dest: UNSET for a in p._actions if a.dest != "help"})
    read = vars(p.parse_args(normalise(argv, p._option_string_actions), unset))
    given = apply_wanda({name: value for name, value in read.items() if value is not UNSET})
    chosen = {f.name: given[f.name] for f in fields(RunConfig) if f.name in given}
    methods, texts = split(given, "method"), split(given, "pattern")
    dense = [dense_run(chosen)] if given.get("dense", True) or "dense" in methods else []
    methods = [m for m in methods if m != "dense"]
    if "save" in chosen and not methods:
        flag = "--save_model" if read["prune_method"] is not UNSET else "--save"
        raise ValueError(f"{flag} {chosen['save']}: nothing is pruned, so there is nothing to write; give a --method")
    presets.check_effort(methods, given)
    asked = {method: presets.expand(method, given) for method in methods}
    check_parts(asked, given)
    runs = []
    for text in texts:
        for method in methods:
            save = chosen.get("save")
            if save and len(methods) * len(texts) > 1:
                save = str(Path(save) / f"{method}-{text.replace(':', 'of')}")
            runs.append(build({**asked[method], "pattern": text, "save": save}))
    quantised = [rtn_run(chosen, width) for width in widths(texts)] if given.get("quantised") else []
    return runs + quantised + dense


def build(given):
    """RunConfig from flags and their values, each part's own ("sparsegpt.damping") put into that part's Config."""
    cfg = RunConfig(**{f.name: given[f.name] for f in fields(RunConfig) if f.name in given})
    parts = {"solver": solvers.chain(cfg.method), "recovery": [heal.module(name) for name in cfg.recoveries],
             "allocation": [allocate.module(cfg.allocate)]}
    if "block" in cfg.recoveries[1:]:
        raise ValueError(f"--recover {cfg.recover}: block comes first: --recover block,distil")
    return replace(cfg, **{part: {solvers.short(m): configured(m, given) for m in modules}
                           for part, modules in parts.items()})


def configured(module, given):
    """A part's Config with the values given for it as "part.field"."""
    name = solvers.short(module)
    return module.Config(**{f.name: given[f"{name}.{f.name}"] for f in fields(module.Config)
                            if f"{name}.{f.name}" in given})


def dense_run(chosen):
    """The dense model's row: the same road without pruning."""
    return RunConfig(**{**chosen, "method": "dense", "pattern": "dense", "save": None})


def rtn_run(chosen, width):
    """A row for comparison: nothing pruned, all linears rounded to integers of this width."""
    return RunConfig(**{**chosen, "method": "rtn", "pattern": width, "save": None})


def check_parts(asked, given):
    """Refuse a part's flag when no run uses that part: it would do nothing. asked: {method: all its flags}."""
    used = {solvers.short(m) for own in asked.values() for m in solvers.chain(own["method"])}
    used |= {name for own in asked.values() for name in (*listed(own.get("recover", "none")), own.get("allocate"))}
    for name in given:
        part, dot, field = name.partition(".")
        if dot and part not in used:
            flag = next((flag for flag, package in (("recover", heal), ("allocate", allocate))
                         if part in package.names()), f"method {','.join(asked) or 'dense'}")
            raise ValueError(f"--{part}.{field.replace('_', '-')}: --{flag} does not use {part}; add it there or leave "
                             "the flag out")


def split(given, name):
    parts = [part.strip() for part in given.get(name, getattr(RunConfig, name)).split(",") if part.strip()]
    if not parts:
        raise ValueError(f"--{name}: nothing given")
    return list(dict.fromkeys(parts))


def apply_wanda(given):
    """The flags given, those of wanda's main.py said in ours."""
    wanda = {name: given.pop(name) for name in WANDA if name in given}
    if given.pop("eval_zero_shot", False):
        given.setdefault("tasks", "zeroshot7")
    variant = given.pop("use_variant", False)
    if variant and wanda.get("prune_method", "wanda") == "wanda":  # main.py overlooks it with other methods
        given["wanda.use_variant"] = True
    if "prune_method" not in wanda:
        for name in wanda:
            raise ValueError(f"--{name}: a flag of wanda's main.py, it goes with --prune_method; "
                             "otherwise use --pattern and --save")
        return given
    for name in ("method", "pattern"):
        if name in given:
            raise ValueError(f"--{name}: not together with --prune_method, which is wanda's flag for the same")
    method, pattern = wanda_method(wanda["prune_method"]), wanda_pattern(**wanda)
    pruned = pattern is not None  # main.py prunes nothing at ratio 0
    if not pruned:
        given.pop("wanda.use_variant", None)
    given |= {"method": method if pruned else "dense", "pattern": pattern or "dense", "dense": not pruned}
    there = {"calibration": "c4", "evaluate": "wikitext2"}
    if "save" in given:
        there["results"] = given.pop("save")
    if "save_model" in wanda:
        given["save"] = wanda["save_model"]
    return there | given


def wanda_method(name):
    if name not in ("magnitude", "wanda", "sparsegpt"):
        raise ValueError(f"--prune_method {name}: oneshot knows magnitude, wanda and sparsegpt under this flag")
    return name


def wanda_pattern(*, sparsity_ratio=None, sparsity_type="unstructured", **others):
    """The pattern as text; None when nothing is to be pruned."""
    if sparsity_type not in ("unstructured", "2:4", "4:8"):
        raise ValueError(f"--sparsity_type {sparsity_type}: give unstructured, 2:4 or 4:8; other N:M as --pattern")
    if sparsity_type != "unstructured":
        if sparsity_ratio not in (None, 0.5):
            raise ValueError(f"--sparsity_ratio {sparsity_ratio:g}: with --sparsity_type {sparsity_type} it is 0.5")
        return sparsity_type
    if sparsity_ratio is not None and not 0 <= sparsity_ratio < 1:
        raise ValueError(f"--sparsity_ratio {sparsity_ratio:g}: give a share in [0, 1)")
    return str(sparsity_ratio) if sparsity_ratio else None
