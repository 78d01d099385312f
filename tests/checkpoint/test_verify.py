"""`python -m oneshot.verify`: proves a good folder, finds every tampering, refuses what is no finished checkpoint."""

import json

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401

from oneshot.checkpoint import verify

pytestmark = pytest.mark.usefixtures("plain_pages")
UP = "model.layers.1.mlp.up_proj"
LINEARS = 7 * tiny.BLOCKS


@pytest.fixture(scope="module")
def saved(place):  # noqa: F811
    """{pattern: a finished folder}"""
    folders = {}
    for pattern in ("2:4", "0.3"):
        folders[pattern] = place / f"saved-{pattern.replace(':', 'of')}"
        assert tiny.main(*tiny.flags(place, "--no-dense", pattern=pattern, save=folders[pattern], evaluate="none")) == 0
    return folders


@pytest.fixture
def check(saved, tmp_path, capsys):
    """`check(change, pattern)`: (exit code, output) for a copy of a good folder that `change(folder)` has spoilt."""
    def run(change=None, pattern="2:4", *more):
        folder = tiny.copy(saved[pattern], tmp_path / "copy")
        if change:
            change(folder)
        capsys.readouterr()
        code = verify.main([str(folder), *more])
        return code, capsys.readouterr()
    return run


def in_weight(change):
    """Alter one linear's weight in the checkpoint's file."""
    return lambda folder: tiny.change_weights(folder, lambda tensors: change(tensors[f"{UP}.weight"]))


def in_manifest(change):
    def apply(folder):
        manifest = json.loads((folder / "oneshot.json").read_text())
        change(manifest)
        (folder / "oneshot.json").write_text(json.dumps(manifest))
    return apply


def first(W, zero):
    """Index of the first weight that is zero, or is not."""
    return tuple(((W == 0) == zero).nonzero()[0])


@pytest.mark.parametrize("pattern", ["2:4", "0.3"])
def test_good_folder_is_proved(check, pattern):
    code, told = check(pattern=pattern)
    assert code == 0 and told.err == ""
    lines = told.out.splitlines()
    assert sum(line.startswith("ok ") and pattern in line for line in lines) == LINEARS
    left = {line.split()[2].rstrip(":") for line in lines if line.startswith("not pruned")}
    assert left == {"model.embed_tokens.weight", "lm_head.weight"}
    assert lines[-1] == (f"{LINEARS} linears checked, 2 tensors not pruned: all proved (6 files and the "
                         f"{LINEARS + 2 * tiny.BLOCKS + 3} tensors in them hashed)")


def test_quiet_prints_the_verdict_only(check):
    code, told = check(None, "2:4", "--quiet")
    assert code == 0 and len(told.out.splitlines()) == 1


@pytest.mark.parametrize("pattern", ["2:4", "0.3"])
def test_one_weight_made_nonzero(check, pattern):
    def change(W):
        W[first(W, True)] = 0.01
    code, told = check(in_weight(change), pattern)
    assert code == 1
    assert f"FAULT {UP}: pattern {pattern} does not hold" in told.out
    assert "1 faults" not in told.out and "BAD  " + UP in told.out
    assert told.out.count("BAD ") == 1


def test_one_weight_zeroed(check):
    """The pattern still holds; the count and the bytes do not."""
    def change(W):
        W[first(W, False)] = 0
    code, told = check(in_weight(change))
    assert code == 1 and f"FAULT {UP}: 769 zeros, recorded 768" in told.out and "does not hold" not in told.out


def test_one_weight_changed(check):
    """Pattern and count are right: only the bytes tell."""
    def change(W):
        W[first(W, False)] *= 1.5
    code, told = check(in_weight(change))
    assert code == 1 and f"FAULT {UP}: its bytes are not the recorded ones" in told.out
    assert told.out.count("FAULT") == 1


def test_zero_moved_within_the_group_of_a_row(check):
    """In an unstructured pattern counted by row, a row too few and a row too many do not cancel."""
    def change(W):
        W[first(W, True)] = 0.01  # in row 0
        W[1, int((W[1] != 0).nonzero()[0])] = 0
    code, told = check(in_weight(change), "0.3")
    assert code == 1 and f"{UP}: pattern 0.3 does not hold" in told.out and "zeros, recorded" not in told.out


def test_dtype_changed(check):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        tiny.change_weights(folder, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    code, told = check(change)
    assert code == 1 and f"{UP}: stored as bfloat16, recorded float32" in told.out


def test_linear_missing_from_the_manifest(check):
    code, told = check(in_manifest(lambda m: m["tensors"].pop(UP)))
    assert code == 1 and f"FAULT {UP}: can be pruned but is not in the manifest" in told.out


def test_entry_without_a_tensor(check):
    code, told = check(in_manifest(lambda m: m["tensors"].update({"model.layers.9.x": m["tensors"][UP]})))
    assert code == 1 and "FAULT model.layers.9.x: in the manifest but not in the model" in told.out


@pytest.mark.parametrize("change", [lambda entry: entry.pop("sha256"), lambda entry: entry.update(pattern="half"),
                                    lambda entry: entry.update(shape=None)])
def test_damaged_entry(check, change):
    code, told = check(in_manifest(lambda m: change(m["tensors"][UP])))
    assert code == 1 and f"FAULT {UP}" in told.out


def test_claimed_pattern_is_checked_not_believed(check):
    code, told = check(in_manifest(lambda m: m["tensors"][UP].update(pattern="1:4")))
    assert code == 1 and f"FAULT {UP}: pattern 1:4 does not hold" in told.out


def test_what_was_skipped_is_read_off_the_model(check):
    _, told = check(in_manifest(lambda m: m["record"].update(skipped=[])))
    assert "not pruned  lm_head.weight: output head" in told.out


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda f: (f / "oneshot.json").unlink(), "no oneshot.json"),
    (lambda f: (f / "oneshot.json").write_text("{"), "not readable as JSON"),
    (lambda f: (f / "oneshot.json").write_text('{"schema": 99}'), "another version"),
    (lambda f: (f / "oneshot.json").write_text('{"schema": 1}'), "damaged"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be loaded"),
    (lambda f: (f / "config.json").unlink(), "config.json"),
])
def test_nothing_to_check(check, spoil, words):
    code, told = check(spoil)
    assert code == 2 and told.out == ""
    assert told.err.startswith("error: ") and words in told.err and len(told.err.splitlines()) == 1


def test_folders_that_are_none_of_ours(place, tmp_path, capsys):  # noqa: F811
    for folder in (place / "model", tmp_path, tmp_path / "absent"):
        assert verify.main([str(folder)]) == 2
        told = capsys.readouterr()
        assert told.err.startswith("error: ") and len(told.err.splitlines()) == 1 and str(folder) in told.err


def test_the_folder_above_names_those_it_holds(saved, capsys):
    assert verify.main([str(saved["2:4"].parent)]) == 2
    assert "give one of saved-0.3, saved-2of4" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_what_is_proved(tmp_path, place, dtype, capsys):  # noqa: F811
    tiny.save_model(tmp_path / "model", dtype=dtype)
    argv = tiny.flags(place, "--no-dense", model=tmp_path / "model", save=tmp_path / "out", results=tmp_path / "runs",
                      method="sparsegpt", evaluate="none")
    assert tiny.main(*argv) == 0
    assert tiny.weights(tmp_path / "out")[f"{UP}.weight"].dtype == dtype
    assert verify.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count(str(dtype).removeprefix("torch.")) == LINEARS
