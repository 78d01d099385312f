"""`walk` goes over a model: block by block, resident, named, written back where something changed, and nowhere else."""

import ast
import types
from pathlib import Path

import pytest
import torch
from families import tiny
from plainly import FAMILIES, tokens

from oneshot import calibrate, models

PACKAGE = Path(models.__file__).resolve().parents[1]


def stored(model):
    """{parameter: (its dtype, its memory, a copy)} as they are now."""
    return {n: (p.dtype, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}


def assert_stored(model, before, but=()):
    """All parameters are where and as they were; those whose names begin with `but` may have other values."""
    for name, p in model.named_parameters():
        dtype, memory, value = before[name]
        assert (p.dtype, p.data_ptr()) == (dtype, memory), name
        assert torch.equal(p, value) or name.startswith(but or "\0"), name


# ---------------------------------------------------------------- what it yields

@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_and_names_are_the_models_own(name):
    model = tiny(name)
    parameters, path = dict(model.named_parameters(remove_duplicate=False)), models.blocks(model)[0]
    found = list(models.walk(model))
    assert [block.number for block in found] == list(range(models.config_of(model).num_hidden_layers))
    for block in found:
        assert block.name == f"{path}.{block.number}" and model.get_submodule(block.name) is block.module
        assert not block.changed
        for weight in block.weights:
            assert weight.name == f"{block.name}.{weight.linear}" and weight.block == block.name
            full = f"{weight.name}.weight" if weight.expert is None else f"{block.name}.{weight.kind}"
            assert parameters[full] is weight.parameter
        assert all(n in parameters and n.startswith(f"{block.name}.") for n, _ in block.skipped)
        assert block.stored == {n: p.dtype for n, p in block.module.named_parameters()}
    assert len({w.name for w in models.all_weights(model)}) == sum(len(block.weights) for block in found)
    assert [w.name for w in models.all_weights(model)] == [w.name for block in found for w in block.weights]


def test_it_begins_where_it_is_told():
    model, moved = tiny("llama"), []
    bar = types.SimpleNamespace(update=lambda: moved.append(1))
    assert [block.number for block in models.walk(model, "cpu", start=1, bar=bar)] == [1] and moved == [1]
    assert [block.number for block in models.walk(model, start=2)] == []


def test_it_ends_where_it_is_told():
    model = tiny("llama")
    assert [block.number for block in models.walk(model, "cpu", end=1)] == [0]
    assert [block.number for block in models.walk(model, start=1, end=1)] == []
    assert [block.number for block in models.walk(model, start=1, end=5)] == [1]


# ---------------------------------------------------------------- residency

@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_one_block_at_a_time_is_resident_and_all_are_offloaded_again(name):
    model = tiny(name, dtype=torch.bfloat16)
    before, buffers = stored(model), {n: t.dtype for n, t in model.named_buffers()}
    for block in models.walk(model, "cpu"):
        for full, p in model.named_parameters():
            assert p.dtype == (torch.float32 if full.startswith(f"{block.name}.") else torch.bfloat16), full
        assert {n: t.dtype for n, t in model.named_buffers()} == buffers
        assert {w.get().dtype for w in block.weights} == {torch.float32}
        assert {w.stored for w in block.weights} == {torch.bfloat16} == set(block.stored.values())
    assert_stored(model, before)


def test_without_a_device_blocks_are_seen_as_they_are_stored():
    model = tiny("llama", dtype=torch.bfloat16)
    before = stored(model)
    for block in models.walk(model):
        assert_stored(model, before, but="" if block.number == 0 else "model.layers.0.")
        for p in block.module.parameters():
            p.data.zero_()
    assert not any(p.any() for n, p in model.named_parameters() if ".layers." in n)


def test_what_is_float64_is_computed_in_float64():
    model = tiny("llama", dtype=torch.float64)
    for block in models.walk(model, "cpu"):
        assert {p.dtype for p in block.module.parameters()} == {torch.float64}


@pytest.mark.parametrize("leave", ["break", "error"])
def test_a_walk_that_ends_early_leaves_nothing_resident(leave):
    model = tiny("llama", dtype=torch.bfloat16)
    before = stored(model)
    if leave == "break":
        for _ in models.walk(model, "cpu"):
            break
    else:
        with pytest.raises(KeyboardInterrupt):
            for _ in models.walk(model, "cpu"):
                raise KeyboardInterrupt
    assert_stored(model, before)


# ---------------------------------------------------------------- writing back

@pytest.mark.parametrize("changed", [True, False])
def test_changes_are_carried_back_where_the_block_says_so(changed):
    """Rounded to the stored dtype; the other block's stay."""
    model = tiny("llama", dtype=torch.bfloat16)
    before = stored(model)
    for block in models.walk(model, "cpu"):
        if block.number == 1:
            for p in block.module.parameters():
                p.data.add_(1 / 3)
            block.changed = changed
    assert_stored(model, before, but="model.layers.1.")
    for name, p in model.model.layers[1].named_parameters():
        old = before[f"model.layers.1.{name}"][2]
        assert torch.equal(p, (old.float() + 1 / 3).bfloat16() if changed else old)


def test_state_is_the_block_as_it_will_be_saved():
    model = tiny("llama", dtype=torch.float16)
    for block in models.walk(model, "cpu"):
        for p in block.module.parameters():
            p.data.add_(1 / 3)
        block.changed, state = True, block.state()
        assert set(state) == set(block.module.state_dict())
        assert all(t.dtype == torch.float16 and t.device.type == "cpu" for t in state.values())
        kept = {n: t.clone() for n, t in state.items()}
        if block.number:
            break
    else:
        raise AssertionError("there are two blocks")
    other = tiny("llama", dtype=torch.float16)
    other.model.layers[1].load_state_dict(kept)
    assert all(torch.equal(p, q) for p, q in zip(other.model.layers[1].parameters(), model.model.layers[1].parameters(),
                                                 strict=True))


def test_weights_that_blocks_share_belong_to_the_first():
    model = tiny("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    one, two = models.walk(model)
    mlp = {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert mlp <= {w.name for w in one.weights} and one.recurring == mlp and not one.shared
    assert {w.name for w in two.shared} == mlp and not any(".mlp." in w.name for w in two.weights)
    assert models.shares_weights(model) and not models.shares_weights(tiny("llama"))


# ---------------------------------------------------------------- a whole model by it

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3n", "mixtral", "falcon"])
def test_a_walk_is_the_whole_forward(name, dtype):
    """Stored in 16 bits, computed in float32: as the widened model computes."""
    model, ids = tiny(name, dtype=dtype), tokens()
    want = tiny(name, dtype=dtype).float()(input_ids=ids, use_cache=False).logits
    activations = calibrate.capture(model, ids, batch_size=2)
    for block in models.walk(model, "cpu"):
        calibrate.replay(block.module, activations, block.number)
    with models.resident(model, "cpu"):
        got = [logits for i in range(len(activations)) for _, logits in calibrate.logits(model, activations, i)]
    torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- and nothing else goes over a model

ELSEWHERE = {  # file: why it handles the list of blocks itself
    "models/blocks.py": "walk",
    "calibrate/activations.py": "a stub stands in place of every block at once",
    "calibrate/head.py": "the same, to run what follows them",
}
LOOPS = ("iter", "list", "tuple", "enumerate", "zip", "map", "reversed", "sorted", "functools.reduce")


def handles_blocks(source):
    """Lines that loop over, unpack or index what `models.blocks(...)` gives as its second part."""
    tree = ast.parse(source)

    def is_call(node):
        return isinstance(node, ast.Call) and ast.unparse(node.func) in ("blocks", "models.blocks")
    names = {target.elts[1].id for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_call(node.value)
             for target in node.targets if isinstance(target, ast.Tuple) and isinstance(target.elts[1], ast.Name)}
    names |= {target.id for node in ast.walk(tree) if isinstance(node, ast.Assign) and is_list(node.value, is_call, ())
              for target in node.targets if isinstance(target, ast.Name)}
    found = []
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            parts = [node.iter, *(node.iter.args if isinstance(node.iter, ast.Call) else ())]
        elif isinstance(node, (ast.Starred, ast.Subscript)):
            parts = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOOPS:
            parts = node.args
        if any(is_list(part, is_call, names) for part in parts):
            found.append(getattr(node, "lineno", getattr(getattr(node, "iter", None), "lineno", 0)))
    return sorted(found)


def is_list(node, is_call, names):
    """Whether an expression is the list of blocks itself: a name for it, or `models.blocks(model)[1]`."""
    if isinstance(node, ast.Subscript) and is_call(node.value):
        return ast.unparse(node.slice) in ("1", "-1")
    return isinstance(node, ast.Name) and node.id in names


def test_only_walk_goes_over_a_model():
    files = {str(f.relative_to(PACKAGE)): f.read_text(encoding="utf-8") for f in sorted(PACKAGE.rglob("*.py"))}
    found = {name: lines for name, source in files.items() if (lines := handles_blocks(source))}
    assert len(files) > 80 and set(ELSEWHERE) - {"models/blocks.py"} <= set(found), "an exception that is none any more"
    assert not set(found) - set(ELSEWHERE), f"use models.walk: {found}"


@pytest.mark.parametrize("source", [
    "for block in models.blocks(model)[1]: pass", "x = [b for b in blocks(model)[1]]",
    "_, block_list = models.blocks(m)\nfor i, b in enumerate(block_list): pass",
    "path, these = models.blocks(m)\nfirst = these[0]", "_, these = blocks(m)\nf(*these)",
    "these = models.blocks(m)[1]\nlist(these)", "def f():\n    _, x = models.blocks(m)\n    return any(b for b in x)"])
def test_a_loop_of_ones_own_is_found(source):
    assert handles_blocks(source)


@pytest.mark.parametrize("source", [
    "n = len(models.blocks(model)[1])", "_, block_list = models.blocks(m)\nf(block_list)\nlen(block_list)",
    "sum(p.numel() for p in models.blocks(m)[1].parameters())", "path = models.blocks(m)[0]\npath[0]",
    "for block in models.walk(model): pass"])
def test_what_does_not_go_over_it_passes(source):
    assert not handles_blocks(source)
