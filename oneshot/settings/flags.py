"""The command line: flags derived from what the stages declare (known.py), and Wanda's flags, translated.

`--a-b` and `--a_b` are the same flag. The flags of a part (solver, refiner, allocation, healing method) have its name
in front: `--sparsegpt.damping 0.1`.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import heal, quantise
from ..prune import allocate, solvers
from ..quantise.grids import widths
from ..runtime.command import Parser
from ..runtime.flag import listed
from ..structured.options import shrinks
from . import presets, values
from .config import RunConfig
from .known import PACKAGES, Known, known, parts, todays_names
from .wanda_flags import WANDA, apply_wanda

EXAMPLES = """examples:
  oneshot prune
      the built-in model, three methods, two patterns: a table in minutes
  oneshot prune --model meta-llama/Llama-3.1-8B --method sparsegpt --pattern 2:4 --calibration c4 \\
      --evaluate wikitext2 --save llama-2of4
      saves a checkpoint that from_pretrained loads and `oneshot verify` checks
  oneshot prune --model ./my-model --calibration my.jsonl --column text --evaluate held_out.txt
  torchrun --nproc-per-node 8 -m oneshot prune ...
      eight processes share the windows and the linears; --heal distil, --shrink and all measurements but perplexity
      run in the first alone

The flags of Wanda's main.py (--prune_method --sparsity_ratio --sparsity_type --save --save_model --use_variant ...)
work as they do there.
"""


@functools.cache
def parser() -> Parser:
    """The argument parser of `oneshot prune`: RunConfig's flags, those of every part, and Wanda's."""
    p = Parser(prog="oneshot prune", usage="oneshot prune [flags]", formatter_class=Formatter, epilog=EXAMPLES,
               allow_abbrev=False,
               description="Prune a pretrained language model in one shot, from a few calibration samples, and measure "
                           "exactly what that cost. Without flags: the demo model, in minutes.")
    sections: dict[str, Any] = {}
    for flag in known().values():
        if not flag.chosen_by:
            title = flag.metadata["section"]
            sections.setdefault(title, p.add_argument_group(title))
            add_flag(sections[title], flag)
    p.add_argument_group("--method best", presets.explain())
    for chosen_by, package in PACKAGES.items():
        for name in parts(package):
            group = p.add_argument_group(f"--{chosen_by} {name}", package.module(name).__doc__.strip().split("\n")[0])
            for flag in known().values():
                if flag.chosen_by and flag.name.partition(".")[0] == name:
                    add_flag(group, flag)
    wanda = p.add_argument_group("Wanda's main.py")
    for name, text in WANDA.items():
        wanda.add_argument(f"--{name}", help=text, type=float if name == "sparsity_ratio" else str)
    wanda.add_argument("--use_variant", action="store_true", help="as --wanda.use-variant")
    wanda.add_argument("--eval_zero_shot", action="store_true", help="as --tasks zeroshot7")
    return p


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help text of every flag that has one worth printing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default not in (None, argparse.SUPPRESS, False, True)
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


class Lines(argparse.Action):
    """A flag that may be given several times: its values, one a line."""

    def __call__(self, _: Any, found: argparse.Namespace, value: str, option: str | None = None) -> None:
        before = getattr(found, self.dest, None)
        setattr(found, self.dest, f"{before}\n{value}" if isinstance(before, str) else value)


def add_flag(group: Any, flag: Known) -> None:
    """Add one flag to an argument group of the parser. A switch inverts its default."""
    help_text, choices = flag.metadata["help"], flag.metadata.get("choices")
    if flag.is_switch:
        group.add_argument(*flag.options, dest=flag.name, default=flag.default,
                           help=f"do not {help_text}" if flag.default else help_text,
                           action="store_false" if flag.default else "store_true")
        return
    several = {"action": Lines} if flag.metadata.get("repeated") else {}
    metavar = None if choices else flag.option.removeprefix("--").rsplit(".", 1)[-1].upper()
    group.add_argument(*flag.options, dest=flag.name, default=flag.default, type=flag.type, choices=choices,
                       help=help_text, metavar=metavar, **several)


def normalise(argv: Sequence[str], options: Iterable[str]) -> list[str]:
    """The command line with every flag spelt as in `options`, whether written with underscores or dashes."""
    spelt = {name.replace("_", "-"): name for name in options}
    words = [arg.partition("=") for arg in argv]
    return [spelt.get(name.replace("_", "-"), name) + eq + value if name.startswith("--") else name + eq + value
            for name, eq, value in words]


def read(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """{flag: value} of the flags given on a command line, Wanda's translated. Raises ValueError naming the flag.

    argv: None means sys.argv.
    """
    p = parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    given = p.given(normalise(argv, p.options))
    wanda = "prune_method" in given
    given = apply_wanda(given)
    if "save" in given and not prunes(given):
        flag = "--save_model" if wanda else "--save"
        raise ValueError(f"{flag} {given['save']}: nothing is pruned, so there is nothing to write; give a --method")
    return given


def prunes(given: dict[str, Any]) -> bool:
    """Whether any of the given methods prunes, or rounds."""
    return given.get("quantise") is not None or any(method != "dense" for method in split(given, "method"))


def parse(argv: Sequence[str] | None = None) -> list[RunConfig]:
    """The runs that a command line asks for, the dense one last, so that errors in the others show early.

    Raises ValueError naming the flag.
    """
    return expand(read(argv))


def expand(given: dict[str, Any]) -> list[RunConfig]:
    """The runs that {flag: value} asks for; see `parse`."""
    given = values.plain(todays_names(given))
    chosen = {f.name: given[f.name] for f in fields(RunConfig) if f.name in given}
    methods, texts = split(given, "method"), split(given, "pattern")
    rounds = "dense" in methods and given.get("quantise") is not None
    wanted = given.get("dense", True) or ("dense" in methods and not rounds)
    dense = [row(chosen, "dense", "dense")] if wanted else []
    methods = [m for m in methods if m != "dense"]
    if "keep" in methods and "pattern" not in given:
        raise ValueError("--method keep: give the --pattern that the model has, such as 2:4")
    presets.check_effort(methods, given)
    asked = {method: presets.expand(method, with_fold(method, given)) for method in methods}
    check_parts(asked, given)
    runs = [({**asked[method], "pattern": text}, f"{method}-{text.replace(':', 'of')}")
            for text in texts for method in methods] + ([(rounded_dense(given), "dense")] if rounds else [])
    runs = [build({**own, "save": str(Path(own["save"]) / folder) if own.get("save") and len(runs) > 1
                   else own.get("save")}) for own, folder in runs]
    rounded = [row(chosen, "rtn", width) for width in widths(texts)] if given.get("quantised") else []
    return runs + rounded + dense


def rounded_dense(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of `--method dense --quantise ...`: nothing goes, all is rounded."""
    return with_fold("keep", {**given, "method": "keep", "pattern": "dense"})


def with_fold(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run with `--method method`, with `--heal fold` where the model gets smaller by a method that sets
    new values, unless given, or `method` is a preset, which has its own."""
    by = given.get("shrink_method", known()["shrink_method"].default)
    folds = shrinks(given) and any(m.updates for m in solvers.chain(by))
    return {"heal": "fold", **given} if folds and method not in presets.NAMES else given


def row(chosen: dict[str, Any], method: str, pattern: str) -> RunConfig:
    """A run for comparison, with the same settings but no pruning: the dense model, or all linears rounded."""
    return RunConfig(**{**chosen, "method": method, "pattern": pattern, "save": None, "quantise": None,
                        "scale_columns": False})


def build(given: dict[str, Any]) -> RunConfig:
    """The RunConfig for {flag: value}; a part's flags ("sparsegpt.damping") go into that part's Config."""
    cfg = RunConfig(**{f.name: given[f.name] for f in fields(RunConfig) if f.name in given})
    chains = [*solvers.chain(cfg.method), *(solvers.chain(cfg.shrink_method) if cfg.shrinks and cfg.prunes else ())]
    modules = {"solver": chains, "healing": [heal.module(name) for name in cfg.heals],
               "allocation": [allocate.module(cfg.allocate)],
               "rounding": [quantise.module(cfg.quantiser)] if cfg.quantise is not None else []}
    heal.check_order(modules["healing"], cfg.heal)
    return replace(cfg, **{part: {solvers.short(m): configured(m, given) for m in found}
                           for part, found in modules.items()})


def configured(module: ModuleType, given: dict[str, Any]) -> Any:
    """The Config of a part's module, with the values that are given as "part.field"."""
    name = solvers.short(module)
    return module.Config(**{f.name: given[f"{name}.{f.name}"] for f in fields(module.Config)
                            if f"{name}.{f.name}" in given})


def check_parts(asked: dict[str, dict[str, Any]], given: dict[str, Any]) -> None:
    """Raise ValueError naming a flag of a part that no run uses, as it would have no effect.

    asked: {method: all flags of its run}. given: the flags that the user gave.
    """
    used = {solvers.short(m) for own in asked.values() for m in solvers.chain(own["method"])}
    used |= {solvers.short(m) for own in asked.values() if shrinks(own)
             for m in solvers.chain(own.get("shrink_method", known()["shrink_method"].default))}
    used |= {name for own in asked.values() for name in (*listed(own.get("heal", "none")), own.get("allocate"))}
    used |= {given.get("quantiser", known()["quantiser"].default)} if given.get("quantise") is not None else set()
    for name in given:
        part, dot, _ = name.partition(".")
        if dot and part not in used:
            chosen_by = known()[name].chosen_by
            flag = f"method {','.join(asked) or 'dense'}" if chosen_by == "method" else chosen_by
            raise ValueError(f"{known()[name].option}: --{flag} does not use {part}; add it there or leave the flag "
                             "out")


def split(given: dict[str, Any], name: str) -> list[str]:
    """The entries of the comma-separated flag `name`, each once. Raises ValueError if there are none."""
    entries = [entry.strip() for entry in given.get(name, known()[name].default).split(",") if entry.strip()]
    if not entries:
        raise ValueError(f"--{name}: nothing given")
    return list(dict.fromkeys(entries))
