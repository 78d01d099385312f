"""The plan's arithmetic: sizes, Gram matrices, a solver's memory and operations against what is really there."""

import weakref
from dataclasses import replace

import families
import pytest
import tiny
import torch
from families import VOCAB, T
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from oneshot import calibrate, models
from oneshot.calibrate import Limits
from oneshot.calibrate.statistics import Statistics
from oneshot.pipeline import forecast
from oneshot.pipeline.forecast import SOLVERS, Part, Task
from oneshot.pipeline.sizes import Layer, Linear, Shape, shape_of
from oneshot.prune import solvers
from oneshot.prune.patterns import parse

FAMILIES = ("llama", "llama-tied-bias", "gpt2", "opt", "mixtral", "qwen2_moe", "phi3", "falcon-new", "jamba",
            "gpt_neox")
TASK = Task(("sparsegpt",), 1, 1, (8, 128), (4, 128), 4, 4, 2**32)
GIB = 2**30


def llama(hidden=4096, inner=11008, layers=32, vocab=32000, kv=4096):
    """A Llama by its sizes, bfloat16."""
    own = tuple(Linear(R, C, f"{fed}:{C}") for R, C, fed in (
        (hidden, hidden, "qkv"), (kv, hidden, "qkv"), (kv, hidden, "qkv"), (hidden, hidden, "o"),
        (inner, hidden, "mlp"), (inner, hidden, "mlp"), (hidden, inner, "down")))
    weights = sum(linear.R * linear.C for linear in own) + 2 * hidden
    return Shape((Layer(weights, 2 * weights, own),) * layers, vocab * hidden, vocab * hidden, hidden, 2, hidden, vocab)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_the_model_s(name):
    model = families.tiny(name, dtype=torch.bfloat16)
    shape = shape_of(model)
    assert shape.stored == sum(p.numel() * p.element_size() for p in model.parameters())
    assert sum(layer.weights for layer in shape.layers) + shape.rest == sum(p.numel() for p in model.parameters())
    assert sum(own.R * own.C * own.experts for layer in shape.layers for own in layer.linears) == sum(
        w.size for w in models.all_weights(model))
    assert bool(shape.head) == (not model.config.tie_word_embeddings) and shape.embedding >= VOCAB * 16


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias", "gpt2", "mixtral"])
def test_a_skeleton_has_the_loaded_model_s_sizes(name, tmp_path):
    families.tiny(name, dtype=torch.float16).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    made, _, files = models.skeleton(tmp_path)
    assert all(p.is_meta for p in made.parameters()) and [f.name for f in files] == ["model.safetensors"]
    assert shape_of(made) == shape_of(models.load(tmp_path)[0])
    wide = models.load(tmp_path, dtype="float32")[0]
    assert shape_of(models.skeleton(tmp_path, dtype="float32")[0]) == shape_of(wide)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "mixtral", "gpt_neox"])
def test_inputs_are_shared_as_they_are(name):
    """The Gram matrices of a block are as many, and as large, as those collected; so are the passes that a budget asks
    for."""
    model = families.tiny(name)
    layer = shape_of(model).layers[0]
    ids = torch.randint(3, VOCAB, (8, T), generator=torch.Generator().manual_seed(0))
    with models.experts_one_by_one(model):
        activations = calibrate.capture(model, ids, batch_size=8)
        block = next(iter(models.walk(model, "cpu")))
        found, _, _ = calibrate.collect(block.module, activations, 0, block.weights, {"outer"})
        real = sum(4 * s.C**2 for s in {id(s): s for s in found.values()}.values())
        assert forecast.gram_bytes(layer, TASK) == real
        small = replace(TASK, budget=real // 2)
        remaining, spent = block.weights, []
        while remaining:
            found, deferred, _ = calibrate.collect(block.module, activations, 0, remaining, {"outer"},
                                                   limits=Limits(small.budget))
            spent.append(sum(4 * s.C**2 for s in {id(s): s for s in found.values()}.values()))
            remaining = deferred
    assert max(spent) <= forecast.gram_bytes(layer, small) and len(spent) > 1


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made within it that are alive; peak: the most at once."""

    def __init__(self, there):
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def test_live_counts():
    x = torch.zeros(2, 2**18)
    with Live([x]) as live:
        y = x + 1
        y = y * 2
        del y
        _ = x[0] + x[1]
    assert live.peak == 2 * x.nbytes and live.now == x.nbytes // 2


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_takes_what_the_table_says(name, pattern):
    method = f"wanda+{name}" if name in solvers.names()["refiner"] else name
    chain = [(m, m.Config()) for m in solvers.chain(method)]
    needs = frozenset().union(*(m.needs for m, _ in chain))
    for R, C in ((512, 512), (1024, 256), (256, 768), (768, 1536))[: 3 if name in ("alps", "admm") else 4]:
        statistics, W = Statistics(C, needs), torch.randn(R, C, generator=torch.Generator().manual_seed(0))
        statistics.update(torch.randn(2 * C, C, generator=torch.Generator().manual_seed(1)))
        own = parse(pattern).with_default_group(chain[0][1].group)
        there = [t for t in (W, statistics.outer, statistics.sum_sq, statistics.sum) if t is not None]
        with Live(there) as live:
            solvers.solve(W, statistics, own, chain)
        layer = Layer(R * C, 2 * R * C, (Linear(R, C, "x"),))
        task = replace(TASK, chain=tuple(method.split("+")), grams=int("outer" in needs))
        planned = forecast.solver_bytes(layer, task)
        assert 0.35 * planned < live.peak < 1.1 * planned, (R, C, live.peak / planned)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_pass_takes_as_many_operations(name):
    model, ids = families.tiny(name), torch.randint(3, VOCAB, (4, T), generator=torch.Generator().manual_seed(0))
    shape = shape_of(model)
    model.set_attn_implementation("eager")  # the counter does not know the fused attention
    with models.experts_one_by_one(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    routers = sum(2 * 4 * T * p.numel() for n, p in model.named_parameters() if n.endswith("gate.weight"))
    planned = forecast.work(shape, replace(TASK, chain=(), evaluation=(4, T)))["evaluate"]["product"]
    assert planned + routers == pytest.approx(counter.get_total_flops(), rel=0.06)


class Touched(TorchDispatchMode):
    """Counts the bytes that all operations but products and views read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__
        own, read = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)], [
            t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        views = {t.untyped_storage().data_ptr() for t in own} <= {t.untyped_storage().data_ptr() for t in read}
        if not any(word in name for word in ("mm", "attention", "embedding")) and not views:
            self.bytes += sum(t.numel() * t.element_size() for t in (*own, *read))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_the_products_a_pass_touches_such_bytes(dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=192, intermediate_size=512, num_hidden_layers=2, vocab_size=99,
                                         num_attention_heads=3, num_key_value_heads=1)).to(dtype)
    with torch.no_grad(), Touched() as counter:
        model.model(input_ids=torch.zeros(2, 256, dtype=torch.int64), use_cache=False)
    assert 0.6 < forecast.between(shape_of(model), (2, 256)) / counter.bytes < 1.4  # some stay in the cache


def test_memory_of_a_block_at_a_time_does_not_depend_on_their_number():
    small, large = llama(layers=8), llama(layers=80)
    away = replace(TASK, offload=True)
    assert forecast.peak(forecast.phases(small, away, 0)) == forecast.peak(forecast.phases(large, away, 0))
    here = [forecast.peak(forecast.phases(shape, TASK, 0))[1] for shape in (small, large)]
    assert here[1] - here[0] == 72 * small.layers[0].stored


def test_phases_name_what_there_is():
    found = forecast.phases(llama(), replace(TASK, offload=True), 5.0)
    assert list(found) == ["reading", "calibrating", "pruning", "evaluating", "evaluating, head"]
    assert all(parts[0] == Part("the program", 5.0) for parts in found.values())
    assert "calibrating" not in forecast.phases(llama(), replace(TASK, chain=()), 0)
    assert list(forecast.phases(llama(), replace(TASK, evaluation=(0, 1)), 0))[-1] == "pruning"
    gpu = forecast.phases(llama(), replace(TASK, gpu=True, waits_on_cpu=True), 0)
    assert {p.name for p in gpu["pruning"] if p.on_gpu} == {"block, computing", "Gram matrices", "solver, or a batch"}


def test_disk():
    shape = llama()
    blocks = sum(layer.stored for layer in shape.layers)

    def whole(**how):
        return sum(part.bytes for part in forecast.disk(shape, replace(TASK, **how)))
    assert whole() == 0 and whole(offload=True) == blocks
    assert whole(offload=True, saves=True) == shape.stored  # never twice
    assert whole(saves=True) == blocks + shape.stored
    assert whole(saves=True, chain=()) == 0


def test_work_grows_as_it_should():
    shape, base = llama(layers=4), forecast.work(llama(layers=4), TASK)

    def of(stage, kind, **how):
        return forecast.work(shape, replace(TASK, **how)).get(stage, {}).get(kind, 0)
    assert of("calibrate and prune", "solve") == base["calibrate and prune"]["solve"] > 0
    assert of("calibrate and prune", "solve", chain=("wanda",), grams=0) == 0
    assert of("calibrate and prune", "choice", chain=("wanda",), grams=0) == sum(
        own.R * own.C for layer in shape.layers for own in layer.linears)
    once = of("calibrate and prune", "product")
    assert of("calibrate and prune", "product", budget=1) > once  # further passes
    assert of("evaluate", "product", evaluation=(8, 128)) == 2 * of("evaluate", "product")
    assert of("save", "written", saves=True) == shape.stored
    assert forecast.seconds({"read": 10.0, "product": 6.0}, {"read": 5.0, "product": 2.0}) == 5.0


# ---------------------------------------------------------------- what fits

SHAPE = llama(8192, 28672, 80, 128256, 1024)  # 70B


def fitted(limit, free=tuple(forecast.STEPS), task=TASK):
    return forecast.fitted(SHAPE, task, lambda t: forecast.peak(forecast.phases(SHAPE, t, GIB))[1] <= limit * GIB, free)


def test_70b():
    assert fitted(400) == (TASK, [])
    task, changed = fitted(24)
    assert changed == ["offload"] and task == replace(TASK, offload=True)
    with pytest.raises(ValueError):
        fitted(24, ("batch_size",))
    with pytest.raises(ValueError):
        fitted(8)


def test_as_little_as_possible_changes_and_rounding_last():
    long = replace(TASK, calibration=(512, 2048), evaluation=(160, 2048), batch=8, eval_batch=8)
    seen = []
    for limit in (2000, 60, 50, 40, 34, 30, 28, 26):
        try:
            task, changed = fitted(limit, task=long)
        except ValueError:
            break
        assert forecast.peak(forecast.phases(SHAPE, task, GIB))[1] <= limit * GIB
        seen.append(changed)
        if changed:
            last = changed[-1]
            with pytest.raises(ValueError):
                fitted(limit, tuple(flag for flag in changed if flag != last), task=long)
    assert seen[0] == [] and ["offload"] in seen
    order = [list(forecast.STEPS).index(flag) for flag in seen[-1]]
    assert order == sorted(order)
    kept, _ = fitted(60, tuple(f for f in forecast.STEPS if f != "gram_budget"), task=long)
    assert kept.budget == long.budget
