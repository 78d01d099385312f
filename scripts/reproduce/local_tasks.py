"""lm-eval tasks on local files: a folder of YAMLs for --task-path, so that tasks run without the hub.

    python scripts/reproduce/local_tasks.py --shared ../shared --out build/tasks
    oneshot prune --tasks foundry_piqa,lambada --task-path build/tasks --trust-task-code

    foundry_*    data/tasks/foundry_*.jsonl, LLM Foundry's form: {"query", "choices", "gold"}; of WinoGrande
                 {"context_options", "continuation", "gold"}: the contexts differ, scored on the same continuation
    lambada      data/lambada_test.jsonl, {"text"}: the last word after all others, right if it is the greedy choice

Prompts and scoring are those of lm-eval's own tasks of these names (`acc`, and `acc_norm`: log-probability per byte of
the choice). The YAMLs hold absolute paths, as the data may be anywhere. A choice must fit into the model's positions
(four of PIQA do not fit into the demo model's 256): `--longest 700` leaves longer ones out, and says how many.
"""

import argparse
import json
import sys
from pathlib import Path

from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

ANSWER = {"arc_challenge", "arc_easy", "piqa"}  # their queries are "Question: ...", in lm-eval "\nAnswer:" follows
LAMBADA = {"output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
           "doc_to_target": "{{' ' + text.split(' ')[-1]}}", "metrics": ["acc"]}
WINOGRANDE = {"output_type": "multiple_choice", "doc_to_text": "{{gold}}", "doc_to_choice": "{{context_options}}",
              "doc_to_target": "{{continuation}}", "metrics": ["acc"]}


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/reproduce/local_tasks.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of data/")
    p.add_argument("--out", type=Path, default=Path("build/tasks"), help="folder for the YAMLs")
    p.add_argument("--longest", type=int, help="leave out documents with a choice of more characters")

    def work():
        args = p.parse_args(argv)
        print(f"{args.out}: {','.join(write_all(args.shared / 'data', args.out, args.longest))}")
    return exit_code(work)


def write_all(data: Path, out: Path, longest: int | None = None) -> list[str]:
    """The names of the tasks whose YAMLs were written. Raises ValueError where there is no data."""
    found = {file.stem: (file, template(file.stem.removeprefix("foundry_")))
             for file in sorted((data / "tasks").glob("foundry_*.jsonl"))}
    if (lambada := data / "lambada_test.jsonl").is_file():
        found["lambada"] = lambada, LAMBADA
    if not found:
        raise ValueError(f"--shared {data.parent}: holds neither data/tasks/foundry_*.jsonl nor "
                         "data/lambada_test.jsonl")
    for name, (file, parts) in found.items():
        file = without_long(file, out / f"{name}.jsonl", longest) if longest else file
        write_text(yaml(name, file.resolve(), parts), out / f"{name}.yaml")
    return list(found)


def without_long(file: Path, out: Path, longest: int) -> Path:
    """The file, or where some of its documents have a choice of more characters, a copy at `out` without those."""
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if max(map(len, json.loads(line).get("choices", [""]))) <= longest]
    if len(kept) == len(lines):
        return file
    print(f"{file.name}: {len(lines) - len(kept)} of {len(lines)} documents left out, a choice is longer than "
          f"{longest} characters", file=sys.stderr)
    write_text("\n".join([*kept, ""]), out)
    return out


def template(name: str) -> dict:
    """How a task of LLM Foundry's form is asked."""
    if name == "winogrande":
        return WINOGRANDE
    text = "{{query.strip()}}" + "\nAnswer:" * (name in ANSWER)
    return {"output_type": "multiple_choice", "doc_to_text": text, "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}", "metrics": ["acc", "acc_norm"]}


def yaml(name: str, file: Path, parts: dict) -> str:
    """A task's YAML; JSON strings are YAML strings."""
    lines = [f"task: {name}", "dataset_path: json",
             f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(file))}}}}}",
             "test_split: test", "num_fewshot: 0",
             *(f"{key}: {json.dumps(value)}" for key, value in parts.items() if key != "metrics"), "metric_list:"]
    lines += [f"  - {{metric: {m}, aggregation: mean, higher_is_better: true}}" for m in parts["metrics"]]
    return "\n".join([*lines, "metadata: {version: 1.0}", ""])


if __name__ == "__main__":
    sys.exit(main())
