"""CONTRIBUTING's worked examples, as they stand there: one new file each, and nothing else changes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"`(oneshot/\S+\.py)`, complete:\n\n```python\n(.*?)```", TEXT, re.S))
SMALL = ["--pattern", "2:4", "--nsamples", "4", "--seqlen", "64", "--eval-windows", "2", "--no-progress"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package with the examples in it."""
    root = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "oneshot", root / "oneshot", ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in EXAMPLES.items():
        assert not (ROOT / path).exists()
        (root / path).write_text(code, encoding="utf-8")
    return root


def python(tree, *command):
    """Standard output of a process that finds the copied package."""
    path = os.pathsep.join([str(tree), str(ROOT / "kernels"), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=tree,
                          env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_there_are_three_and_a_solver_is_short():
    assert sorted(Path(p).parts[1] for p in EXAMPLES) == ["heal", "measure", "prune"]
    solver, = (code for path, code in EXAMPLES.items() if "solvers" in path)
    assert len(solver.splitlines()) <= 30


def test_help_lists_their_flags(tree):
    text = python(tree, "-m", "oneshot", "prune", "--help")
    for words in ("--method fluctuation", "--fluctuation.power", "--worst-tokens", "--heal vectors", "--vectors.lr"):
        assert words in text


def test_a_run_uses_all_three(tree):
    text = python(tree, "-m", "oneshot", "prune", "--method", "fluctuation+refit", "--fluctuation.power", "1.5",
                  "--worst-tokens", "--heal", "vectors", "--vectors.steps", "4", "--results", "runs", *SMALL)
    assert "fluctuation+refit, vectors" in text and "builtin loss_p99" in text
    page = next(tree.glob("runs/*.html")).read_text(encoding="utf-8")
    assert "worst_tokens" in page and "loss_p99" in page and "fluctuation.power" in page


def test_the_contracts_tests_run_on_them(tree):
    """The same test files, collected on the copied package: the new names are among the cases, and pass."""
    files = [str(p) for p in (ROOT / "tests").rglob("test_*.py") if p.name in ("test_solvers.py", "test_contract.py")]
    text = python(tree, "-m", "pytest", *files, "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-k",
                  "fluctuation or vectors", "--no-header", "-o", f"pythonpath={tree} {ROOT}/tests {ROOT}/kernels")
    assert re.search(r"\d+ passed", text) and "failed" not in text
