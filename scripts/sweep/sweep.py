"""A sweep: models x methods x patterns x seeds, one record a run, the dense model once each.

    python scripts/sweep/sweep.py scripts/sweep/demo.yaml --list         # what is finished, failed, waiting
    python scripts/sweep/sweep.py scripts/sweep/demo.yaml --workers 4    # four processes, sharing the GPUs out
    python scripts/sweep/sweep.py scripts/sweep/demo.yaml --shard 2/8    # the second of eight machines

The file is YAML. Beside the four lists it takes every flag of `oneshot prune` by its name; what a model gives takes
precedence over what stands on top. Paths are relative to where the command is given.

    methods: [wanda, sparsegpt]
    patterns: [0.5, 2:4]
    seeds: [0, 1, 2]
    nsamples: 64
    models:
      - demo
      - model: meta-llama/Llama-3.1-8B
        calibration: c4
        evaluate: wikitext2
        device: cuda
        sparsegpt.damping: 0.05

Killed? The same command continues: finished runs are recognised by weights, texts and settings and not repeated; failed
ones are tried again. Exit code: 0 all finished, 1 some failed (their rows say why), 2 the command is wrong.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import index
import yaml
from workers import attempts

from oneshot import report
from oneshot.pipeline import checks
from oneshot.pipeline.attempt import failure_file
from oneshot.report import tables, task_table
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import remove_parts
from oneshot.runtime.inputs import one_line
from oneshot.settings import RunConfig, parse
from oneshot.settings.known import Known, known, todays_names

LISTS = {"methods": "method", "patterns": "pattern", "seeds": "seed"}
OWN = {"results": "give --results to the sweep", "save": "a sweep keeps records; save a model with oneshot prune",
       "overwrite": "a sweep keeps records", "progress": "a sweep shows its own progress",
       **{flag: f"write {name}: [...]" for name, flag in LISTS.items()}}


def main(argv: list[str] | None = None) -> int:
    """Exit code: see above."""
    return exit_code(lambda: work(arguments(argv)),
                     interrupted=lambda: "the same command continues with the run that was cut off")


def work(args: argparse.Namespace) -> int:
    """Make the runs of this share, or list them. Exit code: see above."""
    configs = share(expand(load(args.file), args.file, args.results, trusted(args)), *args.shard)
    environment.check_writable(args.results, "--results")
    for cfg in configs:
        checks.check_devices(cfg)
    return listing(configs) if args.list else sweep(configs, args.workers)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/sweep/sweep.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, help="the sweep, as YAML")
    p.add_argument("--workers", type=int, default=1, help="runs at a time; 0: in this process (default: 1)")
    p.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="only the I-th of N equal shares")
    p.add_argument("--results", type=Path, default=Path("results/runs"), help="folder of the records")
    p.add_argument("--list", action="store_true", help="run nothing, say what is finished")
    for flag in trusting():
        p.add_argument(flag.option, action="store_true", help=f"{flag.metadata['help']} (of all models; no YAML may)")
    args = p.parse_args(argv)
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: give the number of processes")
    return args


def trusting() -> list[Known]:
    """The flags that let code run which came with a model or with data: only a person may give them."""
    return [flag for flag in known().values() if flag.metadata.get("trusts")]


def trusted(args: argparse.Namespace) -> list[str]:
    """Those that the command line gives."""
    return [flag.option for flag in trusting() if getattr(args, flag.name)]


def shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: give I/N with I from 1 to N, such as 1/4")
    return int(match[1]), int(match[2])


def share(configs: Sequence, i: int, n: int) -> Sequence:
    """The i-th of n shares; dealt out in turn, so that every share has some of each model."""
    return configs[i - 1::n]


# ------------------------------------------------------------------ the file

class Loader(yaml.BaseLoader):
    """Every value as it is written: elsewhere in YAML 2:4 is the number 124. A key given twice is refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


def load(file: Path) -> dict:
    """The YAML mapping in a file. Raises ValueError naming the file."""
    try:
        spec = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); give a sweep's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no valid YAML ({one_line(error)})") from None
    except RecursionError:
        raise ValueError(f"{file}: no YAML that can be read (nested too deeply)") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("models"), list) or not spec["models"]:
        raise ValueError(f"{file}: needs a list `models:` of names or mappings (--help has an example)")
    return spec


def expand(spec: dict, file: Path, results: Path, more: Sequence[str] = ()) -> list[RunConfig]:
    """The RunConfigs of a sweep, each once, in a fixed order. more: further words of each run's command line.

    Raises ValueError naming file, model and flag.
    """
    shared = {key: value for key, value in spec.items() if key != "models"}
    found = {}
    for place, entry in enumerate(spec["models"], 1):
        settings = shared | (entry if isinstance(entry, dict) else {"model": entry})
        try:
            for cfg in configs_of(settings, results, more):
                found.setdefault(json.dumps(cfg.settings(), sort_keys=True, default=str), cfg)
        except ValueError as error:
            raise ValueError(f"{file}, model {place} ({settings.get('model')}): {error}") from None
    return list(found.values())


def configs_of(settings: dict, results: Path, more: Sequence[str] = ()) -> list[RunConfig]:
    """The RunConfigs of one model: what the command line would make of the same settings, for each seed."""
    if "model" not in settings:
        raise ValueError("`model:` is missing")
    if isinstance(settings["model"], list) or settings["model"] in ("", "null", "~"):
        raise ValueError("model: give a name or a folder")
    own = todays_names({key.replace("-", "_"): value for key, value in settings.items()})
    for key in own.keys() & OWN.keys():
        raise ValueError(f"{key}: {OWN[key]}")
    seeds = several("seeds", own.pop("seeds", ["0"]))
    argv = ["--results", str(results), "--no-progress", *more]
    for key, value in own.items():
        if key in LISTS:
            argv += [f"--{LISTS[key]}", ",".join(several(key, value))]
        else:
            argv += words(key, value, known().get(key))
    return [cfg for seed in seeds for cfg in parse([*argv, "--seed", seed])]


def several(name: str, value) -> list[str]:
    """The entries of one of the lists; a single one may stand alone."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"{name}: give a list such as [{', '.join({'seeds': '012'}.get(name, 'ab'))}]")
    return values


def words(name: str, value, flag: Known | None) -> list[str]:
    """One setting as words of the command line. flag: what is known of it; None of what the command line refuses."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = ",".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{name}: give one value, not a mapping")
    if value in ("", "null", "~"):
        return []
    if flag and flag.metadata.get("trusts"):
        raise ValueError(f"{name}: a file cannot say that code is to be trusted; give {flag.option} to the sweep")
    if flag is None or not flag.is_switch:
        return [f"--{name}={value}"]
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{name}: {value}: give true or false")
    return [flag.option] if (value.lower() == "true") != flag.default else []


# ------------------------------------------------------------------ the runs

def sweep(configs: Sequence[RunConfig], workers: int) -> int:
    """Make the runs that are not finished; the table of all. Exit code."""
    for folder in {Path(cfg.results) for cfg in configs}:
        remove_parts(folder)
        remove_parts(folder / index.FOLDER)
    keys = [index.key_of(cfg) for cfg in configs]
    done = {i: run_id for i, cfg in enumerate(configs) if (run_id := index.finished(cfg))}
    left = [cfg for i, cfg in enumerate(configs) if i not in done]
    say(f"{len(configs)} runs, {len(done)} finished earlier, {len(left)} to go")
    records = [report.read(Path(cfg.results) / f"{done[i]}.json") for i, cfg in enumerate(configs) if i in done]
    began, places = time.monotonic(), {id(cfg): i for i, cfg in enumerate(configs)}
    for n, (cfg, record) in enumerate(attempts(left, workers), 1):
        records.append(record)
        if record["status"] == "finished":
            index.remember(cfg, record["run_id"], keys[places[id(cfg)]])
        spent = time.monotonic() - began
        say(f"[{len(done) + n}/{len(configs)}] {line(cfg, record)}; {left_of(spent, n, len(left))}")
    print("\n".join(filter(None, [tables.table(records), task_table.table(records)])))
    failed = [r for r in records if r["status"] != "finished"]
    say(f"{len(records) - len(failed)} finished, {len(failed)} failed; records in {configs[0].results}" if configs
        else "nothing in this share")
    return 1 if failed else 0


def line(cfg: RunConfig, record: dict) -> str:
    """What came of one run."""
    what = named(cfg)
    metrics = ", ".join(f"{name} {report.number(x)}" for name, x in record["metrics"].items())
    told = f"FAILED ({record['error']})" if record["status"] != "finished" else metrics or "done"
    return f"{what}: {told} ({record['seconds']['total']:.0f} s)"


def left_of(spent: float, n: int, of: int) -> str:
    """How long the rest takes, at the pace so far."""
    seconds = spent / n * (of - n)
    amount = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"
    return f"about {amount} left" if n < of else "all done"


def named(cfg: RunConfig) -> str:
    """A run as its lines name it."""
    what = "" if cfg.method == "dense" else f" {cfg.pattern} seed {cfg.seed}"
    return f"{Path(cfg.model).name} {cfg.preset or cfg.method}{what}"


def listing(configs: Sequence[RunConfig]) -> int:
    """Print the state of every run, loading no model."""
    for cfg in configs:
        state = index.finished(cfg) or ("failed" if failure_file(cfg).is_file() else "to do")
        print(f"{named(cfg)}: {state}")
    return 0


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
