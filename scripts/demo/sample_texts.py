"""Sample the demo model's calibration and evaluation texts from the demo model itself.

    python scripts/demo/sample_texts.py        # after scripts/demo/train_model.py

Writes oneshot/demo/calibration.txt (seed 0) and oneshot/demo/evaluation_sampled.txt (seed 1): the same files for every
user, so that the demo's numbers are the same on every machine. The rest of the evaluation, evaluation_prose.txt, was
written for this project and is no model's output.
"""

import argparse
import sys
from pathlib import Path

from oneshot import models
from oneshot.data.sample_self import sample_from_model
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

TEXTS = {"calibration.txt": (0, 136), "evaluation_sampled.txt": (1, 40)}  # name: (seed, windows); 128 are calibrated on


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/demo/sample_texts.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=models.DEMO.parent)
    p.add_argument("--seqlen", type=int, default=256)
    return exit_code(lambda: work(p.parse_args(argv)))


def work(args: argparse.Namespace) -> None:
    """Write both texts."""
    model, tokenizer = models.load("demo", dtype="float32")
    for name, (seed, windows) in TEXTS.items():
        ids, how = sample_from_model(model, tokenizer, windows, args.seqlen, seed)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        write_text("\n\n".join(texts) + "\n", args.out / name)
        print(f"{args.out / name}: {how}")


if __name__ == "__main__":
    sys.exit(main())
