"""A tokenizer with one token per character, so that windows can be read as text; calibration by it."""

import csv
import json
import string

import datasets
import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from oneshot import data
from oneshot.data import TextOptions

SEPARATE = TextOptions(documents="separate")
STORIES = ["once upon a time", "the end", "x", "", 'a dog, "Rex", ran\nand ran', "žluťoučký kůň"]


def character_tokenizer(bos=True, **special):
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", *string.printable, *"žťčýůň"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


def spell(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def calibrate(tokenizer, spec, nsamples=5, seqlen=10, seed=0, **more):
    return data.calibration(
        tokenizer, str(spec), nsamples=nsamples, seqlen=seqlen, seed=seed, progress=False, **more
    )


def write(path, rows, column="text"):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": 1, column: row}) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"n": 1, column: row} for row in rows]))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[column], *([row] for row in rows)])  # all columns of a csv are text
    else:
        datasets.Dataset.from_dict({"n": [1] * len(rows), column: rows}).to_parquet(path)
    return path


def assert_refused(tokenizer, flag, spec, says, seqlen=10, **options):
    options = TextOptions(**options)
    with pytest.raises(ValueError) as error:
        if flag == "--calibration":
            calibrate(tokenizer, spec, seqlen=seqlen, options=options)
        else:
            data.evaluation(tokenizer, str(spec), seqlen=seqlen, options=options)
    message = str(error.value)
    assert message.startswith(f"{flag} {spec}: ") and "\n" not in message
    for part in says:
        assert part in message
