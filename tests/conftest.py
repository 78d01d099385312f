"""For every test: a bare checkout finds its packages, nothing asks the network, `../shared` may be absent."""

import collections
import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONG = (  # files of few tests that take more than five seconds, the longest first
    "heal/test_text_command.py", "pipeline/test_fit_real.py", "kernels/test_sparse24_interpreter.py",
    "test_readme.py", "scripts/test_scale.py", "test_soak_slice.py", "heal/test_torchrun.py", "scripts/test_sweep_processes.py",  # noqa: E501
    "pipeline/test_processes.py", "scripts/test_fit_script.py", "kernels/test_cpu_neon.py", "test_contributing.py",
    "test_smollm2.py", "runtime/test_proof.py", "kernels/test_sparse24_codegen.py",
    "prune/test_golden.py", "runtime/test_verb.py")

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else threads spin while they wait: minutes where others compute
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until everything is imported, see pytest_collection_finish
for package, folder in (("oneshot", ROOT), ("oneshot_kernels", ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """To the commands, nothing else runs on this machine: their notes about it do not depend on what runs the tests."""
    from oneshot.runtime import environment

    monkeypatch.setattr(environment, "others", lambda: 0.0)


def pytest_configure(config):
    """Under xdist, the process that hands out files takes them in the order of `pytest_collection_modifyitems`."""
    if getattr(config.option, "numprocesses", None):
        config.option.loadscopereorder = False
        gc.enable()  # it collects nothing


def pytest_collection_modifyitems(items):
    """Under xdist, files that take long begin first, then those with many tests: else one worker ends with a long one
    while the other has nothing left to do.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = collections.Counter(item.path for item in items)
        place = {ROOT / "tests" / name: i for i, name in enumerate(LONG)}
        items.sort(key=lambda item: (place.get(item.path, len(LONG)), -tests[item.path]))


def pytest_collection_finish():
    """Git is asked once, not by each of a thousand runs. What importing leaves stays anyway: else each full collection
    would go over it, and Trainer asks for many, a third of the time of the tests that train.
    """
    if environment := sys.modules.get("oneshot.runtime.environment"):
        environment.git = functools.cache(environment.git)
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """The same of what a file of tests has imported, when all that it made is gone."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def shared_path(*parts):
    """A path under the folder `shared` ($ONESHOT_SHARED, else beside the checkout); skips if absent."""
    path = Path(os.environ.get("ONESHOT_SHARED") or ROOT.parent / "shared").joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent: it lies beside the project's checkout, or where ONESHOT_SHARED says")
    return path


@pytest.fixture(scope="session")
def shared():
    """`shared("data", "x.json")`: a path under the folder `shared`; without it the test is skipped."""
    return shared_path
