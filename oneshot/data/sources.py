"""Read text: from files, from data sets on the Hugging Face hub, and from what is shipped in `demo/`.

A text is named by its `spec`:
  wikitext2, c4, ptb   the papers' data sets, from the Hugging Face hub
  owner/name           any other data set on the hub (`column`, `config`, `split` in TextOptions)
  FILE                 .txt .jsonl .json .parquet .csv, or one of them packed as .gz or .zst
  builtin              the text shipped in `demo/`; for evaluation also builtin:prose and builtin:sampled
  self                 calibration only: sampled from the model itself

Text that cannot be used raises `Unusable`: one line that says what is wrong and what to do, without the flag.
"""

import os
import re
from pathlib import Path

from . import files, hub
from .columns import has_text, listed
from .hub import HUB_SETS
from .text import AS_IT_COMES, Stream, Text, TextOptions, Unusable

__all__ = ["AS_IT_COMES", "HUB_SETS", "Stream", "Text", "TextOptions", "Unusable", "read", "stream"]

DEMO = Path(__file__).parent.parent / "demo"
CALIBRATION_TEXT = {"builtin": ["calibration.txt"]}
EVALUATION_TEXT = {
    "builtin": ["evaluation_sampled.txt", "evaluation_prose.txt"],
    "builtin:sampled": ["evaluation_sampled.txt"],
    "builtin:prose": ["evaluation_prose.txt"],
}


def read(spec: str, options: TextOptions, evaluate: bool) -> Text:
    """Read the text named `spec`, for evaluation or else for calibration. Raises Unusable."""
    builtin = EVALUATION_TEXT if evaluate else CALIBRATION_TEXT
    if spec in builtin:
        documents = ["".join(files.blocks(DEMO / name)) for name in builtin[spec]]
        text = Text(documents, f"{spec} ({', '.join(builtin[spec])})")
    elif is_file(spec):
        text = files.read(Path(os.path.expanduser(spec)), options)
    elif spec in HUB_SETS or is_hub(spec):
        text = hub.read(spec, options, evaluate)
    else:
        names = listed([*HUB_SETS, *builtin] + ["self"] * (not evaluate))
        raise Unusable(f"unknown; use {names}, a hub data set owner/name, or a file {listed(files.SUFFIXES)}")
    # Whether there is enough text is checked in windows.py; this stops at the first document that is not empty.
    if not any(has_text(document) for document in text.documents):
        raise Unusable("holds no text; use another one")
    return text


def stream(spec: str, options: TextOptions) -> Stream:
    """The text named `spec` to train on, read as far as it is asked for. Raises Unusable, also while it is read."""
    if spec not in CALIBRATION_TEXT and is_file(spec):
        return files.stream(Path(os.path.expanduser(spec)), options)
    if spec not in CALIBRATION_TEXT and is_hub(spec):
        return hub.stream(spec, options)
    text = read(spec, options, evaluate=False)
    return Stream(iter(text.documents), text.source)


def is_file(spec: str) -> bool:
    """Whether a text is a file by its name, whether it is there or not, or lies there by any name."""
    path = Path(os.path.expanduser(spec))
    return files.is_known(path) or (os.path.exists(path) and spec not in HUB_SETS)


def is_hub(spec: str) -> bool:
    """Whether a text is a data set on the hub by its name, one of the papers' or "owner/name"."""
    return spec in HUB_SETS or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", spec))
