"""Proofs do not vanish under `python -O`, which drops every `assert`: nothing in the packages relies on one."""

import ast
from pathlib import Path

import pytest
import tiny

from oneshot.runtime.proof import ProofError, prove

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "oneshot", ROOT / "kernels" / "oneshot_kernels")

BROKEN = """
import gc
import importlib._bootstrap_external as external
gc.disable()  # it would go over all of torch again and again


def compiled(path, *more, real=external.cache_from_source, **named):
    # libraries as they were compiled when installed: -O would compile all of torch and transformers anew
    return real(path, *more, **({"optimization": ""} if "site-packages" in str(path) else {}) | named)


external.cache_from_source = compiled
import pathlib, sys, tempfile, unittest.mock
import families, jobs, tiny, torch
import oneshot
from oneshot.heal import distil, train
from oneshot.prune.solvers import wanda
from oneshot.report import page
from oneshot.runtime.proof import ProofError

solve, fit = wanda.prune, train.fit
page._pictures = lambda records: []
place = tiny.make(pathlib.Path(tempfile.mkdtemp()))


def prune(**more):
    oneshot.prune(families.tiny("llama"), method="wanda", calibration=jobs.tokens(4), progress=False, **more)


def save(name="out"):
    if tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", save=place / name)):
        sys.exit("not saved")


def one_too_many(W, statistics, pattern, cfg):
    solution = solve(W, statistics, pattern, cfg)
    solution.mask[0, 0] ^= True
    return solution


def more_than_its_mask(W, statistics, pattern, cfg):
    solution = solve(W, statistics, pattern, cfg)
    return type(solution)(W.clone(), solution.mask)


def brings_back(trainable, *args, **more):
    told = fit(trainable, *args, **more)
    for name, mask in trainable.masks.items():
        trainable.parameters[name].data[~mask] = 1.0
    return told


def heals_all(healer, model, dense):
    for p in model.model.layers.parameters():
        p.data.fill_(1.0)
    return {"warnings": []}


def loses_one(model, folder, **more):
    real(model, folder, **more)
    tiny.change_weights(pathlib.Path(folder), lambda tensors: tensors.pop("model.norm.weight"))


def attempt(name, act, owner=None, attribute=None, broken=None):
    try:
        with unittest.mock.patch.object(owner, attribute, broken) if owner else unittest.mock.MagicMock():
            act()
        print(name, "goes through", sep=": ")
    except ProofError as error:
        print(name, error, sep=": ")


from transformers import PreTrainedModel
real = PreTrainedModel.save_pretrained
healing = {"heal": "distil", "parts": {"distil.steps": 1}}
print("asserts", "stay" if __debug__ else "are gone", sep=": ")
attempt("prune", lambda: prune(**healing))
attempt("save", save)
attempt("a solver that keeps one too many", prune, wanda, "prune", one_too_many)
attempt("a solver that keeps more than its mask", prune, wanda, "prune", more_than_its_mask)
attempt("training that brings weights back", lambda: prune(**healing), distil, "fit", brings_back)
attempt("a healer that fills all weights", lambda: prune(**healing), distil.Heal, "after_model", heals_all)
attempt("saving that loses a tensor", lambda: save("lost"), PreTrainedModel, "save_pretrained", loses_one)
"""


@pytest.fixture(scope="module")
def told():
    """{what was done: how it ended} of a process without assert statements."""
    done = tiny.python("-O", "-c", BROKEN)
    assert done.returncode == 0, done.stderr
    lines = (line.partition(": ") for line in done.stdout.splitlines())
    found = {name: text for name, colon, text in lines if colon}
    assert found["asserts"] == "are gone"
    return found


@pytest.mark.parametrize("what", ["prune", "save"])
def test_what_is_in_order_goes_through(told, what):
    assert told[what] == "goes through"


@pytest.mark.parametrize("what, named", [
    ("a solver that keeps one too many", "model.layers.0.self_attn.q_proj: pattern 2:4 broken"),
    ("a solver that keeps more than its mask", "model.layers.0.self_attn.q_proj: pattern 2:4 broken"),
    ("training that brings weights back", "0.self_attn.q_proj.weight: a pruned weight came back"),
    ("a healer that fills all weights", "model.layers.0.self_attn.q_proj: pattern 2:4 broken"),
    ("saving that loses a tensor", "such as ['model.norm.weight']")])
def test_a_broken_promise_raises(told, what, named):
    """Under `python -O`, too; the message names the tensor."""
    assert named in told[what] and "please report it" in told[what]


def test_a_proof_that_holds_says_nothing():
    assert prove(True, "all") is None
    with pytest.raises(ProofError, match=r"^the count is wrong; "):
        prove(False, "the count is wrong")
    assert issubclass(ProofError, RuntimeError)  # no ValueError: what a user can mend is told apart


def jitted(node):
    """Is this a function that Triton compiles? What it asserts is Triton's own."""
    return isinstance(node, ast.FunctionDef) and any(
        "jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in node.decorator_list)


def asserts(tree):
    """Lines of the assert statements outside of Triton's functions."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Assert):
            found.append(node.lineno)
        waiting += [child for child in ast.iter_child_nodes(node) if not jitted(child)]
    return sorted(found)


def test_no_assert_is_left():
    files = [file for package in PACKAGES for file in sorted(package.rglob("*.py"))]
    assert len(files) > 40
    found = [f"{file.relative_to(ROOT)}:{line}" for file in files
             for line in asserts(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found, "raise an error instead: python -O drops these"


def test_asserts_are_found():
    source = ("assert 1\ndef f():\n    if g:\n        assert 2\n"
              "@triton.jit\ndef k():\n    tl.static_assert(3)\n    assert 4\n"
              "@triton.autotune(configs)\n@triton.jit(debug=True)\ndef l():\n    assert 5\n"
              "class A:\n    @property\n    def p(self):\n        assert 6\n")
    assert asserts(ast.parse(source)) == [1, 4, 16]
