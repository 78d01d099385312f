"""The small real models that other scripts measure, their texts and flags.

    python scripts/bench/small_models.py --shared ../shared   # texts to build/small_models, for scripts/sweep

    stories260k      calibrated on 500 TinyStories, measured on 500 others
    craftgpt-5m      on its own text, one dialogue a line; half to calibrate, half to measure
    demo-wikitext2   the demo model calibrated on C4 text and measured on WikiText-2 test
    demo             the same on its built-in texts
    smollm2          SmolLM2-135M, calibrated on 64 windows of 512 tokens of C4, measured on WikiText-2 test
    smollm2-65k      the same with 128 windows, 65k tokens
    smollm2-131k     with 256 windows, 131k tokens, about half of what the papers calibrate with
    smollm2-bf16     that computed in bfloat16, as it is stored
"""

import argparse
import json
import sys
from pathlib import Path

from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

WORK = Path("build/small_models")  # relative: records hold it
SHARE = 0.85  # of the C4 sample to calibrate and train on; the rest is held out
PATTERNS = "0.5,0.6,0.7,2:4,4:8"
DEMO = ["--model", "demo", "--pattern", PATTERNS, "--evaluate", "builtin:prose,builtin:sampled"]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/small_models.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of models/ and data/")

    def work():
        shared = p.parse_args(argv).shared
        flags_of(shared)
        split_c4(shared / "data", WORK)
        print(f"written: {WORK}")
    return exit_code(work)


def split_c4(data: Path, folder: Path) -> tuple[Path, Path]:
    """C4's sample in two files in `folder`: documents to calibrate and train on, and those that are held out."""
    lines = (data / "c4_sample.jsonl").read_text(encoding="utf-8").splitlines()
    first, files = round(SHARE * len(lines)), (folder / "c4_train.jsonl", folder / "c4_held.jsonl")
    for file, part in zip(files, (lines[:first], lines[first:]), strict=True):
        keep("\n".join(part) + "\n", file)
    return files


def keep(text: str, file: Path) -> None:
    """Write a text unless the file holds it: a run that was killed continues only on files that did not change."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(text, file)


def flags_of(shared: Path) -> dict[str, list[str]]:
    """{name: flags of `oneshot prune`, but for the method}; the texts are split into halves below WORK.

    Raises ValueError where the folder does not hold them.
    """
    models, data = shared / "models", shared / "data"
    if not (data / "tinystories_1000.json").is_file():
        raise ValueError(f"--shared {shared}: holds no data/tinystories_1000.json; the small models and texts are not "
                         "part of the repository")
    stories = json.loads((data / "tinystories_1000.json").read_text())
    dialogues = (data / "craftgpt_selfgen.txt").read_text().splitlines()
    halves = {}
    for name, documents in (("tinystories", stories), ("craftgpt", dialogues)):
        for part, chosen in (("calibration", documents[0::2]), ("test", documents[1::2])):
            halves[name, part] = WORK / f"{name}_{part}.json"
            keep(json.dumps(chosen), halves[name, part])
    smollm2 = ["--model", "smollm2", "--pattern", PATTERNS, "--calibration", str(data / "c4_sample.jsonl"),
               "--seqlen", "512", "--evaluate", str(data / "wikitext2_test.txt"), "--nsamples"]
    return {
        # 172 inputs are no multiple of 8
        "stories260k": ["--model", str(models / "stories260k"), "--pattern", PATTERNS.removesuffix(",4:8"),
                        "--seqlen", "256", "--calibration", str(halves["tinystories", "calibration"]),
                        "--evaluate", str(halves["tinystories", "test"])],
        "craftgpt-5m": ["--model", str(models / "craftgpt-5m"), "--pattern", PATTERNS, "--documents", "separate",
                        "--nsamples", "512", "--calibration", str(halves["craftgpt", "calibration"]),
                        "--evaluate", str(halves["craftgpt", "test"])],
        "demo-wikitext2": ["--model", "demo", "--pattern", PATTERNS, "--calibration", str(data / "c4_sample.jsonl"),
                           "--evaluate", str(data / "wikitext2_test.txt")],
        "demo": DEMO,
        "smollm2": [*smollm2, "64"],
        "smollm2-65k": [*smollm2, "128"],
        "smollm2-131k": [*smollm2, "256"],
        "smollm2-bf16": [*smollm2, "256", "--compute", "stored"],
    }


if __name__ == "__main__":
    sys.exit(main())
