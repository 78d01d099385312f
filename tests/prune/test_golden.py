"""What the public wanda and sparsegpt classes give on a real model, reproduced (`data/golden`).

Pruning and measuring run the whole program but its command line. The golden note says which rows to match,
and how closely: 0.1 %, and 0.5 % where at 60 and 70 % the order of summation already shows.

One case runs on all windows; the others on the first ones, against what `golden_small.py` makes of the same
public numbers. ONESHOT_GOLDEN=whole runs every case on all windows.
"""

import json
import os
from pathlib import Path

import golden_small
import pytest
import torch
from jobs import chain_of
from safetensors.torch import load_file

from oneshot import models
from oneshot.measure.perplexity import perplexity
from oneshot.prune import loop, patterns
from oneshot.prune.job import Job

DATA = Path(__file__).resolve().parents[1] / "data"
WHOLE = golden_small.CASES if os.environ.get("ONESHOT_GOLDEN") == "whole" else [("sparsegpt", "2:4")]
CASES = [(size, *case) for size, cases in (("all", WHOLE), ("first", golden_small.CASES)) for case in cases]
BATCH = 32


def numbers(size):
    name = {"all": "stories260k.json", "first": "stories260k_small.json"}[size]
    return json.loads((DATA / "golden" / name).read_text())


def load():
    return models.load(DATA / "stories260k", dtype="float32")[0]


@pytest.fixture(scope="module")
def tokens():
    return {k: v.long() for k, v in load_file(DATA / "golden" / "stories260k_tokens.safetensors").items()}


def case_of(size, method, pattern):
    (found,) = (c for c in numbers(size)["cases"] if (c["method"], c["pattern"]) == (method, pattern))
    return found


def test_dense(tokens):
    public = numbers("all")
    for name, shape in (("calib", "calibration"), ("eval", "evaluation")):
        assert list(tokens[name].shape) == public[shape]
    ppl, predicted = perplexity(load(), tokens["eval"], batch_size=BATCH)
    assert predicted == 256 * 255 and ppl == pytest.approx(public["dense_ppl"], abs=6e-5)


@pytest.mark.parametrize("size, method, text", CASES, ids=["-".join(case) for case in CASES])
def test_golden(tokens, size, method, text):
    want, public = case_of(size, method, text), case_of("all", method, text)
    calib, held_out = tokens["calib"], tokens["eval"]
    if size == "first":
        calib, held_out = calib[:numbers(size)["calibration"]], held_out[:numbers(size)["evaluation"]]
    model, pattern = load(), patterns.parse(text)
    chain = chain_of(method.removesuffix("-exact"))
    job = Job(loop.make_plan(model, pattern, chain), chain,
              loop.Options(batch_size=BATCH, layer_errors=False, progress=False, device="cpu"))
    result = loop.prune_model(model, calib, None, job)
    ppl, _ = perplexity(model, held_out, batch_size=BATCH)
    assert ppl == pytest.approx(want["ppl"], rel=golden_small.tolerance(text))
    assert result.warnings == [] and len(result.layers) == 35
    for row in result.layers:
        assert row["zeros"] == row["target_zeros"]
        if "zeros" in public:
            assert row["zeros"] == public["zeros"][row["name"].removeprefix("model.layers.")]
    for p in model.parameters():
        assert torch.isfinite(p).all() and not (torch.signbit(p) & (p == 0)).any()
