"""Flags: ours, every solver's, and those of wanda's main.py with their meaning there."""

import dataclasses

import pytest
import tiny
import torch

from oneshot.pipeline import generate
from oneshot.prune import solvers
from oneshot.prune.options import Options
from oneshot.settings import flags
from oneshot.settings.config import RunConfig

SMALLER = {"shrink": 0.7, "drop": "3,7", "shrink_method": "wanda", "shrink_target": 0.5,
           "heal_tokens": "20k", "heal_loss": "next"}  # values that can be


def one(*argv):
    """The only pruned run of a command line."""
    runs = [cfg for cfg in flags.parse([str(a) for a in argv]) if cfg.method != "dense"]
    assert len(runs) == 1
    return runs[0]


def wanda(*argv):
    """The only run of a command line in wanda's flags."""
    [cfg] = flags.parse(["--model", "m", "--prune_method", "wanda", *map(str, argv)])
    return cfg


# ---------------------------------------------------------------- our flags

def test_no_flags_is_the_demo():
    runs = flags.parse([])
    assert [(r.method, r.pattern) for r in runs] == [
        ("magnitude", "0.5"), ("wanda", "0.5"), ("sparsegpt", "0.5"),
        ("magnitude", "2:4"), ("wanda", "2:4"), ("sparsegpt", "2:4"), ("dense", "dense")]
    assert {(r.model, r.calibration, r.evaluate, r.save) for r in runs} == {("demo", "builtin", "builtin", None)}


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(RunConfig) if f.metadata], ids=lambda f: f.name)
def test_every_setting_has_its_flag(field):
    flag, default = "--" + field.name.replace("_", "-"), field.default
    if isinstance(default, bool):
        flag = flag.replace("--", "--no-") if default else flag
        argv, want = [flag], not default
    elif choices := field.metadata.get("choices"):
        argv, want = [flag, choices[-1]], choices[-1]
    else:
        want = {"method": "wanda", "pattern": "0.25", "group": "row", "allocate": "owl", "heal": "block",
                "dense_target": 0.5, "effort": 2, "quantise": "int4", "quantiser": "rtn",
                **SMALLER}.get(field.name) or (
            7.0 if field.type is float else 7 if field.type in (int, int | None) else "some/where")
        argv = [flag, str(want)]
    method = "best" if field.name == "effort" else "wanda"
    base = [] if field.name in ("method", "pattern") else ["--method", method, "--pattern", "0.5"]
    for spelling in (argv, [argv[0].replace("-", "_").replace("__", "--", 1), *argv[1:]]):
        runs = flags.parse([*base, *spelling])
        if field.name == "dense":  # the row is there or not, and its flag has done its work
            assert [r.method for r in runs] == ["wanda"]
        else:
            assert {getattr(r, field.name) for r in runs if r.method != "dense"} == {want}


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_a_gpu_where_one_is(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for argv, device in (([], "cuda" if there else "cpu"), (["--device", "auto"], "cuda" if there else "cpu"),
                         (["--device", "cpu"], "cpu"), (["--device", "cuda:1"], "cuda:1")):
        assert {cfg.device for cfg in flags.parse(argv)} == {device}
    assert Options().device == generate.arguments(["demo"]).device == ("cuda" if there else "cpu")


def test_solver_flags():
    cfg = one("--method", "sparsegpt", "--pattern", "0.5", "--sparsegpt.damping", "0.1", "--sparsegpt.block_size=64")
    assert (cfg.solver["sparsegpt"].damping, cfg.solver["sparsegpt"].block_size) == (0.1, 64)
    assert one("--method", "wanda", "--pattern", "0.5", "--wanda.use-variant").solver["wanda"].use_variant
    assert one("--method", "wanda", "--pattern", "0.5", "--use_variant").solver["wanda"].use_variant
    assert not one("--method", "wanda", "--pattern", "0.5").solver["wanda"].use_variant


def test_equals_sign_and_values_with_underscores():
    cfg = one("--method=wanda", "--pattern=0.5", "--eval_seqlen=9", "--results", "my_runs", "--data-config=a_b-c")
    assert (cfg.eval_seqlen, cfg.results, cfg.data_config) == (9, "my_runs", "a_b-c")


def test_several_methods_and_patterns_get_a_folder_each():
    runs = flags.parse(["--method", "wanda, sparsegpt,wanda", "--pattern", "0.5,2:4", "--save", "out"])
    folders = ["out/wanda-0.5", "out/sparsegpt-0.5", "out/wanda-2of4", "out/sparsegpt-2of4"]
    assert [r.save for r in runs] == [*folders, None]
    assert one("--method", "wanda", "--pattern", "2:4", "--save", "out").save == "out"


def test_dense_row():
    both = ["--method", "wanda", "--pattern", "2:4"]
    assert [r.method for r in flags.parse(both)] == ["wanda", "dense"]
    assert [r.method for r in flags.parse([*both, "--no-dense"])] == ["wanda"]
    assert [r.method for r in flags.parse(["--method", "dense"])] == ["dense"]
    assert [r.method for r in flags.parse(["--method", "dense,wanda", "--pattern", "2:4", "--no-dense"])] == \
        ["wanda", "dense"]


def test_quantised_rows():
    runs = flags.parse(["--method", "wanda", "--pattern", "2:4,0.6", "--quantised", "--save", "out", "--damage"])
    assert [(r.method, r.pattern, r.save is None) for r in runs] == [
        ("wanda", "2:4", False), ("wanda", "0.6", False), ("rtn", "int8", True), ("rtn", "int7", True),
        ("rtn", "int4", True), ("dense", "dense", True)]
    assert [("damage" in r.settings(), "nsamples" in r.settings()) for r in runs[1:]] == [
        (True, True), *[(True, False)] * 3, (False, False)]


@pytest.mark.parametrize("text", ["none", "", " a.txt , b.txt"])
def test_evaluations(text):
    assert RunConfig(evaluate=text, pattern="0.5").evaluations == (["a.txt", "b.txt"] if "a" in text else [])


# ---------------------------------------------------------------- wanda's main.py

@pytest.mark.parametrize(("argv", "pattern"), [
    (["--sparsity_ratio", "0.5", "--sparsity_type", "unstructured"], "0.5"),
    (["--sparsity_ratio", "0.6"], "0.6"), (["--sparsity-ratio=0.123456789"], "0.123456789"),
    (["--sparsity_ratio", "0.5", "--sparsity_type", "2:4"], "2:4"), (["--sparsity_type", "4:8"], "4:8")])
def test_wanda_sparsity(argv, pattern):
    cfg = wanda(*argv)
    assert (cfg.method, cfg.pattern, cfg.group) == ("wanda", pattern, None)


def test_wanda_script_line():
    """scripts/llama_7b.sh of wanda's repository, with `python main.py` replaced."""
    line = ("--model huggyllama/llama-7b --prune_method sparsegpt --sparsity_ratio 0.5 --sparsity_type unstructured "
            "--save out/llama_7b/unstructured/sparsegpt/")
    [cfg] = flags.parse(line.split())
    assert (cfg.model, cfg.method, cfg.pattern) == ("huggyllama/llama-7b", "sparsegpt", "0.5")
    assert (cfg.results, cfg.save) == ("out/llama_7b/unstructured/sparsegpt/", None), "--save is the results folder"
    assert (cfg.calibration, cfg.evaluate, cfg.nsamples, cfg.seed) == ("c4", "wikitext2", 128, 0)


def test_wanda_saves_only_with_save_model():
    cfg = wanda("--sparsity_ratio", 0.5, "--save", "log", "--save_model", "model", "--cache_dir", "here", "--seed", 3,
                "--nsamples", 4, "--use_variant")
    assert (cfg.results, cfg.save, cfg.cache_dir, cfg.seed, cfg.nsamples) == ("log", "model", "here", 3, 4)
    assert cfg.solver["wanda"].use_variant
    assert wanda("--sparsity_ratio", 0.5).results == RunConfig.results
    assert one("--method", "wanda", "--pattern", "2:4", "--save", "out").results == RunConfig.results


def test_own_texts_go_before_wandas():
    cfg = wanda("--sparsity_ratio", 0.5, "--calibration", "builtin", "--evaluate", "builtin")
    assert (cfg.calibration, cfg.evaluate) == ("builtin", "builtin")


def test_wanda_prunes_nothing_at_ratio_0():
    assert [wanda(*argv).method for argv in ([], ["--sparsity_ratio", 0], ["--use_variant"])] == ["dense"] * 3


def test_variant_is_overlooked_with_other_methods_as_there():
    [cfg] = flags.parse(["--prune_method", "magnitude", "--sparsity_ratio", "0.5", "--use_variant"])
    assert set(cfg.solver) == {"magnitude"}


def test_zero_shot_means_the_seven_tasks():
    assert wanda("--sparsity_ratio", 0.5, "--eval_zero_shot").task_names == ["zeroshot7"]
    assert wanda("--sparsity_ratio", 0.5).task_names == []


@pytest.mark.parametrize(("argv", "named"), [
    (["--prune_method", "ablate_wanda_seq"], "--prune_method"),
    (["--prune_method", "wanda", "--sparsity_type", "1:4"], "--sparsity_type"),  # there: ONE of four goes
    (["--prune_method", "wanda", "--sparsity_type", "2:4", "--sparsity_ratio", "0.6"], "--sparsity_ratio"),
    (["--prune_method", "wanda", "--sparsity_ratio", "1.0"], "--sparsity_ratio"),
    (["--prune_method", "wanda", "--sparsity_ratio", "nan"], "--sparsity_ratio"),
    (["--prune_method", "wanda", "--save_model", "out"], "--save_model out: nothing is pruned"),
    (["--prune_method", "wanda", "--pattern", "2:4"], "--pattern"),
    (["--save_model", "out"], "--save_model")])
def test_wanda_flags_that_do_not_fit(argv, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        flags.parse(argv)


# ---------------------------------------------------------------- run_id

def changed(cfg, field):
    """The config with another value of one field."""
    old = getattr(cfg, field.name)
    other = {"method": "sparsegpt", "pattern": "0.25", "group": "row", "dense_target": 0.5, "quantise": "int4",
             "quantiser": "rtn", **SMALLER}.get(field.name) or {"order": "influence", "by": "bytes"}.get(field.name)
    new = other or (not old if isinstance(old, bool) else (old or 2) + 1 if field.type in (int, int | None, float)
                    else "bfloat16" if "dtype" in field.name else "other")
    return dataclasses.replace(cfg, **{field.name: new})


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(RunConfig) if f.metadata], ids=lambda f: f.name)
def test_run_id_changes_with_any_setting_but_not_with_output_flags(field):
    cfg = one("--method", "wanda", "--pattern", "0.5")
    same = changed(cfg, field).run_id("weights", "data") == cfg.run_id("weights", "data")
    assert same == (field.name in ("cache_dir", "save", "overwrite", "results", "dense", "progress", "trust_task_code",
                                   "effort", "quantised", "heal_cache", "offload"))


def test_run_id_changes_with_weights_data_and_solver_settings():
    cfg = one("--method", "wanda", "--pattern", "0.5")
    variant = one("--method", "wanda", "--pattern", "0.5", "--use_variant")
    ids = {cfg.run_id("w", "d"), cfg.run_id("v", "d"), cfg.run_id("w", "e"), cfg.run_id("w", None),
           cfg.run_id("w", "d", "evaluation"), variant.run_id("w", "d")}
    assert len(ids) == 6
    assert all(i.startswith("demo-wanda-0.5-") for i in ids)
    named = one("--model", "some/a: b?", "--pattern", "2:4", "--method", "wanda").run_id("w")
    assert named.startswith("a_ b_-wanda-2of4-")  # the record is a file on Windows too


def test_run_id_of_the_dense_row_heeds_only_what_bears_on_it():
    def dense(*argv):
        return flags.parse(["--method", "dense", *argv])[0].run_id("w")
    assert dense() == dense("--nsamples", "4", "--pattern", "0.1", "--calibration", "c4")
    assert len({dense(), dense("--eval-seqlen", "8"), dense("--evaluate", "c4"), dense("--dtype", "float16")}) == 4


# ---------------------------------------------------------------- help

def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in dataclasses.fields(RunConfig):
        assert not field.metadata or f"-{field.name.replace('_', '-')}" in text
    for name in solvers.names()["solver"]:
        assert f"--method {name}" in text
    for words in ("--sparsegpt.damping", "(default: 0.01)", "--prune_method", "--eval_zero_shot", "examples:",
                  "2 of 4 are KEPT", "do not measure the dense model", "do not show progress bars"):
        assert words in " ".join(text.split()), words
    assert "not: " not in text and "None)" not in text
    assert max(map(len, flags.EXAMPLES.splitlines())) <= 120


def test_help_starts_without_what_it_does_not_need():
    """One process: --help of both programs, and what they have imported."""
    done = tiny.python("-c", "import sys, runpy\n"
                       "for name in ('oneshot.run', 'oneshot.verify'):\n"
                       "    sys.argv = [name, '--help']\n"
                       "    try: runpy.run_module(name, run_name='__main__')\n"
                       "    except SystemExit as stop: assert stop.code == 0\n"
                       "print(*[m for m in ('transformers.modeling_utils', 'datasets', 'matplotlib', 'lm_eval') "
                       "if m in sys.modules], file=sys.stderr)")
    assert done.returncode == 0 and done.stderr.strip() == ""
    assert "usage: oneshot prune" in done.stdout and "usage: oneshot verify" in done.stdout


def test_flags_reach_their_own_part():
    given = {"method": "wanda", "pattern": "0.5", "wanda.use_variant": True, "sparsegpt.damping": 3.0,
             "heal": "block", "block.steps": 7, "distil.steps": 9, "allocate": "owl", "owl.spread": 0.1}
    cfg = flags.build(given)
    assert list(cfg.solver) == ["wanda"] and cfg.solver["wanda"].use_variant
    assert list(cfg.healing) == ["block"] and cfg.healing["block"].steps == 7
    assert list(cfg.allocation) == ["owl"] and cfg.allocation["owl"].spread == 0.1
