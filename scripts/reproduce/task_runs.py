"""The runs behind the tasks in results/tables.md: the demo model at 2:4 on local lm-eval tasks, dense beside pruned.

    python scripts/reproduce/task_runs.py --shared ../shared   # records to results/runs, the YAMLs to build/tasks
    python scripts/tables/tables.py                            # tables from the records

Calibrated on C4 text; the first 1000 documents of each task (all of what has fewer) whose choices fit into the model's
256 positions.
"""

import argparse
import sys
from pathlib import Path

import local_tasks

from oneshot.pipeline import run
from oneshot.runtime.command import Parser, exit_code

TASKS = Path("build/tasks")  # relative: the records hold it
LONGEST = 700  # characters of a choice: more is more than the demo model's 256 tokens


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/reproduce/task_runs.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of data/")
    p.add_argument("--results", type=Path, default=Path("results/runs"))
    p.add_argument("--limit", type=int, default=1000, help="documents of each task")
    p.add_argument("--save", help="folder for the pruned checkpoints")
    return exit_code(lambda: work(p.parse_args(argv)))


def work(args: argparse.Namespace) -> int:
    """Write the tasks, then run as `oneshot prune` does. Exit code."""
    names = local_tasks.write_all(args.shared / "data", TASKS, LONGEST)
    save = ["--save", args.save] if args.save else []
    return run.main(["--model", "demo", "--method", "wanda,sparsegpt", "--pattern", "2:4", "--evaluate", "none",
                     "--calibration", str(args.shared / "data" / "c4_sample.jsonl"), "--tasks", ",".join(names),
                     "--task-path", str(TASKS), "--trust-task-code", "--task-limit", str(args.limit),
                     "--results", str(args.results), "--batch-size", "16", *save])


if __name__ == "__main__":
    sys.exit(main())
