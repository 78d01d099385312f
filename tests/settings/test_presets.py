"""Presets: made of flags that exist, what is given beside one wins, a changed one has a star."""

import pytest
import tiny

from oneshot.settings import flags, presets


@pytest.mark.parametrize("effort", presets.EFFORTS)
def test_every_effort_is_made_of_flags_that_exist(effort):
    [cfg] = [c for c in flags.parse(["--method", "best", "--effort", str(effort), "--pattern", "2:4"]) if c.prunes]
    given = presets.EFFORTS[effort][1]
    assert cfg.preset == f"best-{effort}" and cfg.method == given["method"]
    for name, value in given.items():
        part, dot, field = name.partition(".")
        owner = (cfg.solver | cfg.healing | cfg.allocation)[part] if dot else cfg
        assert getattr(owner, field or name) == value


def test_what_is_given_beside_a_preset_wins():
    [cfg] = [c for c in flags.parse(["--method", "best", "--pattern", "2:4", "--heal", "block", "--block.steps", "7"])
             if c.prunes]
    assert list(cfg.healing) == ["block"] and cfg.healing["block"].steps == 7


@pytest.mark.parametrize("effort", [0, 6])
def test_unknown_effort(effort, capsys):
    assert tiny.main("--method", "best", "--effort", effort) == 2
    assert f"--effort {effort}: give 1 to 5" in capsys.readouterr().err


def test_effort_without_best_is_refused(capsys):
    assert tiny.main("--method", "alps", "--pattern", "2:4", "--effort", "3") == 2
    assert "--effort 3: goes with --method best" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["best+refit", "wanda+best"])
def test_nothing_goes_before_or_behind_a_preset(method):
    with pytest.raises(ValueError, match=r"--method .*best is a whole recipe"):
        presets.expand(method, {})


def test_a_changed_preset_has_a_star():
    assert presets.expand("best", {})["preset"] == "best-3"
    assert presets.expand("best", {"nsamples": 4, "effort": 2})["preset"] == "best-2"
    for given in ({"heal": "block"}, {"distil.steps": 3}, {"dense_target": 0.1}, {"alps.rho": 0.3},
                  {"alps.refit_steps": 0}, {"distil.lr": 0.1}, {"allocate": "owl", "owl.spread": 0.1},
                  {"heal": "block", "block.lr": 0.1}, {"shared_inputs": True}):
        assert presets.expand("best", given)["preset"] == "best-3*", given


@pytest.mark.parametrize("methods", ["best,sparsegpt", "sparsegpt,best", "best", "sparsegpt"])
def test_a_preset_is_the_same_beside_another_method_whose_blocks_are_folded(methods):
    runs = flags.parse(["--method", methods, "--pattern", "2:4", "--shrink", "0.75", "--no-dense"])
    want = {"best": ("best-3*", "block,distil"), "sparsegpt": (None, "fold")}
    assert [(r.preset, r.heal) for r in runs] == [want[method] for method in methods.split(",")]


def test_a_flag_for_another_methods_part_is_no_star():
    runs = flags.parse(["--method", "best,sparsegpt", "--pattern", "2:4", "--sparsegpt.damping", "0.1", "--no-dense"])
    assert [r.preset for r in runs] == ["best-3", None]
    runs = flags.parse(["--method", "best", "--effort", "1", "--pattern", "2:4", "--sparsegpt.damping", "0.1"])
    assert runs[0].preset == "best-1*"
