"""`oneshot.prune` is a package and a function, however and whenever its parts are imported."""

import subprocess
import sys

import families
import jobs
import pytest
import tiny

IMPORTS = {  # what is imported, and what of it is called
    "the package alone": "import oneshot; call = oneshot.prune",
    "a submodule first": "import oneshot.prune.solvers.wanda; import oneshot; call = oneshot.prune",
    "a submodule afterwards": "import oneshot; call = oneshot.prune; import oneshot.prune.patterns",
    "the loop": "from oneshot.prune import loop; import oneshot; call = oneshot.prune",
    "by name": "from oneshot import prune as call",
    "by name after a submodule": "from oneshot.prune.patterns import parse; from oneshot import prune as call",
    "the pipeline first": "import oneshot.pipeline.run, oneshot; call = oneshot.prune",
    "with the rest": "from oneshot import *; call = prune",
}
PROGRAM = """
import gc; gc.disable()  # it would go over all of torch again and again
import importlib, os, sys, traceback, types
import torch, transformers.quantizers  # once for all
assert not [name for name in sys.modules if name.startswith("oneshot")]


def sound(text):
    space, told = {}, []
    exec(text, space)
    call, package = space["call"], sys.modules["oneshot.prune"]
    importlib.import_module("oneshot.pipeline.api").prune = lambda *args, **more: told.append((args, more)) or "done"
    answer = call("model", 3, pattern="2:4")
    assert answer == "done" and told == [(("model", 3), {"pattern": "2:4"})]
    assert call is package is sys.modules["oneshot"].prune and isinstance(package, types.ModuleType)
    assert package.loop is importlib.import_module("oneshot.prune.loop")
    return True


for text in sys.argv[1:]:  # each in a process of its own, which has not imported anything of oneshot
    if not os.fork():
        try:
            print(sound(text), flush=True)
        except BaseException:
            traceback.print_exc()
            print(False, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def told():
    """{how it is imported: whether the call went through}."""
    done = tiny.python("-c", PROGRAM, *IMPORTS.values())
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(IMPORTS, done.stdout.split(), strict=True))


@pytest.mark.parametrize("how", IMPORTS)
def test_it_is_called_however_it_is_imported(told, how):
    assert told[how] == "True"


def test_it_prunes():
    import oneshot

    model = families.tiny("llama")
    record = oneshot.prune(model, method="magnitude", pattern="2:4", calibration=jobs.tokens(2), progress=False)
    assert record["sparsity"] == 0.5
    assert oneshot.prune.patterns.parse("2:4").holds(model.model.layers[0].mlp.up_proj.weight)


def test_nothing_heavy_is_imported_before_it_is_used():
    code = ("import oneshot, sys; print(oneshot.__version__, "
            "sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100,
                          env={"PYTHONPATH": ":".join(filter(None, sys.path))})
    assert done.stdout.split()[1:] == ["[]"], done.stdout + done.stderr


def test_what_is_not_there_is_an_attribute_error():
    import oneshot

    with pytest.raises(AttributeError, match="no attribute 'shrink_all'"):
        _ = oneshot.shrink_all
