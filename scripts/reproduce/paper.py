"""What wanda.py, sparsegpt.py and alps.py share: a paper's numbers beside ours, row by row.

    python scripts/reproduce/wanda.py                                # every row that this machine can run
    python scripts/reproduce/wanda.py --list                         # what would run, and why the rest would not
    python scripts/reproduce/wanda.py --only 7b 2:4                  # rows whose name has all of these words
    python scripts/reproduce/wanda.py --models /data/models --calibration c4.jsonl --evaluate wikitext2_test.txt

Models come from --models DIR/<last part of the hub's name>, else from the hub or its cache. Flags not listed here go to
`oneshot prune` as they are. Records go to --results; a finished run is not repeated. A row that cannot be run says why:
no such method here, not on this machine and no network, not enough memory, or hours of CPU time without --slow.
Exit code: 0, however many rows ran; 2 if the command is wrong.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from oneshot import models, report
from oneshot.data import sources
from oneshot.pipeline import checks
from oneshot.pipeline.attempt import attempt
from oneshot.prune import solvers
from oneshot.report import table
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.settings import RunConfig, parse

SLOW = 1e9  # parameters from which a model takes hours on a CPU
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A model of the hub, as large as its configuration says."""

    name: str
    parameters: float
    hidden: int
    widest: int  # inputs of the widest linear
    blocks: int


@dataclass(frozen=True)
class Paper:
    """A published table and how its numbers were measured.

    perplexity: {model name: {method: {pattern: value or (mean, standard deviation over seeds)}}}; dense: the key
    "dense" instead of a method, with the value. seeds: how many the paper averaged over. flags: for `oneshot prune`.
    """

    title: str
    source: str
    window: int
    models: tuple[Model, ...]
    perplexity: dict[str, dict]
    seeds: int = 1
    flags: dict = field(default_factory=lambda: {"calibration": "c4", "evaluate": "wikitext2", "nsamples": 128})


@dataclass(frozen=True)
class Row:
    """One published number."""

    model: Model
    method: str
    pattern: str
    published: float
    spread: float | None

    def __str__(self):
        return f"{self.model.name} {self.method}" + f" {self.pattern}" * (self.method != "dense")


def rows_of(paper: Paper) -> list[Row]:
    """The paper's numbers, one by one."""
    found = []
    for model in paper.models:
        for method, cells in paper.perplexity[model.name].items():
            for pattern, value in (cells if isinstance(cells, dict) else {"dense": cells}).items():
                mean, spread = value if isinstance(value, tuple) else (value, None)
                found.append(Row(model, method, pattern, mean, spread))
    return found


def main(paper: Paper, argv: list[str] | None = None) -> int:
    """Exit code: see above."""
    return exit_code(lambda: work(paper, *arguments(paper, argv)), interrupted=lambda: "the same command continues")


def work(paper: Paper, args: argparse.Namespace, flags: list[str]) -> None:
    """Run what can be run and print the table. flags: those for `oneshot prune`."""
    rows = chosen(rows_of(paper), args.only)
    configs = {row: configure(paper, row, args, flags) for row in rows}
    environment.check_writable(args.results, "--results")
    models.quiet()
    lines = []
    for row in rows:
        lines.append(measure(row, configs[row], args))
        print(f"[{len(lines)}/{len(rows)}] {row}: {lines[-1][-1] or lines[-1][-3]}", file=sys.stderr, flush=True)
    print(beside(paper, rows, lines))


def arguments(paper: Paper, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, those for `oneshot prune`)."""
    p = Parser(description=f"{paper.title} ({paper.source})\n\n{__doc__}", allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", metavar="WORD", default=[], help="rows whose name has all of these words")
    p.add_argument("--list", action="store_true", help="run nothing, say what would be")
    p.add_argument("--seeds", type=int, default=paper.seeds, help=f"how many (default: the paper's {paper.seeds})")
    p.add_argument("--models", type=Path, help="folder of local models, named as on the hub")
    p.add_argument("--slow", action="store_true", help="also run models above 1e9 parameters on a CPU")
    p.add_argument("--results", type=Path, default=Path("results/runs"), help="folder of the records")
    args, rest = p.parse_known_args(argv)
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: at least 1")
    if args.models and not args.models.is_dir():
        raise ValueError(f"--models {args.models}: no such folder")
    return args, rest


def chosen(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """The rows whose names have all the words. Raises ValueError when there is none."""
    found = [row for row in rows if all(word.lower() in str(row).lower() for word in words)]
    if not found:
        raise ValueError(f"--only {' '.join(words)}: no row has all of these words; a row's name is like `{rows[0]}`")
    return found


def configure(paper: Paper, row: Row, args: argparse.Namespace, flags: list[str]) -> list[RunConfig] | None:
    """The row's RunConfigs, one a seed; None when its method is not built here. Raises ValueError naming a flag."""
    known = {"dense", *solvers.names()["solver"], *solvers.names()["refiner"]}
    if not known.issuperset(row.method.split("+")):
        return None
    local = args.models / row.model.name.rsplit("/", 1)[-1] if args.models else None
    model = str(local) if local and local.is_dir() else row.model.name
    given = {name.split("=")[0].replace("_", "-") for name in flags if name.startswith("--")}
    fixed = {"model": model, "method": row.method, "pattern": row.pattern, "seqlen": paper.window}
    for name in (*fixed, "seed", "save"):
        if f"--{name}" in given:
            raise ValueError(f"--{name}: follows from the paper's row; --only and --seeds choose among them")
    ours = {name: value for name, value in paper.flags.items() if f"--{name}" not in given} | fixed
    argv = [f"--{name}={value}" for name, value in ours.items()]
    argv += [*flags, "--no-dense", "--no-progress", f"--results={args.results}"]
    seeds = 1 if row.method == "dense" else args.seeds
    configs = [cfg for seed in range(seeds) for cfg in parse([*argv, f"--seed={seed}"])]
    checks.check_devices(configs[0])
    return configs


def measure(row: Row, configs: list[RunConfig] | None, args: argparse.Namespace) -> list[str]:
    """[published, ours, difference, note] of one row, as texts."""
    published = number(row.published, row.spread)
    why = obstacle(row, configs, args)
    if why or args.list:
        return [published, "-", "-", f"not run: {why}" if why else "can be run"]
    records = [attempt(cfg) for cfg in configs]
    if failed := [r for r in records if r["status"] != "finished"]:
        return [published, "-", "-", f"not run: {failed[0]['error']}"]
    values = [next(x for name, x in r["metrics"].items() if name.endswith("/ppl")) for r in records]
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    texts = sorted({f"{name} on {cfg_text}" for name, cfg_text in strangers(configs[0])})
    note = "; ".join([*([f"{len(values)} seeds"] if len(values) > 1 else []), *texts])
    return [published, number(mean, spread), f"{100 * (mean / row.published - 1):+.1f} %", note]


def strangers(cfg: RunConfig) -> list[tuple[str, str]]:
    """Texts that are not the papers', as (use, name): the reader must know."""
    used = {"measured": cfg.evaluate} | ({} if cfg.method == "dense" else {"calibrated": cfg.calibration})
    return [(use, Path(text).name) for use, text in used.items() if text not in ("c4", "wikitext2")]


def number(mean: float, spread: float | None) -> str:
    """Mean and spread as text."""
    return report.number(mean) + (f" ± {spread:.2g}" if spread is not None else "")


def beside(paper: Paper, rows: Sequence[Row], lines: Sequence[list[str]]) -> str:
    """The paper's table with ours beside it, as markdown."""
    head = ["model", "method", "pattern", "published", "ours", "difference", "note"]
    body = [[row.model.name, row.method, row.pattern, *line] for row, line in zip(rows, lines, strict=True)]
    text = table.render(head, body, "markdown", text={"model", "method", "pattern", "note"})
    ran = sum(line[1] != "-" for line in lines)
    return (f"{paper.title} ({paper.source}). WikiText-2 perplexity @{paper.window}; "
            f"{ran} of {len(rows)} rows measured here.\n\n{text}")


# ---------------------------------------------------------------- what stands in the way

def obstacle(row: Row, configs: list[RunConfig] | None, args: argparse.Namespace) -> str | None:
    """Why a row cannot be run here, found without loading anything; None when nothing is known to hinder it."""
    if configs is None:
        return f"no method {row.method} in this version"
    cfg = configs[0]
    texts = cfg.evaluations + [cfg.calibration] * (cfg.method != "dense")
    missing = [] if Path(cfg.model).is_dir() else [out_of_reach(cfg.model, "model")]
    missing += [out_of_reach(sources.HUB_SETS[text].repo, "dataset") for text in texts if text in sources.HUB_SETS]
    if any(missing):
        return next(filter(None, missing))
    if cfg.device == "cpu" and row.model.parameters > SLOW and not args.slow:
        return f"{row.model.parameters:.2g} parameters take hours on a CPU; --slow to insist, or a GPU"
    return too_large(row.model, cfg)


@functools.cache
def out_of_reach(repo: str, kind: str) -> str | None:
    """Why a repository of the hub cannot be had, or None: it is in the cache, or the hub grants it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "snapshots").is_dir():
        return None
    try:
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        HfApi().auth_check(repo, repo_type=kind)
        return None
    except GatedRepoError:
        return f"{repo} is gated: ask for access on its page and log in (hf auth login)"
    except RepositoryNotFoundError:
        return f"{repo} is not on the hub, or not for this account"
    except OfflineModeIsEnabled:
        return f"{repo} is not on this machine, and HF_HUB_OFFLINE is set"
    except Exception as error:  # whatever the client raises where there is no network
        return f"{repo} is not on this machine, and the hub cannot be reached ({type(error).__name__})"


def too_large(model: Model, cfg: RunConfig) -> str | None:
    """Which memory would not do, or None. An estimate of what must be there at once, no more."""
    for place, needed in needs(model, cfg).items():
        there = free(place)
        if there is not None and needed > there:
            return (f"needs about {needed / GIB:.0f} GiB of {'memory' if place == 'cpu' else 'GPU memory'}, "
                    f"{there / GIB:.0f} GiB are free")
    return None


def needs(model: Model, cfg: RunConfig) -> dict[str, float]:
    """{device: bytes}: 16-bit weights, offloaded; where it computes, the activations between two blocks (with half as
    much again within one), one block as stored and as computed, and a Gram matrix with its factor and workspace."""
    item = 4 if cfg.device == "cpu" else 2
    tokens = cfg.nsamples * cfg.seqlen if cfg.method != "dense" else 0
    working = 1.5 * tokens * model.hidden * item + model.parameters / model.blocks * (item + 4)
    working += 3 * 4 * model.widest**2 * (cfg.method != "dense") + GIB
    weights = 2 * model.parameters
    return {"cpu": weights + working} if cfg.device == "cpu" else {"cpu": weights + GIB, cfg.device: working}


def free(device: str) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
