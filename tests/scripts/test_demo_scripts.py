"""scripts/demo: training at toy size, resumed, refused; the texts sampled from a model."""

import json

import pytest
import sample_texts
import train_model
from safetensors.torch import load_file


@pytest.fixture
def train(tmp_path):
    """train(name, flag=value, ...): (exit code, weights, training.json) of a toy run in a folder of that name."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The number {i} is followed by {i + 1}, and so it goes on." for i in range(2000)))

    def go(name, **changes):
        flags = {"data": text, "out": tmp_path / name, "work": tmp_path / f"{name}_work", "vocab": 300, "hidden": 32,
                 "intermediate": 64, "layers": 1, "heads": 2, "kv-heads": 1, "seqlen": 16, "batch-size": 2, "steps": 4,
                 "checkpoint-every": 2, "device": "cpu", **changes}
        code = train_model.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        if not (tmp_path / name / "training.json").exists():
            return code, None, None
        return code, load_file(tmp_path / name / "model.safetensors"), json.loads(
            (tmp_path / name / "training.json").read_text())
    return go


def test_training_resumes_where_it_stopped(train, monkeypatch, capsys):
    _, whole, record = train("whole")
    replace, calls = train_model.os.replace, []

    def killed(*args):
        replace(*args)
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_model.os, "replace", killed)
    assert train("resumed")[0] == 130 and "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(train_model.os, "replace", replace)
    code, resumed, again = train("resumed")
    assert code == 0 and len(calls) == 1 and again["schedules"] == [[0, 4]]
    assert record["held_out_loss"] == again["held_out_loss"]
    assert all(whole[k].equal(resumed[k]) for k in whole)


def test_training_says_when_the_schedule_changed(train):
    train("changed", steps=2)
    assert train("changed", steps=4)[2]["schedules"] == [[0, 2], [2, 4]]


def test_training_refuses_missing_data(train, tmp_path, capsys):
    assert train("missing", data=tmp_path / "nothing.txt")[0] == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --data: no such text file") and err.count("\n") == 1


def test_texts_are_sampled_from_the_model_by_their_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_texts, "TEXTS", {"a.txt": (0, 2), "b.txt": (0, 2), "c.txt": (1, 2)})
    assert sample_texts.main(["--out", str(tmp_path), "--seqlen", "8"]) == 0
    a, b, c = ((tmp_path / f"{name}.txt").read_text() for name in "abc")
    assert a == b != c and len(a) > 8
