"""Two versions of this program at the same command, in turn: medians of time, by phase of the record, and memory.

    python scripts/bench/versions.py --before 462eb7c      # results/bench/versions.json and .md; a quarter of an hour
    python scripts/bench/versions.py --page                # only the page, from the JSON
    python scripts/bench/versions.py --before HEAD --toy --out DIR    # for the tests

Each version is a copy of its commit in --work, run by this Python. SparseGPT at 2:4 on SmolLM2, 32 windows of 512
tokens of C4, and perplexity on 16 windows of 512 of WikiText-2; one process a run.

    solve             choosing and setting weights
    collect, replay   all that goes through the blocks: inputs with their Grams, then outputs
    other             between these: layer errors, proofs, saving
    process           from its start to its end, imports and loading included; processor: of all its threads
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from common import written
from tqdm import tqdm

from oneshot.report import table
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text

ROOT = Path(__file__).parents[2]
PARTS = ("collect", "solve", "replay")
LESS_MEMORY = 2.0  # asked: peak memory at least halved; of the time no figure was asked
TOY = ["--model", "demo", "--nsamples", "4", "--seqlen", "64", "--evaluate", "builtin:prose", "--eval-seqlen", "64",
       "--eval-windows", "2"]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(arguments(argv)))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/versions.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--before", help="a commit; needed unless --page")
    p.add_argument("--after", default="HEAD", help="a commit")
    p.add_argument("--rounds", type=int, default=3, help="the median is kept")
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of data/")
    p.add_argument("--work", type=Path, default=Path("build/versions"), help="the copies")
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="the demo model, a few tokens")
    p.add_argument("--page", action="store_true", help="measure nothing: the page of the JSON in --out")
    return p.parse_args(argv)


def work(args: argparse.Namespace) -> None:
    """Measure both versions and write both files, or with --page the page alone."""
    file = args.out / "versions.json"
    if args.page and not file.is_file():
        raise ValueError(f"--page: {args.out} holds no versions.json yet; measure first")
    found = json.loads(file.read_text(encoding="utf-8")) if args.page else measured(args)
    write_json(found, file)
    write_text(page(found), args.out / "versions.md")
    print(page(found), end="")


def measured(args: argparse.Namespace) -> dict:
    """{"commits", "runs", "flags", "environment"} of both versions. Raises ValueError naming the flag."""
    if not args.before:
        raise ValueError("--before: give the commit to compare with, or --page")
    data = args.shared.absolute() / "data"
    flags = TOY if args.toy else [
        "--model", "smollm2", "--calibration", str(data / "c4_sample.jsonl"), "--nsamples", "32", "--seqlen", "512",
        "--evaluate", str(data / "wikitext2_test.txt"), "--eval-seqlen", "512", "--eval-windows", "16"]
    trees = {name: copy_of(flag, commit, args.work) for name, flag, commit in (
        ("before", "--before", args.before), ("after", "--after", args.after))}
    runs: dict[str, list[dict]] = {name: [] for name in trees}
    for name in tqdm([*trees] * args.rounds, unit="run"):
        runs[name].append(once(trees[name], flags))
    return {"commits": {name: tree.name for name, tree in trees.items()}, "runs": runs, "flags": flags,
            "environment": environment.environment("cpu")}


def copy_of(flag: str, commit: str, folder: Path) -> Path:
    """A folder with the files of a commit, made where there is none yet. Raises ValueError naming the flag."""
    def git(*words: str) -> bytes:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
        if done.returncode:
            raise ValueError(f"{flag} {commit}: {done.stderr.decode().strip().splitlines()[0]}")
        return done.stdout
    name = git("rev-parse", "--short=10", f"{commit}^{{commit}}").decode().strip()
    tree = (folder / name).absolute()
    if not tree.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            with tarfile.open(fileobj=io.BytesIO(git("archive", name))) as tar:
                tar.extractall(Path(new) / "files", filter="data")
            (Path(new) / "files").rename(tree)
    return tree


def once(tree: Path, flags: list[str]) -> dict:
    """Seconds by phase, peak memory in bytes and perplexity of one run. Raises ValueError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "oneshot.run", *flags, "--method", "sparsegpt", "--pattern", "2:4",
                   "--no-dense", "--no-progress", "--device", "cpu", "--results", folder]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=tree, env=os.environ | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}"},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        if status:
            raise ValueError(f"{tree}: exit code {os.waitstatus_to_exitcode(status)} of {' '.join(command)}")
        [record] = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
    parts = {part: sum(block["seconds"][part] for block in record["blocks"]) for part in PARTS}
    return {**parts, "other": record["seconds"]["prune"] - sum(parts.values()), "prune": record["seconds"]["prune"],
            "evaluate": record["seconds"]["evaluate"], "process": wall, "processor": used.ru_utime + used.ru_stime,
            "peak_bytes": 1024 * used.ru_maxrss, "ppl": next(iter(record["metrics"].values()))}


def page(found: dict) -> str:
    """The table: medians and their ratio."""
    runs = found["runs"]
    kinds = [kind for kind in runs["before"][0] if kind not in ("peak_bytes", "ppl")]
    rows = [(f"{kind}, s", 1.0, kind, ".2f") for kind in kinds] + [("peak memory, GiB", 2**30, "peak_bytes", ".2f"),
                                                                    ("ppl", 1.0, "ppl", ".2f")]
    body = []
    for label, unit, kind, form in rows:
        before, after = (statistics.median(run[kind] for run in runs[name]) / unit for name in ("before", "after"))
        body.append([label, f"{before:{form}}", f"{after:{form}}", f"{before / after:.2f}" if after else "-"])
    told = (f"Medians of {len(runs['before'])} runs in turn of `oneshot prune --method sparsegpt --pattern 2:4` at "
            f"commit {found['commits']['before']} and at {found['commits']['after']}.")
    about = written("versions.py", found["environment"])
    less = statistics.median(r["peak_bytes"] for r in runs["before"]) / statistics.median(
        r["peak_bytes"] for r in runs["after"])
    kept = "met" if less >= LESS_MEMORY else "MISSED"
    verdict = (f"- peak memory: {less:.2f} times less, asked {LESS_MEMORY:g}: {kept}\n"
               "- time: no figure was asked; the table says what came of it\n")
    return "\n".join(["# Two versions of this program\n", f"{about}\n", f"{told}\n",
                      table.render(["", "before", "after", "ratio"], body, "markdown", text={""}), verdict])


if __name__ == "__main__":
    sys.exit(main())
