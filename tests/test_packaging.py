"""What an installation that is not editable takes along: every module, every file beside them, the command."""

import fnmatch
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def given(monkeypatch):
    """The arguments setup.py gives to setup()."""
    setuptools, kept = pytest.importorskip("setuptools"), {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", kept.update)
    runpy.run_path("setup.py")
    return kept


def test_every_module_is_in_a_package(given):
    places = {"oneshot": ROOT, "oneshot_kernels": ROOT / "kernels"}
    for top, root in places.items():
        folders = {file.parent for file in (root / top).rglob("*.py")}
        assert folders and {".".join(f.relative_to(root).parts) for f in folders} <= set(given["packages"])
    assert not [p for p in given["packages"] if "__pycache__" in p or p.split(".")[0] not in places]


def test_every_file_beside_the_modules_is_taken_along(given):
    patterns = [f"{package.replace('.', '/')}/{pattern}" for package, wanted in given["package_data"].items()
                for pattern in wanted]
    files = [f.relative_to(root).as_posix() for root, top in ((ROOT, "oneshot"), (ROOT / "kernels", "oneshot_kernels"))
             for f in (root / top).rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    assert "oneshot_kernels/cpu/column_loop.cpp" in files and "oneshot_kernels/cpu/parallel.h" in files
    assert "oneshot/demo/model/README.md" in files and "oneshot/demo/model/model.safetensors" in files
    assert not [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in patterns)]


def test_licence_and_command(given):
    assert given["license"] == "Apache-2.0"
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in given["license_files"])
    assert "Version 2.0, January 2004" in text and "Copyright 2026 The oneshot authors" in text
    assert given["entry_points"] == {"console_scripts": ["oneshot = oneshot.__main__:main"]}
