"""Who may import whom: the picture in the architecture, checked by reading the imports of every module.

A new module of oneshot gets a line in MAY; a new file in a folder needs none.
"""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BASE = {"patterns", "statistics", "environment", "config", "perturb"}  # 0
MATHS = {"linalg", "solvers", "allocate"}  # 1
DATA = {"models", "data", "sources", "capture", "collect", "texts"}  # 2
PRUNE = {"loop", "health", "structured", "recovery"}  # 3
SHOW = {"accuracy", "evaluate", "export", "packed", "report", "tables", "task_table", "page", "drawing",  # 4
        "figures", "frontier"}
STORY = {"__init__", "__main__", "api", "checks", "cli", "run", "measure", "summary", "presets", "verify",  # 5
         "generate", "compare"}
FOR_SOLVERS = frozenset({"patterns", "statistics", "linalg"})
ALL = BASE | MATHS | DATA | PRUNE | SHOW | STORY | {"demo"}

MAY = {  # part of oneshot: the parts it may import, itself always included
    **dict.fromkeys(BASE | {"demo"}, frozenset()), "config": {"patterns"},
    **dict.fromkeys(MATHS, FOR_SOLVERS), **dict.fromkeys(DATA | PRUNE, BASE | MATHS | DATA),
    "loop": BASE | MATHS | DATA | {"health"},
    "evaluate": BASE | MATHS | DATA | {"loop"}, "packed": BASE | MATHS | DATA,
    "export": BASE | MATHS | DATA | {"packed", "report", "page"},
    "accuracy": set(), "report": {"accuracy"}, "tables": {"accuracy", "report"},
    "task_table": {"accuracy", "report", "tables"}, "drawing": {"report"},
    "figures": {"accuracy", "report", "drawing"}, "frontier": {"report", "drawing", "figures"},
    "page": {"accuracy", "report", "drawing", "figures", "frontier", "tables", "task_table"},
    **dict.fromkeys(STORY, ALL),
}
ALONE = {"solvers", "allocate"}  # folders whose files do not import each other
ONLY_IN = {
    "transformers": {"models", "packed"},  # packed is a format that transformers itself loads
    "datasets": {"sources"},
    "oneshot_kernels": {"export", "packed"} | STORY,
}
INSIDE_FUNCTIONS = {"lm_eval", "matplotlib", "datasets"}  # optional or slow to import
NO_TORCH = {"accuracy", "report", "tables", "task_table", "page", "drawing", "figures", "frontier"}
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


def part_of(dotted):
    """"solvers" of oneshot.solvers.wanda; "__init__" of oneshot itself."""
    return [*dotted.split("."), "__init__"][1]


def breaches(files, known, scripts=()):
    """One line for each import in `files` {dotted name: source} that the picture does not allow."""
    found = []
    for name, source in files.items():
        top, part = name.split(".")[0], part_of(name)
        if top == "oneshot" and part not in MAY:
            found.append(f"{name}: has no place in the picture yet, give it a line in MAY")
            continue
        for target, inside, line in imports(name, source, known):
            why = forbidden(name, top, part, target, inside, scripts)
            if why:
                found.append(f"{name}:{line} imports {target}: {why}")
    return found


def forbidden(name, top, part, target, inside, scripts):
    """Why the module `name` must not import `target`, or None."""
    root = target.split(".")[0]
    if root == "scripts" or root in scripts:
        return "nobody imports scripts"
    if top == "oneshot_kernels":
        stranger = root not in KERNELS_MAY and root not in sys.stdlib_module_names
        return "kernels know torch and triton only" if stranger else None
    if root == "oneshot":
        other = part_of(target)
        if other not in (part, "__init__") and other not in MAY[part]:
            return f"{part} may import {', '.join(sorted(MAY[part])) or 'no part of oneshot'}"
        own_folder = f"oneshot.{part}"
        if part in ALONE and other == part and target not in (own_folder, f"{own_folder}.__init__", name):
            return f"{part} do not import each other"
        return None
    if part not in ONLY_IN.get(root, {part}):
        return f"only in {', '.join(sorted(ONLY_IN[root]))}"
    if root in INSIDE_FUNCTIONS and not inside:
        return "only inside the function that needs it"
    if root == "torch" and part in NO_TORCH:
        return f"{part} needs no torch"
    if part in BASE | MATHS and root not in {"torch", "numpy"} and root not in sys.stdlib_module_names:
        return "torch, numpy and the standard library only"
    return None


def test_the_picture_holds():
    scripts = {p.stem for p in (ROOT / "scripts").glob("*.py")}
    assert not (found := breaches(sources(), sources(), scripts)), "\n".join(found)


def test_there_is_something_to_check():
    files = sources()
    assert {"oneshot.patterns", "oneshot.solvers.wanda", "oneshot.loop", "oneshot_kernels.ops"} <= set(files)
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow PyPI's `kernels`
    assert {t for t, _, _ in imports("oneshot.solvers.wanda", files["oneshot.solvers.wanda"], files)} >= \
        {"torch", "oneshot.patterns", "oneshot.solvers"}


def test_reports_can_be_made_where_torch_is_not_installed():
    """Also through what they import while they are loaded."""
    files = sources()
    reached, waiting = set(), [*(f"oneshot.{part}" for part in NO_TORCH), "oneshot.__init__"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            found = [target for target, inside, _ in imports(name, files.get(name, ""), files) if not inside]
            assert "torch" not in {t.split(".")[0] for t in found}, f"{name} imports torch"
            waiting += [t if t in files else f"{t}.__init__" for t in found if t.startswith("oneshot")]


@pytest.mark.parametrize("name, source, why", [
    ("oneshot.patterns", "from .config import RunConfig", "no part of oneshot"),
    ("oneshot.patterns", "import scipy", "standard library only"),
    ("oneshot.statistics", "from . import patterns", "no part of oneshot"),
    ("oneshot.linalg", "from .solvers import Solution, wanda", "linalg may import"),
    ("oneshot.solvers.wanda", "from . import magnitude", "do not import each other"),
    ("oneshot.solvers.wanda", "from .magnitude import prune", "do not import each other"),
    ("oneshot.solvers.wanda", "import oneshot.models", "solvers may import"),
    ("oneshot.solvers.wanda", "def f():\n    from ..config import RunConfig", "solvers may import"),
    ("oneshot.solvers.wanda", "from .. import loop, patterns", "solvers may import"),
    ("oneshot.allocate", "from .solvers import wanda", "allocate may import"),
    ("oneshot.capture", "from transformers import AutoConfig", "only in models"),
    ("oneshot.models", "from . import loop", "models may import"),
    ("oneshot.loop", "import oneshot.export as e", "loop may import"),
    ("oneshot.loop", "importlib.import_module('oneshot.report')", "loop may import"),
    ("oneshot.recovery.block", "from ..loop import prune_model", "recovery may import"),
    ("oneshot.evaluate.tasks", "import lm_eval", "inside the function"),
    ("oneshot.evaluate.tasks", "def f():\n    import datasets", "only in sources"),
    ("oneshot.sources", "import datasets", "inside the function"),
    ("oneshot.figures", "class A:\n    from matplotlib import pyplot", "inside the function"),
    ("oneshot.report", "def f():\n    import torch.nn as nn", "no torch"),
    ("oneshot.report", "from . import figures", "report may import"),
    ("oneshot.page", "from .patterns import parse", "page may import"),
    ("oneshot.evaluate.speed", "import oneshot_kernels", "only in"),
    ("oneshot.run", "import scripts.bench", "nobody imports scripts"),
    ("oneshot.run", "import bench_prune", "nobody imports scripts"),
    ("oneshot.newcomer", "", "MAY"),
    ("oneshot_kernels.ops", "from oneshot import patterns", "torch and triton only"),
    ("oneshot_kernels.ops", "def f():\n    import transformers", "torch and triton only"),
])
def test_a_breach_is_found(name, source, why):
    found = breaches({name: source}, sources(), {"bench_prune"})
    assert found and all(line.startswith(name) and why in line for line in found), found


@pytest.mark.parametrize("name, source", [
    ("oneshot.solvers.refit", "import torch\nfrom . import Solution\nfrom ..linalg import upper_factor"),
    ("oneshot.solvers.refit", "from oneshot.solvers import Solution\nfrom oneshot import patterns"),
    ("oneshot.figures", "from . import report\ndef f():\n    import matplotlib.figure"),
    ("oneshot.export", "from . import __version__, models\nimport oneshot_kernels"),
    ("oneshot.evaluate.tasks", "from . import perplexity\nfrom .. import models"),
    ("oneshot.run", "from . import loop, models\nfrom .evaluate.perplexity import perplexity"),
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
