"""`--heal full` and `lora` by command: record, checkpoint, what is refused; and from Python."""

import copy
import importlib.util
import json
import shutil

import pytest
import tiny
import torch
from healing_on_text import argv
from tiny import plain_pages  # noqa: F401

import oneshot
from oneshot import checkpoint, models
from oneshot.pipeline import heal_command
from oneshot.prune import loop

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("heal", ["full", "lora", "block,full"])
def test_the_record_says_what_was_done_and_the_checkpoint_verifies(place, heal, tmp_path):
    more = {"block.steps": 2} if "block" in heal else {}
    assert tiny.main(*argv(place, tmp_path / "out", heal=heal, **more)) == 0
    record = checkpoint.read_manifest(tmp_path / "out")["record"]
    info = record["heal"][heal.rpartition(",")[2]]
    assert info["held_out_after"] <= info["held_out_before"] and info["text"]["sha256"] and info["seconds"] > 0
    assert info["attempts"][0]["looks"] and info["memory"] and info["products"] == "float32"
    assert heal != "lora" or info["merge_error"] == 0
    assert record["sparsity"] == pytest.approx(0.5, abs=0.001)
    assert all(row["zeros"] >= row["target_zeros"] for row in record["layers"])
    assert not (tmp_path / "out" / ".oneshot" / "heal").exists()
    from oneshot.checkpoint import verify

    assert verify.main([str(tmp_path / "out")]) == 0


def test_the_dense_models_own_samples_are_a_text(place, tmp_path):
    data = f"1*self,1*{place / 'calibration.txt'}"
    assert tiny.main(*argv(place, tmp_path / "out", heal_tokens="200", heal_data=data)) == 0
    sources = checkpoint.read_manifest(tmp_path / "out")["record"]["heal"]["full"]["text"]["sources"]
    assert [s["share"] for s in sources] == [0.5, 0.5] and sources[0]["source"] == "sampled from the dense model"
    assert abs(sources[0]["tokens"] - sources[1]["tokens"]) <= 64


def test_evaluation_text_among_the_training_text_is_a_warning(place, tmp_path, capfd):
    given = argv(place, tmp_path / "out", heal_data=place / "evaluation.txt")
    assert tiny.main(*given) == 0
    assert "13-grams of the evaluation text evaluation occur in --heal-data" in capfd.readouterr().err
    assert any("flatters" in w for w in checkpoint.read_manifest(tmp_path / "out")["record"]["warnings"])


@pytest.mark.parametrize("changed, said", [
    ({"heal_data": None}, "--heal full: full trains on text; give --heal-data"),
    ({"heal": "none"}, "--heal-data "), ({"heal": "full,block"}, "--heal block,full"),
    ({"heal_seqlen": 4096}, "--heal-seqlen 4096"), ({"heal_data": "nowhere.txt"}, "--heal-data nowhere.txt"),
    ({"heal": "lora", "lora.targets": "nothing"}, "--lora.targets nothing"),
    ({"heal": "lora", "lora.targets": "q_proj,nothing"}, "--lora.targets nothing"),
    ({"heal_teacher": "nowhere"}, "--heal-teacher nowhere: "), ({"heal_cache": ""}, "--heal-cache : give a folder"),
])
def test_what_cannot_be_done_is_one_line(place, changed, said, tmp_path, capfd, monkeypatch):
    """Before anything is pruned."""
    monkeypatch.setattr(loop, "prune_model", lambda *args, **kwargs: pytest.fail("pruned"))
    whole = {key: value for key, value in changed.items() if value is not None}
    given = argv(place, tmp_path / "out", **whole)
    if changed.get("heal_data", "") is None:
        at = given.index("--heal-data")
        del given[at : at + 2]
    assert tiny.main(*given) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err


def test_from_python(place):
    model, tokenizer = models.load(str(place / "model"))
    record = oneshot.prune(model, tokenizer, method="wanda", calibration=str(place / "calibration.txt"), nsamples=8,
                           seqlen=16, heal="full", heal_data=str(place / "calibration.txt"), heal_tokens="600",
                           heal_seqlen=16, heal_batch=32, progress=False)
    assert record["heal"]["full"]["held_out_after"] < record["heal"]["full"]["held_out_before"]
    assert record["sparsity"] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("changed, said", [({"tokenizer": None}, "^tokenizer: needed to read --heal-data "),
                                           ({"heal_teacher": "nowhere"}, "^--heal-teacher nowhere: ")])
def test_from_python_what_cannot_be_done_is_said_before_anything_is_pruned(place, changed, said):
    model, tokenizer = models.load(str(place / "model"))
    before = copy.deepcopy(model.state_dict())
    given = {"tokenizer": tokenizer, "method": "magnitude", "calibration": torch.ones(2, 8, dtype=torch.long),
             "heal": "full", "heal_data": str(place / "calibration.txt"), "heal_seqlen": 16, "progress": False}
    with pytest.raises(ValueError, match=said):
        oneshot.prune(model, **given | changed)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("teacher", ["model", "name"])
def test_heal_from_python(place, teacher):
    (model, tokenizer), (dense, _) = (models.load(str(place / "model")) for _ in range(2))
    oneshot.prune(model, tokenizer, method="wanda", calibration=str(place / "calibration.txt"), nsamples=4, seqlen=16,
                  progress=False)
    zeros = [p == 0 for p in model.parameters() if p.ndim == 2]
    record = oneshot.heal(model, tokenizer, data=str(place / "calibration.txt"), tokens="400", heal_seqlen=16,
                          heal_batch=32, teacher=dense if teacher == "model" else str(place / "model"), progress=False,
                          parts={"full.lr": 0.01})
    info = record["heal"]["full"]
    assert info["held_out_after"] < info["held_out_before"] and record["settings"]["healing"]["full"]["lr"] == 0.01
    assert not any(p[z].any() for p, z in zip([p for p in model.parameters() if p.ndim == 2], zeros, strict=True))
    with pytest.raises(ValueError, match="--heal-teacher"):
        oneshot.heal(model, tokenizer, data=str(place / "calibration.txt"))


def test_no_more_tokens_are_told_than_the_text_has(place, tmp_path):
    assert tiny.main(*argv(place, tmp_path / "out", heal_tokens="16")) == 0
    info = checkpoint.read_manifest(tmp_path / "out")["record"]["heal"]["full"]
    assert info["tokens"] == info["text"]["tokens"] == 16


@pytest.mark.parametrize("given", [True, False])
def test_from_python_the_teacher_is_the_model_in_hand_not_what_lies_under_its_name(place, given):
    """The perfect student of another random model: with the same weights as its teacher, it has nothing to learn."""
    model, tokenizer = models.load(str(place / "model"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    teacher = {"teacher": copy.deepcopy(model)} if given else {}
    record = oneshot.prune(model, tokenizer, method="magnitude", pattern="0.0", heal="full", heal_tokens="64",
                           heal_data=str(place / "calibration.txt"), heal_seqlen=16, heal_batch=32, progress=False,
                           **teacher)
    assert abs(record["heal"]["full"]["held_out_before"]) < 1e-5


@pytest.fixture(scope="module")
def sparse(place):
    """A pruned model in place/sparse."""
    with tiny.no_pictures():
        assert tiny.main(*tiny.flags(place, "--no-dense", method="wanda", pattern="2:4", save=place / "sparse")) == 0
    return place / "sparse"


def heal_main(*words):
    return heal_command.main([str(word) for word in words])


def test_help_offers_what_the_command_takes():
    offered = {word for action in heal_command.parser()._actions for word in action.option_strings}
    assert {"--tokens", "--heal-seqlen"} <= offered and not {"--seqlen", "--heal-tokens"} & offered
    words = heal_command.translated(["m", "--heal-seqlen", "16", "--seqlen=8", "--tokens", "9"])
    assert words[words.index("--heal-seqlen") + 1] == "16" and "--seqlen=8" in words and "--heal-tokens" in words


SHORT = ["--tokens", "200", "--batch", "32", "--heal-seqlen", "16", "--nsamples", "4", "--seqlen", "16", "--no-dense",
         "--evaluate", "none", "--no-progress", "--device", "cpu"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_oneshot_heal_heals_a_pruned_folder_towards_what_it_was_made_from(place, sparse, method, tmp_path):
    assert heal_main(sparse, "--data", place / "calibration.txt", "--method", method, "--save", tmp_path / "out",
                     "--results", tmp_path / "runs", *SHORT) == 0
    record = checkpoint.read_manifest(tmp_path / "out")["record"]
    assert record["settings"]["heal_teacher"] == str(place / "model") and record["settings"]["pattern"] == "2:4"
    assert record["heal"][method]["held_out_after"] < record["heal"][method]["held_out_before"]
    before, after = tiny.weights(sparse), tiny.weights(tmp_path / "out")
    zeros = [(before[name] == 0) & (before[name].ndim == 2) for name in before]
    assert sum(int(z.sum()) for z in zeros) > 1000
    assert not any(after[name][z].any() for name, z in zip(before, zeros, strict=True))


def test_a_teacher_that_has_changed_since_is_a_warning(place, sparse, tmp_path):
    """Not one whose weights are the same, nor another one that is given on purpose."""
    shutil.copytree(place / "model", tmp_path / "dense")
    assert tiny.main(*tiny.flags(place, "--no-dense", model=tmp_path / "dense", save=tmp_path / "pruned")) == 0

    def said(name, *more):
        assert heal_main(tmp_path / "pruned", "--data", place / "calibration.txt", "--save", tmp_path / name,
                         "--results", tmp_path / "runs", *more, *SHORT) == 0
        return [w for w in checkpoint.read_manifest(tmp_path / name)["record"]["warnings"] if "have changed" in w]
    assert not said("same")
    tiny.change_weights(tmp_path / "dense", lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    [line] = said("changed")
    assert line.startswith(f"--heal full: --heal-teacher {tmp_path / 'dense'}: its weights have changed since")
    assert not said("other", "--teacher", place / "model")


def test_oneshot_heal_without_a_manifest_needs_a_teacher_or_the_next_token(place, tmp_path, capfd):
    words = [place / "model", "--data", place / "calibration.txt", "--save", tmp_path / "out", "--results",
             tmp_path / "runs", *SHORT]
    assert heal_main(*words) == 2 and "--heal-teacher" in capfd.readouterr().err
    assert heal_main(*words, "--loss", "next") == 0


def test_what_is_held_out_and_trained_on_alike_is_a_warning(place, tmp_path):
    same = place / "calibration.txt"
    assert tiny.main(*argv(place, tmp_path / "out", heal_data=same, heal_held_out=same)) == 0
    warnings = checkpoint.read_manifest(tmp_path / "out")["record"]["warnings"]
    assert any("13-grams of what is held out occur in what is trained on" in w for w in warnings)


def test_a_rounded_checkpoint_is_not_healed_into_one_that_is_not(place, sparse, tmp_path, capfd):
    """Nor is what it was rounded from taken for the dense model."""
    rounded, common = tmp_path / "rounded", ["--results", tmp_path / "runs", *SHORT]
    assert tiny.main("--model", sparse, "--method", "keep", "--pattern", "2:4", "--quantise", "int8:row", "--save",
                     rounded, *common[:2], "--no-dense", "--evaluate", "none", "--no-progress", "--device", "cpu") == 0
    words = [rounded, "--data", place / "calibration.txt", "--save", tmp_path / "out", *common]
    capfd.readouterr()
    assert heal_main(*words) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: --model {rounded}: its weights are rounded (int8:row)") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert heal_command.made_from(str(rounded))["model"] == str(place / "model")
    assert heal_main(*words, "--quantise", "int8:row") == 0
    assert checkpoint.read_manifest(tmp_path / "out")["record"]["settings"]["heal_teacher"] == str(place / "model")


@pytest.mark.parametrize("damage", [lambda r: r.pop("settings"), lambda r: r.update(settings=None),
                                    lambda r: r["settings"].pop("model")])
def test_a_damaged_manifest_is_one_line(sparse, damage, tmp_path, capfd):
    data = checkpoint.read_manifest(sparse)
    damage(data["record"])
    (tmp_path / "oneshot.json").write_text(json.dumps(data))
    assert heal_main(tmp_path, "--data", "c4") == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'oneshot.json'}: is damaged") and err.count("\n") == 1


def test_oneshot_heal_names_what_is_missing(capfd):
    assert heal_main("--data", "c4") == 2 and "name the model first" in capfd.readouterr().err
    assert heal_main("x", "--data", "c4", "--heal", "lora") == 2 and "leave --heal out" in capfd.readouterr().err
    assert heal_main("--model=x", "--tokens", "5M") == 2 and "--heal-data" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        heal_main("--help")
    assert ended.value.code == 0 and "--tokens" in capfd.readouterr().out


def test_tensorboard_is_written_where_the_environment_says(place, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    assert tiny.main(*argv(place, tmp_path / "out")) == 0
    [attempt] = checkpoint.read_manifest(tmp_path / "out")["record"]["heal"]["full"]["attempts"]
    log = EventAccumulator(str(tmp_path / "logs" / "out-full-attempt-0")).Reload()
    found = [[event.step, event.value] for event in log.Scalars("train/loss")]
    assert [step for step, _ in found] == [step for step, _ in attempt["log"]]
    assert [value for _, value in found] == pytest.approx([value for _, value in attempt["log"]])
    assert "eval/loss" in log.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_named(place, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    assert tiny.main(*argv(place, tmp_path / "out")) == 2
    assert "TENSORBOARD_LOGGING_DIR: is set, and tensorboard is not installed" in capfd.readouterr().err
