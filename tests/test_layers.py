"""Who may import whom: a folder is a stage, and imports go only to earlier stages. Read off every module's imports.

A new stage gets its place in STAGES; a new file in a folder needs nothing.
"""

import ast
import functools
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STAGES = ("runtime", "models", "data", "calibrate", "prune", "structured", "quantise", "heal", "measure", "settings",
          "checkpoint", "report", "pipeline")
METHODS = ("prune.solvers", "prune.allocate", "heal", "measure")  # `names()` of these lists files that stand alone
PURE = {"runtime.flag", "calibrate.statistics",  # what solvers and allocations see
        *(f"prune.{own}" for own in ("cholesky", "linalg", "patterns"))}
ONLY_IN = {  # library: the stages, or the one file, that know it
    "transformers": {"models", "checkpoint.packed", "heal.text.trainer"},
    "datasets": {"data.hub"},
    "lm_eval": {"measure"},
    "matplotlib": {"report.figures"},
    "jinja2": {"report.page"},
    "compressed_tensors": {"checkpoint.compressed"},
    "oneshot_kernels": {"checkpoint", "pipeline", "prune.solvers.sparsegpt", "runtime.environment"},
}
INSIDE_FUNCTIONS = {"lm_eval", "matplotlib", "datasets", "compressed_tensors"}  # optional or slow to import
MANY = ["oneshot.data.training.prepare", "oneshot.data.windows.calibration",
        "oneshot.runtime.flag.flag"]  # named arguments, in one place each
KERNELS_MAY = {"torch", "triton", "oneshot_kernels"}


@functools.cache
def sources():
    """{dotted module name: source} of oneshot/ and kernels/."""
    found = {}
    for root, package in ((ROOT, "oneshot"), (ROOT / "kernels", "oneshot_kernels")):
        for path in sorted((root / package).rglob("*.py")):
            found[".".join(path.relative_to(root).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return found


def imports(name, source, known):
    """[(dotted name of what is imported, whether inside a function, line)] of one module.

    `from . import a` is the module a where there is one, else the package. `known`: names of all modules.
    """
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            line = getattr(child, "lineno", 0)
            if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                continue  # never run
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside, line) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name.split(".")[:-child.level]
                    base = ".".join(package + ([base] if base else []))
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    is_module = full in known or f"{full}.__init__" in known
                    found.append((full if is_module else base, inside, line))
            elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                called = getattr(child.func, "attr", getattr(child.func, "id", ""))
                if called in ("import_module", "__import__"):
                    found.append((str(child.args[0].value), inside, line))
            walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(ast.parse(source), False)
    return found


def within(target, place):
    """Whether a dotted name below oneshot is a place or lies in it."""
    return target == place or target.startswith(f"{place}.")


def stage_of(name):
    """"prune" of oneshot.prune.solvers.wanda; "" of oneshot itself and the thin modules on top."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 else ""


def stands_alone(name):
    """The package of methods that a module is one of, or None."""
    package = next((p for p in METHODS if within(name.removeprefix("oneshot."), p)), None)
    if not package or name.endswith("__init__"):
        return None
    found = importlib.import_module(f"oneshot.{package}").names()
    methods = [m for part in found.values() for m in part] if isinstance(found, dict) else found
    return package if name.rpartition(".")[2] in methods else None


def forbidden(name, target, inside, scripts):
    """Why the module `name` must not import `target`, or None."""
    root, here, there = target.split(".")[0], name.partition(".")[2], target.partition(".")[2]
    if root == "scripts" or root in scripts:
        return "nobody imports scripts"
    if name.startswith("oneshot_kernels"):
        stranger = root not in KERNELS_MAY and root not in sys.stdlib_module_names
        return "kernels know torch and triton only" if stranger else None
    if root != "oneshot":
        if root in ONLY_IN and not any(within(here, place) for place in ONLY_IN[root]):
            return f"only in {', '.join(sorted(ONLY_IN[root]))}"
        return "only inside the function that needs it" if root in INSIDE_FUNCTIONS and not inside else None
    stage, other = stage_of(name), stage_of(f"{target}.x")
    if not stage or not other:
        return None  # what stands on top of the stages, or the bare package with its version
    if STAGES.index(other) > STAGES.index(stage):
        return f"{other} comes after {stage}"
    pure = next((p for p in ("prune.solvers", "prune.allocate") if within(here, p)), None)
    if pure and there != pure and not within(there, pure) and there not in PURE:
        return f"solvers and allocations see {', '.join(sorted(PURE))} only"
    if (package := stands_alone(target)) and within(here, package) and target != name:
        return "methods do not import each other"
    return None


def breaches(files, known, scripts=()):
    """One line for each import in `files` {dotted name: source} that the house does not allow."""
    found = []
    for name, source in files.items():
        if name.startswith("oneshot.") and stage_of(name) not in ("", "demo", *STAGES):
            found.append(f"{name}: its folder has no place in STAGES yet")
            continue
        for target, inside, line in imports(name, source, known):
            if why := forbidden(name, target, inside, scripts):
                found.append(f"{name}:{line} imports {target}: {why}")
    return found


def test_imports_go_only_to_earlier_stages():
    scripts = {p.stem for p in (ROOT / "scripts").rglob("*.py")}
    assert not (found := breaches(sources(), sources(), scripts)), "\n".join(found)


def test_every_folder_is_a_stage():
    folders = {p.name for p in (ROOT / "oneshot").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders - {"demo"} <= set(STAGES)
    assert [s for s in STAGES if s in folders] and not (ROOT / "kernels" / "__init__.py").exists()  # see architecture


def test_there_is_something_to_check():
    files = sources()
    assert {"oneshot.prune.patterns", "oneshot.prune.solvers.wanda", "oneshot_kernels.ops"} <= set(files)
    assert {t for t, _, _ in imports("oneshot.prune.solvers.wanda", files["oneshot.prune.solvers.wanda"], files)} >= \
        {"torch", "oneshot.prune.patterns", "oneshot.prune.solvers"}


def test_files_and_functions_stay_small():
    """No file above 300 lines; no function above seven parameters, except for those in MANY."""
    files = [p for folder in ("oneshot", "kernels", "scripts") for p in (ROOT / folder).rglob("*")
             if p.suffix in (".py", ".cpp", ".h", ".j2", ".css")]
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p in files
            if (n := len(p.read_text(encoding="utf-8").splitlines())) > 300]
    assert len(files) > 200 and not long, "\n".join(long)
    many = [f"{name}.{found}" for name, source in sources().items()
            if stage_of(name) in STAGES for found in crowded(source)]
    assert [line.partition(":")[0] for line in many] == MANY, "\n".join(many)


def crowded(source):
    """["name: n parameters"] of the functions of a module that have more than seven."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg,
                                node.args.kwarg) if a is not None and a.arg not in ("self", "cls")]
            found += [f"{node.name}: {len(args)} parameters"] if len(args) > 7 else []
    return found


def test_a_crowded_function_is_found():
    assert crowded("def f(a, b, c, d, *, e, f, **g): pass") == []
    assert crowded("class A:\n    def g(self, a, b, c, d, e, f, g, *h): pass") == ["g: 8 parameters"]


@pytest.mark.parametrize("name, source, why", [
    ("oneshot.prune.patterns", "from ..settings.config import RunConfig", "settings comes after prune"),
    ("oneshot.models.weights", "from .. import calibrate", "calibrate comes after models"),
    ("oneshot.prune.solvers.wanda", "from . import magnitude", "do not import each other"),
    ("oneshot.prune.solvers.wanda", "from .magnitude import prune", "do not import each other"),
    ("oneshot.prune.solvers.wanda", "import oneshot.models", "solvers and allocations see"),
    ("oneshot.prune.solvers.wanda", "def f():\n    from ...runtime.files import sync", "solvers and allocations see"),
    ("oneshot.prune.solvers.wanda", "from .. import loop, patterns", "solvers and allocations see"),
    ("oneshot.prune.allocate.owl", "from ..solvers import wanda", "solvers and allocations see"),
    ("oneshot.prune.loop", "import oneshot.checkpoint.folder as e", "checkpoint comes after prune"),
    ("oneshot.prune.loop", "importlib.import_module('oneshot.report')", "report comes after prune"),
    ("oneshot.heal.block", "from .distil import LOGITS", "do not import each other"),
    ("oneshot.measure.damage", "from .divergence import metrics", "do not import each other"),
    ("oneshot.calibrate.activations", "from transformers import AutoConfig", "only in"),
    ("oneshot.measure.tasks", "import lm_eval", "inside the function"),
    ("oneshot.measure.tasks", "def f():\n    import datasets", "only in data.hub"),
    ("oneshot.data.hub", "import datasets", "inside the function"),
    ("oneshot.report.figures.depth", "class A:\n    from matplotlib import pyplot", "inside the function"),
    ("oneshot.report.tables", "def f():\n    import matplotlib", "only in report.figures"),
    ("oneshot.measure.speed", "import oneshot_kernels", "only in"),
    ("oneshot.pipeline.run", "import scripts.bench", "nobody imports scripts"),
    ("oneshot.pipeline.run", "import bench_prune", "nobody imports scripts"),
    ("oneshot.newcomer.a", "", "STAGES"),
    ("oneshot_kernels.ops", "from oneshot.prune import patterns", "torch and triton only"),
    ("oneshot_kernels.ops", "def f():\n    import transformers", "torch and triton only"),
])
def test_a_breach_is_found(name, source, why):
    found = breaches({name: source}, sources(), {"bench_prune"})
    assert found and all(line.startswith(name) and why in line for line in found), found


@pytest.mark.parametrize("name, source", [
    ("oneshot.prune.solvers.refit", "import torch\nfrom . import Solution\nfrom ..linalg import upper_factor"),
    ("oneshot.prune.solvers.refit", "from oneshot.prune.solvers import Solution\nfrom ...runtime.flag import flag"),
    ("oneshot.report.figures.depth", "from .. import columns\ndef f():\n    import matplotlib.figure"),
    ("oneshot.checkpoint.folder", "from .. import __version__, models\nimport oneshot_kernels"),
    ("oneshot.measure.tasks", "from . import losses\nfrom .. import models"),
    ("oneshot.pipeline.run", "from ..prune import loop\nfrom ..measure.perplexity import perplexity"),
    ("oneshot.__main__", "from .pipeline.run import main"),
    ("oneshot_kernels.ops", "import torch, triton, os\nfrom . import dispatch\nfrom .reference import pack"),
])
def test_what_is_allowed_passes(name, source):
    assert breaches({name: source}, sources()) == []


def test_no_merge_left_its_marks():
    marks = ("<" * 7 + " ", ">" * 7 + " ")
    files = [p for folder in ("oneshot", "kernels", "scripts", "tests", "results") for p in (ROOT / folder).rglob("*.*")
             if p.suffix in (".py", ".md", ".csv", ".yaml")] + [ROOT / "README.md"]
    assert len(files) > 50
    assert not [p for p in files if any(line.startswith(marks) for line in p.read_text(encoding="utf-8").splitlines())]
