"""Proofs do not vanish under `python -O`, which drops every `assert`: nothing in the packages relies on one."""

import ast
from pathlib import Path

import tiny

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "oneshot", ROOT / "kernels" / "oneshot_kernels")

BROKEN = """
import importlib, pathlib, sys
import torch
import oneshot

root = pathlib.Path(oneshot.__file__).parent
[file] = [f for f in root.rglob("*.py") if "class Trainable" in f.read_text(encoding="utf-8")]
name = ".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
trainable = importlib.import_module(name).Trainable


def prune():
    model, tokenizer = oneshot.load("demo")
    oneshot.prune(model, tokenizer, method="magnitude", pattern="2:4", nsamples=2, seqlen=32, progress=False)


def train():
    linear = torch.nn.Linear(4, 4)
    linear.weight.data[0] = 0
    with trainable(linear, {"weight": torch.float32, "bias": torch.float32}):
        if broken:
            linear.weight.data.fill_(1.0)


def attempt(act):
    try:
        act()
        print(act.__name__, "goes through")
    except Exception as error:
        print(act.__name__, "raises", error)


broken = False
attempt(prune)
attempt(train)
broken = True
for module in [m for name, m in sys.modules.items() if name.startswith("oneshot.")]:
    for c in list(vars(module).values()):
        if isinstance(c, type) and "holds" in vars(c):
            c.holds = lambda self, weight: False
attempt(prune)
attempt(train)
"""


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


def test_a_broken_proof_raises():
    """A pattern that says it does not hold, a pruned weight that training brings back; first both in order."""
    done = tiny.python("-O", "-c", BROKEN)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["prune goes through", "train goes through"]
    assert lines[2].startswith("prune raises") and "pattern 2:4" in lines[2]
    assert lines[3].startswith("train raises") and "weight" in lines[3]
