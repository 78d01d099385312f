"""`oneshot heal`: train the weights that a pruned or smaller model has left, on text, while every zero stays zero.

    oneshot heal PRUNED --data c4 --tokens 5M --save DIR

is `oneshot prune --model PRUNED --method keep --heal full --heal-data c4 --heal-tokens 5M --save DIR`, and takes all
of its flags (`oneshot prune --help`); those that begin with `--heal-` may leave it out (not `--heal-seqlen`). The
targets are the predictions of the dense model: the one that PRUNED was made from, by its manifest, or the one that
`--teacher` names; `--loss next` needs none. A killed run continues when the same command is repeated.
With torchrun, processes share the work:

    torchrun --nproc-per-node 2 -m oneshot heal PRUNED --data c4 --tokens 5M --save DIR
"""

import argparse
import sys
from pathlib import Path

from ..checkpoint import MANIFEST, models_of, read_manifest
from ..runtime import distributed
from ..runtime.command import Parser, exit_code
from ..settings.known import known
from . import run


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code (runtime/command.py)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    asks = {"-h", "--help"} & set(argv)
    if distributed.rank():  # the first process alone reads the command line
        return 0 if asks else run.main(argv)
    if asks:
        parser().parse_args(["--help"])
    words: list[str] = []
    code = exit_code(lambda: words.extend(translated(argv)))
    return code or run.main(words)


def parser() -> Parser:
    """What `--help` shows."""
    p = Parser(prog="oneshot heal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               usage="oneshot heal PRUNED --data TEXT [--tokens N] [flags of oneshot prune]")
    p.add_argument("PRUNED", help="folder or name of the model")
    p.add_argument("--method", help="full (default) or lora")
    for flag in known().values():
        if flag.name.startswith("heal_"):
            bare = flag.option.removeprefix("--heal-")
            p.add_argument("--" + bare if bare in short() else flag.option, metavar="", help=flag.metadata["help"])
    return p


def short() -> set[str]:
    """The flags that may leave `--heal-` out, without it: not those that are flags of `oneshot prune` then."""
    names = {name.removeprefix("heal_") for name in known() if name.startswith("heal_")} - set(known())
    return {name.replace("_", "-") for name in names}


def translated(argv: list[str]) -> list[str]:
    """The command line of `oneshot prune` that does the same. Raises ValueError where the model is not named."""
    rest, own, words, leaves_out = list(argv), {}, [], short()
    if rest and not rest[0].startswith("--"):
        own["model"] = rest.pop(0)
    while rest:
        name, eq, value = rest.pop(0).partition("=")
        bare = name.removeprefix("--").replace("_", "-")
        if name.startswith("--") and bare in ("model", "method", "pattern"):
            own[bare] = value if eq or not rest else rest.pop(0)
        else:
            words.append(("--heal-" + bare if name.startswith("--") and bare in leaves_out else name) + eq + value)
    if "model" not in own:
        raise ValueError("oneshot heal: name the model first, such as: oneshot heal ./pruned --data c4 --save ./healed")
    made = made_from(own["model"])
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--heal" in given:
        raise ValueError("oneshot heal: --method says how to heal; leave --heal out")
    if "--heal-teacher" not in given and "model" in made:
        words += ["--heal-teacher", made["model"]]
    pattern = own.get("pattern", made.get("pattern", "dense"))
    if "--group" not in given and "group" in made and pattern == made["pattern"]:
        words += ["--group", made["group"]]
    return ["--model", own["model"], "--method", "keep", "--pattern", pattern, "--heal", own.get("method", "full"),
            *words]


def made_from(model: str) -> dict[str, str]:
    """By its manifest: the dense `model` that a folder was made from, and its `pattern` if that is one for all linears,
    with the comparison `group` if it has one.

    Raises ValueError where the manifest is damaged.
    """
    if not (Path(model).expanduser() / MANIFEST).is_file():
        return {}
    try:
        data = read_manifest(model)
        settings, named = data["record"]["settings"], models_of(data["record"])
        one = settings.get("allocate") == "uniform" and not settings.get("keep_dense")
        groups = {entry.get("group") for entry in data["tensors"].values()} - {None} if one else ()
        return {"model": named.get("heal_teacher") or dense_of(named["model"], model)} | (
            {"pattern": settings["pattern"]} if one else {}) | ({"group": str(*groups)} if len(groups) == 1 else {})
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{Path(model) / MANIFEST}: is damaged; `oneshot verify {model}` says more") from None


def dense_of(model: str, made: str) -> str:
    """A model, or where that is a folder of oneshot's too (not `made` itself), the dense one that it was made from."""
    if Path(model).expanduser().resolve() == Path(made).expanduser().resolve():
        return model
    return made_from(model).get("model", model)
