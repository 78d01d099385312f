"""`--heal-teacher`: loaded once in a run, freed early, known by its weights."""

import gc
import shutil
import weakref

import pytest
import tiny
from healing_on_text import argv
from tiny import place, plain_pages  # noqa: F401

from oneshot import measure, models

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.mark.parametrize("changed", [{"heal": "full,lora"}, {"heal_cache": "cache", "heal_data": "self"}])
def test_the_named_teacher_is_loaded_once_and_gone_before_measuring(place, changed, tmp_path, monkeypatch):  # noqa: F811
    real, loads, there = models.load, [], []

    def load(name, **how):
        found = real(name, **how)
        if name == str(tmp_path / "dense"):
            loads.append(weakref.ref(found[0]))
        return found

    def measured(subject, when="after"):
        gc.collect()
        there.append([when for model in loads if model() is not None])
        return found(subject, when)
    found = measure.measure
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(measure, "measure", measured)
    shutil.copytree(place / "model", tmp_path / "dense")
    own = {name: tmp_path / value if name == "heal_cache" else value for name, value in changed.items()}
    assert tiny.main(*argv(place, tmp_path / "out", heal_teacher=tmp_path / "dense", heal_tokens="160", **own)) == 0
    assert len(loads) == 1 and there == [["before"], []]


def test_a_named_teacher_is_known_by_its_weights_not_by_its_name(place, tmp_path, capfd):  # noqa: F811
    """What was finished, begun or cached towards other weights is not used."""
    shutil.copytree(place / "model", tmp_path / "dense")
    given = argv(place, tmp_path / "out", heal_tokens="160", heal_teacher=tmp_path / "dense",
                 heal_cache=tmp_path / "cache")
    assert tiny.main(*given) == 0 and tiny.main(*given) == 0 and "stored result" in capfd.readouterr().err
    tiny.change_weights(tmp_path / "dense", lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    assert tiny.main(*given) == 2
    assert f"--save {tmp_path / 'out'}: holds" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert tiny.main(*given) == 2
    assert "holds the predictions of another model" in capfd.readouterr().err
