"""`--model smollm2`: the hub's own where the hub gives it, else the package's GGUF file; the record says which."""

import types

import gguf_files
import huggingface_hub
import pytest
import tiny

from oneshot import models
from oneshot.models import gguf, intake, loading
from oneshot.pipeline import identity

REVISION = "0123abcd"


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A cache with the package's file, and a hub; `asked` counts what is asked of it, `has` says what it answers."""
    pytest.importorskip("gguf")
    hub = types.SimpleNamespace(asked=0, has=True, folder=tiny.save_model(tmp_path / "hub"))

    def model_info(name, timeout):
        hub.asked += 1
        if not hub.has:
            raise huggingface_hub.errors.HfHubHTTPError("401", response=types.SimpleNamespace(headers={}, request=None))
        assert name == gguf.SMOLLM2_HUB and timeout <= 5

    def from_pretrained(source, config, options, how, said):
        assert hub.has and source == gguf.SMOLLM2_HUB
        model, tokenizer, info = read(str(hub.folder), config, options, how, said)
        model.config._commit_hash = REVISION
        return model, tokenizer, info
    read = loading.from_pretrained
    (tmp_path / "cache").mkdir()
    gguf_files.write(tmp_path / "cache" / gguf.SMOLLM2_FILE)
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(gguf, "hub_away", lambda: None)
    for name in ("check_hub", "hub_folder"):
        monkeypatch.setattr(intake, name, lambda *args: {} if len(args) == 3 else None)
    monkeypatch.setattr(loading, "from_pretrained", lambda source, *args: (
        from_pretrained if source == gguf.SMOLLM2_HUB else read)(source, *args))
    gguf.on_hub.cache_clear()
    yield hub
    gguf.on_hub.cache_clear()


def taken(model):
    """What the record says was taken."""
    return identity.describe(types.SimpleNamespace(model="smollm2"), model, "x")["stands_for"]


def test_where_the_hub_gives_it_it_is_taken_even_if_the_file_is_in_the_cache(world):
    world.has = False
    models.load("smollm2")  # makes the folder in the cache
    world.has = True
    gguf.on_hub.cache_clear()
    model, _ = models.load("smollm2")
    assert taken(model) == f"{gguf.SMOLLM2_HUB} on the hub, revision {REVISION}"
    assert not models.source_of(model).warnings
    models.load("smollm2")
    assert world.asked == 2, "once a process"


@pytest.mark.parametrize("how", ["offline", "no answer", "no access"])
def test_else_the_file_of_the_package_is(world, how, monkeypatch):
    world.has = False
    monkeypatch.setattr(gguf, "hub_away", lambda: None if how == "no access" else how)
    for _ in range(2):  # read from the file, then from the folder that was made of it
        model, _ = models.load("smollm2")
        assert taken(model) == f"{gguf.SMOLLM2_FILE} of {gguf.SMOLLM2_PACKAGE}, GGUF F32"
        assert "GGUF" in models.source_of(model).warnings[0]
    assert world.asked == (how == "no access")


def test_offline_nothing_is_asked(world, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "model_info", None)
    monkeypatch.setattr(huggingface_hub, "get_session", None)
    gguf.on_hub.cache_clear()
    assert not gguf.on_hub(gguf.SMOLLM2_HUB)


def test_other_models_stand_for_themselves(tmp_path):
    model, _ = models.load(tiny.save_model(tmp_path / "m"))
    assert models.source_of(model).stands_for is None
    assert "stands_for" not in identity.describe(types.SimpleNamespace(model="m"), model, "x")
