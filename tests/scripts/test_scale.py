"""scripts/bench/scale.py and synthetic.py at toy size: the model is an ordinary one, the page says what runs say."""

import json
import os
import subprocess
import sys
import time

import pytest
import scale
import synthetic
import torch
from transformers import AutoModelForCausalLM

from oneshot import models


def test_the_model_is_an_ordinary_one(tmp_path):
    folder = synthetic.make(tmp_path / "1", "tiny", shard=200_000)
    assert synthetic.is_made(folder, "tiny") and not synthetic.is_made(folder, "3b")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16 and len(list(folder.glob("*.safetensors"))) == 4
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == dict(synthetic.shapes(synthetic.config("tiny")))
    assert models.fingerprint(model) == models.fingerprint(models.load(synthetic.make(tmp_path / "2", "tiny"))[0])
    assert all(torch.isfinite(p).all() and p.std() < 1.1 for p in model.parameters())


def test_3b_is_about_3b():
    sizes = {size: sum(torch.Size(s).numel() for _, s in synthetic.shapes(synthetic.config(size))) for size in
             ("1b", "3b", "7b", "70b")}
    assert sizes["3b"] == pytest.approx(3e9, rel=0.05) and sizes["7b"] == 6738415616 and sizes["70b"] == 70553706496


def test_watched():
    """The mark counts what was there at any time, and the processor's seconds are not those of the clock."""
    code = "import time; x = bytearray(200_000_000); del x; time.sleep(0.5)"
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code])
    peak, usage = scale.watched(process)
    assert 200_000_000 < peak < 400_000_000 and usage < time.perf_counter() - began
    assert process.returncode == 0
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    scale.watched(process)
    assert process.returncode == 3


def test_at_toy_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    argv = ["--size", "tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert scale.main([*argv, "--methods", "wanda"]) == 0, capsys.readouterr().err
    data = json.loads((tmp_path / "scale.json").read_text())
    [run] = data["runs"]
    assert run["peak"] > 2e8 and run["processor"] > 0 and run["sparsity"] == pytest.approx(0.5)
    assert run["planned"]["peak"] == pytest.approx(run["peak"], rel=0.5)
    assert not (tmp_path / "work" / "wanda").exists()
    page = (tmp_path / "scale.md").read_text()
    assert "70B, 24 GiB, this CPU" not in page and "ASSUMED" in page and capsys.readouterr().out == page
    monkeypatch.setattr(scale, "one_run", lambda model, method, work: run | {"method": method, "peak": 1})
    assert scale.main([*argv, "--methods", "sparsegpt"]) == 0
    assert [(r["method"], r["peak"]) for r in json.loads((tmp_path / "scale.json").read_text())["runs"]] == [
        ("wanda", run["peak"]), ("sparsegpt", 1)]
    page = capsys.readouterr().out
    assert "70B, 24 GiB, this CPU" in page
    (tmp_path / "scale.md").unlink()
    assert scale.main(["--page", "--out", str(tmp_path)]) == 0 and (tmp_path / "scale.md").read_text() == page


def test_refusals(tmp_path, capsys, monkeypatch):
    assert scale.main(["--page", "--out", str(tmp_path)]) == 2 and "scale.json" in capsys.readouterr().err
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(scale, "LIMIT", "1MB")
    argv = ["--size", "tiny", "--work", str(tmp_path), "--out", str(tmp_path), "--methods", "wanda"]
    assert scale.main(argv) == 2 and "oneshot plan wanda: error: --memory" in capsys.readouterr().err


def test_on_paper():
    """More GPUs take less time and move more; a row that has to fit says by which flags."""
    speeds = {**scale.ASSUMED}
    gpu = scale.replace(scale.ON_PAPER, gpu=True)
    one, eight = scale.paper("a", "7b", gpu, speeds), scale.paper("b", "7b", gpu, speeds, gpus=8)
    assert float(eight[6]) <= float(one[6]) and one[5] == "" and float(eight[5]) > 100
    fits = scale.paper("c", "70b", scale.ON_PAPER, speeds, (24 * scale.GIB, None))
    assert "--offload disk" in fits[1] and float(fits[2]) <= 24
