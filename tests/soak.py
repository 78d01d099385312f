"""The soak: hundreds of kills, pairs of processes, bit flips and mutations. `make soak`; a short slice is in the suite.

    python tests/soak.py [--work build/soak] [--kills 600] [--pairs 150] [--flips 600] [--mutations 1000] [--seed 0]
                         [--page results/soak.md]

No result may be wrong with exit code 0, and nothing may end in a traceback: exit code 1 then. WORK/outcomes.jsonl keeps
what is done; the same command continues it, as long as the code is the same.
"""

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / part) for part in ("tests", "kernels", "scripts/sweep"))]

import soak_cases as cases  # noqa: E402
import soak_world  # noqa: E402

from oneshot import models  # noqa: E402
from oneshot.report.table import render  # noqa: E402
from oneshot.runtime.environment import environment  # noqa: E402
from oneshot.runtime.files import write_text  # noqa: E402

GROUPS = {"kills": 600, "pairs": 150, "flips": 600, "mutations": 1000}
BAD = ("WRONG", "TRACEBACK")


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=ROOT / "build" / "soak")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--page", type=Path, help="write the counts here, as markdown")
    for group, n in GROUPS.items():
        p.add_argument(f"--{group}", type=int, default=n)
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    file = args.work / "outcomes.jsonl"
    done = read(file, args.seed)
    models.quiet()
    began = time.monotonic()
    world = soak_world.build(args.work / "world")
    print(f"{len(world.flags)} undisturbed results in {time.monotonic() - began:.0f} s; {len(done)} cases done before",
          file=sys.stderr, flush=True)
    with open(file, "a") as log:
        for group, number in waiting(args, done):
            began = time.monotonic()
            case, what, outcome = cases.one(group, number, args.seed, world)
            row = {"group": group, "number": number, "seed": args.seed, "case": case, "what": what, "outcome": outcome,
                   "seconds": round(time.monotonic() - began, 2), "environment": circumstances()}
            done[group, number] = row
            log.write(json.dumps(row) + "\n")
            log.flush()
            if outcome.startswith(BAD):
                print(f"{group} {number} {case} ({what}): {outcome}", file=sys.stderr, flush=True)
    rows = [row for (group, number), row in sorted(done.items()) if number < getattr(args, group)]
    text = page(rows, args.seed)
    print(text)
    if args.page:
        write_text(text, args.page)
    return 1 if any(row["outcome"].startswith(BAD) for row in rows) else 0


def circumstances() -> dict:
    """Where a case ran; asked once."""
    if not hasattr(circumstances, "found"):
        circumstances.found = environment("cpu")
    keys = ("oneshot", "commit", "dirty", "device", "threads", "python", "torch", "transformers")
    return {key: circumstances.found[key] for key in keys}


def read(file: Path, seed: int) -> dict:
    """{(group, number): row} of the cases done before with this seed and the code as it is now."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {(row["group"], row["number"]): row for row in rows if row["seed"] == seed
            and row["environment"] == circumstances() and not row["outcome"].startswith(BAD)}


def waiting(args, done):
    """The cases still to do, a few of each group in turn, so that a run cut short has some of all."""
    left = {group: [n for n in range(getattr(args, group)) if (group, n) not in done] for group in GROUPS}
    while any(left.values()):
        for group, numbers in left.items():
            for _ in range(min(5, len(numbers))):
                yield group, numbers.pop(0)


def page(rows: list[dict], seed: int) -> str:
    """The counts, as markdown."""
    where = rows[-1]["environment"] if rows else circumstances()
    counts = collections.Counter(row["group"] for row in rows)
    spent = sum(row["seconds"] for row in rows)
    wrong, broke = (sum(row["outcome"].startswith(word) for row in rows) for word in BAD)
    lines = ["# Soak", "", "Written by `make soak` (tests/soak.py). " + ", ".join(f"{counts[g]} {g}" for g in GROUPS)
             + f" in {spent / 60:.0f} minutes: **{wrong} wrong results, {broke} tracebacks.**", "",
             f"Commit {where['commit']}{' and changes' if where['dirty'] else ''}, {where['device']}, "
             f"{where['threads']} thread, Python {where['python']}, torch {where['torch']}, transformers "
             f"{where['transformers']}, seed {seed}. Tiny models (Llama bfloat16, GPT-2 float16; 3 blocks), nine "
             "commands: Wanda, SparseGPT, OWL, packed, healed, measured, sharded.", ""]
    for case, function in ((f.__name__, f) for group in cases.CASES.values() for f in group):
        found = [row for row in rows if row["case"] == case]
        if not found:
            continue
        kinds = collections.Counter(row["outcome"] for row in found)
        body = [[outcome, str(n)] for outcome, n in kinds.most_common()]
        lines += [f"## {case.replace('_', ' ')}", "", function.__doc__.strip(), "",
                  render(["outcome", "times"], body, "markdown", text={"outcome"}).strip()]
        what = collections.Counter(row["what"] for row in found)
        lines += ["", "Disturbed: " + ", ".join(f"{name} {n}" for name, n in sorted(what.items())) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
