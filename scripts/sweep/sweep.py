"""A sweep: models x methods x patterns x seeds, one record a run, the dense model once each.

    python scripts/sweep.py scripts/sweeps/demo.yaml --list         # what is finished, failed, waiting
    python scripts/sweep.py scripts/sweeps/demo.yaml --workers 4    # four processes, sharing the GPUs out
    python scripts/sweep.py scripts/sweeps/demo.yaml --shard 2/8    # the second of eight machines

The file is YAML. Beside the four lists it takes every flag of `python -m oneshot.run` by its name; what a model gives
goes before what stands on top. Paths are relative to where the command is given.

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
from pathlib import Path

import _sweep_index as index
import yaml
from _sweep_workers import attempts, failure_file

from oneshot import report
from oneshot.pipeline import checks, run
from oneshot.report import tables, task_table
from oneshot.runtime import environment
from oneshot.settings import flags

LISTS = {"methods": "method", "patterns": "pattern", "seeds": "seed"}
OWN = {"results": "give --results to the sweep", "save": "a sweep keeps records; save a model with oneshot.run",
       "overwrite": "a sweep keeps records", "progress": "a sweep shows its own progress",
       **{flag: f"write {name}: [...]" for name, flag in LISTS.items()}}


def main(argv=None):
    """Exit code: see above."""
    try:
        args = arguments(argv)
        configs = share(expand(load(args.file), args.file, args.results), *args.shard)
        environment.check_writable(args.results, "--results")
        for cfg in configs:
            checks.check_devices(cfg)
    except (ValueError, OSError) as error:
        return run.fail(run.one_line(error))
    try:
        return listing(configs) if args.list else sweep(configs, args.workers)
    except KeyboardInterrupt:
        run.fail("interrupted; the same command continues with the run that was cut off")
        return 130


def arguments(argv):
    p = flags.Parser(prog="python scripts/sweep.py", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, help="the sweep, as YAML")
    p.add_argument("--workers", type=int, default=1, help="runs at a time; 0: in this process (default: 1)")
    p.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="only the I-th of N equal shares")
    p.add_argument("--results", type=Path, default=Path("results/runs"), help="folder of the records")
    p.add_argument("--list", action="store_true", help="run nothing, say what is finished")
    args = p.parse_args(argv)
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: give the number of processes")
    return args


def shard(text):
    """(i, n) of "i/n"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: give I/N with I from 1 to N, such as 1/4")
    return int(match[1]), int(match[2])


def share(configs, i, n):
    """The i-th of n shares; dealt out in turn, so that every share has some of each model."""
    return configs[i - 1::n]


class Loader(yaml.BaseLoader):
    """Every value as it is written: elsewhere in YAML 2:4 is the number 124. A key given twice is refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


def load(file):
    """The YAML mapping in a file. Raises ValueError naming the file."""
    try:
        spec = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); give a sweep's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no valid YAML ({run.one_line(error)})") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("models"), list) or not spec["models"]:
        raise ValueError(f"{file}: needs a list `models:` of names or mappings (--help has an example)")
    return spec


def expand(spec, file, results):
    """The RunConfigs of a sweep, each once, in a fixed order. Raises ValueError naming file, model and flag."""
    shared = {key: value for key, value in spec.items() if key != "models"}
    found = {}
    for place, entry in enumerate(spec["models"], 1):
        settings = shared | (entry if isinstance(entry, dict) else {"model": entry})
        try:
            for cfg in configs_of(settings, results):
                found.setdefault(json.dumps(cfg.settings(), sort_keys=True, default=str), cfg)
        except ValueError as error:
            raise ValueError(f"{file}, model {place} ({settings.get('model')}): {error}") from None
    return list(found.values())


def configs_of(settings, results):
    """The RunConfigs of one model: what the command line would make of the same settings, for each seed."""
    if "model" not in settings:
        raise ValueError("`model:` is missing")
    own = {key.replace("-", "_"): value for key, value in settings.items()}
    for key in own.keys() & OWN.keys():
        raise ValueError(f"{key}: {OWN[key]}")
    seeds = several("seeds", own.pop("seeds", ["0"]))
    argv = ["--results", str(results), "--no-progress"]
    switches = {a.dest: a for a in flags.parser()._actions if a.nargs == 0}
    for key, value in own.items():
        if key in LISTS:
            argv += [f"--{LISTS[key]}", ",".join(several(key, value))]
        else:
            argv += flag(key, value, switches.get(key))
    return [cfg for seed in seeds for cfg in flags.parse([*argv, "--seed", seed])]


def several(name, value):
    """The entries of one of the lists; a single one may stand alone."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"{name}: give a list such as [{', '.join({'seeds': '012'}.get(name, 'ab'))}]")
    return values


def flag(name, value, switch=None):
    """One setting as words of the command line. switch: its argparse action, where it takes no value."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = ",".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{name}: give one value, not a mapping")
    if value in ("", "null", "~"):
        return []
    if switch is None:
        return [f"--{name}={value}"]
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{name}: {value}: give true or false")
    return [switch.option_strings[0]] if (value.lower() == "true") == switch.const else []


def sweep(configs, workers):
    """Make the runs that are not finished; the table of all. Exit code."""
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


def line(cfg, record):
    """What came of one run."""
    what = named(cfg)
    metrics = ", ".join(f"{name} {report.number(x)}" for name, x in record["metrics"].items())
    told = f"FAILED ({record['error']})" if record["status"] != "finished" else metrics or "done"
    return f"{what}: {told} ({record['seconds']['total']:.0f} s)"


def left_of(spent, n, of):
    """How long the rest takes, at the pace so far."""
    seconds = spent / n * (of - n)
    amount = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"
    return f"about {amount} left" if n < of else "all done"


def named(cfg):
    return f"{Path(cfg.model).name} {cfg.method}" + f" {cfg.pattern} seed {cfg.seed}" * (cfg.method != "dense")


def listing(configs):
    """Print the state of every run, loading no model."""
    for cfg in configs:
        state = index.finished(cfg) or ("failed" if failure_file(cfg).is_file() else "to do")
        print(f"{named(cfg)}: {state}")
    return 0


def say(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
