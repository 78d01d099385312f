"""Rules of the house that a reader could check file by file: type hints, docstrings, words, one place for one thing."""

import ast
import fnmatch
import re

import pytest
from test_layers import ROOT, STAGES, sources

CONTRACTS = ("prune.solvers", "prune.allocate", "quantise", "heal", "measure")  # their files are found by name
OLD_DIALECT = {"Optional", "Union", "List", "Dict", "Tuple", "Set", "FrozenSet", "Type", "Callable", "Iterable",
               "Iterator", "Sequence", "Mapping", "Collection"}  # X | None, list[int], collections.abc
OLD_WORDS = {  # word: modules that may use it, as they read what version 0.1 wrote
    "moments": (), r"survey\w*": (), "mend(s|ed|ing)?": (), "at home": (), "dense stream": (),
    r"repair\w*": ("report.record",),
    r"recover\w*": ("report.record", "settings.config", "settings.known"),
}


def jitted(node):
    """Whether Triton compiles a function, which takes annotations for types of its own."""
    return any("jit" in ast.unparse(decorator).split("(")[0].split(".") for decorator in node.decorator_list)


def public(tree):
    """(name, function) of every public function and method of a module, `__init__` and the like included."""
    waiting = [("", tree)]
    while waiting:
        where, parent = waiting.pop()
        for node in parent.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                waiting.append((f"{where}{node.name}.", node))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not jitted(node) and (
                    not node.name.startswith("_") or node.name.endswith("__")):
                yield where + node.name, node


def unhinted(source):
    """["name: what lacks a type hint"] of a module's public functions and methods."""
    found = []
    for name, node in public(ast.parse(source)):
        args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in args if a is not None and a.annotation is None]
        bare = bare[1:] if "." in name and bare[:1] in (["self"], ["cls"]) else bare
        if bare or node.returns is None:
            found.append(f"{name}: {', '.join(bare) or 'what it returns'}")
    return found


def undocumented(source):
    """Names of public functions and methods without a docstring; that of a class says what `__init__` takes."""
    return [name for name, node in public(ast.parse(source)) if not name.endswith("__") and not ast.get_docstring(node)]


def old_dialect(source):
    """Names imported from `typing` that have had a plainer form since Python 3.10."""
    return [alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)
            and node.module == "typing" for alias in node.names if alias.name in OLD_DIALECT]


def old_words(source):
    """["line: word"] of words that the house has replaced, in whatever a module says."""
    return [f"{number}: {match[0]}" for number, line in enumerate(source.splitlines(), 1) for pattern in OLD_WORDS
            for match in re.finditer(rf"\b({pattern})\b", line.replace("_", " "), re.IGNORECASE)]


def in_all(check):
    """["module: what"] of everything that a check finds in oneshot/ and kernels/."""
    assert len(sources()) > 150
    return [f"{name}: {found}" for name, source in sources().items() for found in check(source)]


@pytest.mark.parametrize("check", [unhinted, undocumented, old_dialect])
def test_public_functions(check):
    assert not (found := in_all(check)), "\n".join(found)


def test_old_words_are_gone():
    allowed = {(name, word): places for word, places in OLD_WORDS.items() for name in places}
    found = [line for line in in_all(old_words) if not any(
        line.startswith(f"oneshot.{name}:") and re.search(word, line, re.IGNORECASE) for name, word in allowed)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("check, source", [
    (unhinted, "def f(a: int, b) -> None: pass"), (unhinted, "def f(a: int): pass"),
    (unhinted, "def f(*a) -> int: pass"), (unhinted, "class A:\n    def __init__(self, x: int): pass"),
    (unhinted, "class A:\n    def f(self, **k) -> int: pass"),
    (undocumented, "def f(): pass"), (undocumented, "class A:\n    def f(self): return 1"),
    (old_dialect, "from typing import Any, Optional"), (old_words, "# the moments of x"),
    (old_words, "dense_survey = 1")])
def test_a_breach_is_found(check, source):
    assert len(check(source)) == 1


@pytest.mark.parametrize("check, source", [
    (unhinted, "def _f(a): pass"), (unhinted, "def f(a: int | None = None) -> str: pass"),
    (unhinted, "class A:\n    @classmethod\n    def f(cls, *a: int) -> 'A': pass"),
    (unhinted, "@triton.jit\ndef k(x, N: tl.constexpr): pass"), (undocumented, "def f():\n    '''Says.'''"),
    (old_dialect, "from typing import Any, NamedTuple"), (old_words, "# a moment, recommended, a covering")])
def test_what_is_right_passes(check, source):
    assert not check(source)


# ---------------------------------------------------------------- what a folder says of itself

def folders():
    """{dotted name of a folder whose docstring lists its files: [names of its files]}."""
    found = {}
    for name in sources():
        package, _, last = name.rpartition(".")
        inside = package.removeprefix("oneshot.")
        if last != "__init__" and inside.split(".")[0] in STAGES and inside not in CONTRACTS:
            found.setdefault(package, []).append(last)
    return found


@pytest.mark.parametrize("folder", folders())
def test_a_folder_lists_its_files(folder):
    text = ast.get_docstring(ast.parse(sources()[f"{folder}.__init__"]))
    assert not [name for name in folders()[folder] if not re.search(rf"\b{name}\b", text.partition("\n")[2])]


# ---------------------------------------------------------------- settings, run, tables, scripts

def test_nobody_looks_into_argparse():
    """The flags are `settings.known()`; what argparse holds is nobody's but the Parser's."""
    assert [name for name, source in sources().items() if "_actions" in source] == ["oneshot.runtime.command"]
    scripts = [p.read_text(encoding="utf-8") for p in (ROOT / "scripts").rglob("*.py")]
    assert len(scripts) > 20 and not any("_actions" in source for source in scripts)


def test_what_makes_a_model_smaller_is_listed_once():
    by_hand = re.compile(r'"(--)?layers", "(--)?drop"')
    listing = [name for name, source in sources().items() if by_hand.search(source)]
    assert listing == ["oneshot.structured.options"]


def test_one_writer_of_tables():
    """Neither markdown's nor HTML's tables are put together anywhere else."""
    by_hand = re.compile(r"\|\s*-{3,}|<t[dr]\b|<table\b|\" \| \"\.join")
    found = [name for name, source in sources().items() if by_hand.search(source)]
    found += [str(p) for p in [*(ROOT / "scripts").rglob("*.py"), ROOT / "tests" / "soak.py"]
              if by_hand.search(p.read_text(encoding="utf-8"))]
    assert found == ["oneshot.report.table"]


def test_the_test_files_that_begin_first_are_there():
    named = re.findall(r'"([\w/]+\.py)"', (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    assert len(named) > 10 and not [name for name in named if not (ROOT / "tests" / name).is_file()]


def test_run_is_one_page():
    assert len(sources()["oneshot.pipeline.run"].splitlines()) <= 150


def private(source):
    """What a script takes of the package that is private there: `from oneshot.a import _b`, `run._b`."""
    tree, found = ast.parse(source), []
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("oneshot", "oneshot_kernels"):
            known |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)]
    return found + [ast.unparse(node) for node in used if ast.unparse(node.value).split(".")[0] in known | {"oneshot"}]


def test_scripts_use_what_is_public():
    assert private("from oneshot.pipeline import run, _x\nrun._made()\nself._x") == ["_x", "run._made"]
    scripts = {str(p): private(p.read_text(encoding="utf-8")) for p in (ROOT / "scripts").rglob("*.py")}
    assert len(scripts) > 20 and not {name: found for name, found in scripts.items() if found}




# ---------------------------------------------------------------- what the pages of results/ and scripts/ say

def rows(page):
    """[[cell, ...]] of the tables of a markdown file."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def test_every_result_has_its_program():
    named = [name for row in rows("results/README.md") for name in re.findall(r"`([^`]+)`", row[0])]
    files = [str(p.relative_to(ROOT / "results")) for p in (ROOT / "results").rglob("*")
             if p.is_file() and ".sweep" not in p.parts and p.name not in ("README.md", "LOG.md")]
    assert len(files) > 100
    named += [f"{name}*" for name in named if name.endswith("/")]
    assert not [file for file in files if not any(fnmatch.fnmatch(file, name) for name in named)]


@pytest.mark.parametrize("page", ["results/README.md", "scripts/README.md"])
def test_the_programs_are_there_and_said_once(page):
    programs = re.findall(r"\bscripts/\w+/\w+\.(?:py|yaml)\b", (ROOT / page).read_text(encoding="utf-8"))
    assert len(programs) > 10 and not [name for name in programs if not (ROOT / name).is_file()]
    lines = [" | ".join(row) for row in rows(page) if row[0] not in ("what", "file or folder")]
    assert sorted(lines) == sorted(set(lines))


def test_every_script_is_on_a_page():
    text = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    assert not [p.name for p in (ROOT / "scripts").rglob("*.py") if p.name not in text]


def test_files_that_are_named_are_there():
    """`heal/train.py` in a docstring or comment is a file, seen from the checkout or any folder in it."""
    there = [f"/{p.relative_to(ROOT)}" for part in ("oneshot", "kernels", "scripts", "tests")
             for p in (ROOT / part).rglob("*.py")]
    texts = sources() | {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "scripts").rglob("*.py")}
    named = {(name, path) for name, text in texts.items() for path in re.findall(r"\b(?:\w+/)+\w+\.py\b", text)
             if not path.startswith("lib/")}  # of the papers' repositories
    assert len(named) > 50
    assert not [entry for entry in named if not any(file.endswith(f"/{entry[1]}") for file in there)]
