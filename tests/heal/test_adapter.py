"""`--lora.adapter`: peft loads it onto the saved model that it names, and gets the healed one; what is refused."""

import json
import shutil

import families
import pytest
import tiny
import torch
from families import VOCAB
from healing_on_text import T, argv, families_text, lesson, pruned, windows
from tiny import place, plain_pages  # noqa: F401
from transformers import AutoModelForCausalLM

from oneshot.heal import Run, lora
from oneshot.heal.options import HealOptions
from oneshot.pipeline import heal_command, shrink_command
from oneshot.prune import loop

pytestmark = pytest.mark.usefixtures("plain_pages")
RUN = Run("cpu", HealOptions())
SHORT = ["--tokens", "400", "--batch", "32", "--heal-seqlen", "16", "--no-dense", "--evaluate", "none",
         "--no-progress", "--device", "cpu"]


@pytest.fixture(scope="module")
def cut(place):  # noqa: F811
    """A model cut to 80 %, that has a few weights that are exactly zero, as every dense one of 16 bits."""
    def few(tensors):
        for name, t in tensors.items():
            if name.endswith("q_proj.weight"):
                t[0, :3] = 0
    shutil.copytree(place / "model", place / "whole")
    tiny.change_weights(place / "whole", few)
    with tiny.no_pictures():
        assert shrink_command.main(tiny.flags(place, "--no-dense", model=place / "whole", to=0.8, tries=1, method=None,
                                              pattern=None, save=place / "cut")) == 0
    zeros = [int((t == 0).sum()) for name, t in tiny.weights(place / "cut").items() if name.endswith("q_proj.weight")]
    assert min(zeros) >= 3
    return place / "cut"


def heal(folder, place, out, *more):  # noqa: F811
    return heal_command.main(list(map(str, [
        folder, "--method", "lora", "--lora.r", 4, "--lora.lr", 0.01, "--data", place / "calibration.txt", "--loss",
        "next", "--save", out, "--results", out.with_name("runs"), "--lora.adapter", out.with_name("adapter"), *SHORT,
        *more])))


@pytest.mark.parametrize("targets, names", [
    ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ("layers.1.self_attn.q_proj,layers.0.self_attn.k_proj", ["model.layers.0.self_attn.k_proj",
                                                             "model.layers.1.self_attn.q_proj"])])
def test_peft_loads_it_onto_the_cut_model_it_names_and_gets_the_healed_one(
        place, cut, targets, names, tmp_path, monkeypatch):  # noqa: F811
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(cut.parent)
    assert heal(cut.name, place, tmp_path / "out", "--lora.targets", targets) == 0
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(cut) and sorted(about["target_modules"]) == names
    base, healed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (cut, tmp_path / "out"))
    ids = torch.randint(3, tiny.tokenizer().vocab_size, (2, T))
    with torch.no_grad():
        before = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        torch.testing.assert_close(loaded, healed(ids).logits)
    assert not torch.allclose(loaded, before, atol=1e-3)


def test_from_python_too(tmp_path):
    peft = pytest.importorskip("peft")
    model, base = families.tiny("llama").requires_grad_(False), families.tiny("llama")
    cfg = lora.Config(r=4, lr=0.02, adapter=str(tmp_path / "adapter"))
    lora.Heal(cfg).on_text(model, lesson(
        tmp_path / "work", train=windows(40, ids=families_text(40)), held=windows(8, ids=families_text(8)),
        heal_loss="next"))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.randint(3, VOCAB, (2, T))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        assert not torch.allclose(model(ids).logits, families.tiny("llama")(ids).logits, atol=1e-3)


def test_the_adapter_of_a_model_with_many_zeros_is_refused():
    cfg = lora.Config(adapter="adapter")
    with pytest.raises(ValueError, match=r"^--lora\.adapter adapter: 50% of the model's weights are zero"):
        lora.check_model(pruned(), cfg, RUN)
    lora.check_model(pruned(), lora.Config(), RUN)
    lora.check_model(families.tiny("llama"), cfg, RUN)


@pytest.mark.parametrize("changed, said", [
    ({"pattern": "2:4"}, "the model has zeros"), ({"pattern": "dense", "shrink": 0.8}, "an adapter fits a model that"),
    ({"pattern": "dense", "heal": "block,lora"}, "an adapter fits a model that is saved")])
def test_what_an_adapter_would_not_fit_is_refused_before_anything_is_computed(
        place, changed, said, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setattr(loop, "prune_model", lambda *args, **kwargs: pytest.fail("pruned"))
    given = argv(place, tmp_path / "out", **{"heal": "lora", "lora.adapter": tmp_path / "adapter"} | changed)
    assert tiny.main(*given) == 2
    [line] = tiny.said(capfd.readouterr().err)
    assert line.startswith(f"error: --lora.adapter {tmp_path / 'adapter'}: {said}")


def test_a_folder_that_was_pruned_is_refused_by_its_manifest(place, tmp_path, capfd):  # noqa: F811
    """Also where so few weights are zero that a dense model might have them."""
    assert tiny.main(*tiny.flags(place, "--no-dense", pattern="0.005", save=tmp_path / "pruned")) == 0
    capfd.readouterr()
    assert heal(tmp_path / "pruned", place, tmp_path / "out", "--pattern", "dense") == 2
    assert "the model has zeros" in tiny.said(capfd.readouterr().err)[-1]
