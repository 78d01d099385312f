"""Sample the demo model's calibration and evaluation texts from the demo model itself.

    python scripts/sample_demo_texts.py        # after scripts/train_demo_model.py

Writes oneshot/demo/calibration.txt (seed 0) and oneshot/demo/evaluation_sampled.txt (seed 1): the same files for every
user, so that the demo's numbers are the same on every machine. The rest of the evaluation, evaluation_prose.txt, was
written for this project and is no model's output.
"""

import argparse
from pathlib import Path

from oneshot import data, models

TEXTS = {"calibration.txt": (0, 136), "evaluation_sampled.txt": (1, 40)}  # name: (seed, windows); 128 are calibrated on


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=models.DEMO.parent)
    p.add_argument("--seqlen", type=int, default=256)
    args = p.parse_args()
    model, tokenizer = models.load("demo", dtype="float32")
    for name, (seed, windows) in TEXTS.items():
        ids, how = data.sample_from_model(model, tokenizer, windows, args.seqlen, seed)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        (args.out / name).write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        print(f"{args.out / name}: {how}")


if __name__ == "__main__":
    main()
