"""The compiled linears: every variant this CPU runs against float64, strange shapes; what the module does with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
import variants
from oneshot_kernels import Sparse24Linear, dispatch, explain, ops, pack, reference, selftest
from oneshot_kernels.cpu import build, layout, library, tune
from oneshot_kernels.cpu import linear as cpu
from torch import nn
from variants import needs_compiler

pytestmark = needs_compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=variants.NAMES)
def variant(request, monkeypatch):
    """This variant is the library."""
    variants.use(cpu, "linear", request.param, monkeypatch)


def problem(n, k, m, dtype, seed=0):
    """(weight (n, k), 2:4, with some groups emptier; x (m, k); bias (n,))."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randn(n, k // 4, 4, generator=g)
    kept = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, dim=-1).indices, 1.0)
    kept *= torch.rand(kept.shape, generator=g) < 0.9
    weight, x = (groups * kept).view(n, k).to(dtype), torch.randn(m, k, generator=g).to(dtype)
    return weight, x, torch.randn(n, generator=g).to(dtype)


def tiles(weight):
    return layout.to_tiles(pack(weight), cpu.lanes())


@pytest.mark.parametrize("n, k", [(1, 4), (5, 36), (16, 172), (70, 576), (131, 1052), (3, 11008)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_at_most_twice_as_much_as_torch(variant, dtype, n, k):
    """Over all numbers of tokens together: a single small product may be exact in torch by chance."""
    errors = torch.zeros(3, dtype=torch.float64)  # squared: torch, 2:4, dense
    for m in (1, 2, 3, 7, 16, 70):
        weight, x, bias = problem(n, k, m, dtype, seed=m)
        for b in (bias, None):
            truth = F.linear(x.double(), weight.double(), None if b is None else b.double())
            for i, form in enumerate((None, tiles(weight), (layout.dense_tiles(weight, cpu.lanes()), None))):
                y = cpu.linear(x, *form, n, b) if form else F.linear(x, weight, b)
                assert y.dtype == dtype and y.shape == (m, n)
                errors[i] += (y.double() - truth).square().sum()
    assert bool((errors.sqrt() <= 2 * errors[0].sqrt()).all()), errors.sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(variant, dtype, monkeypatch):
    weight, x, bias = problem(400, 256, 5, dtype)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        found.append(cpu.linear(x, *tiles(weight), 400, bias))
    assert cpu.SERIAL <= 400 * 256 and all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_those_beside_it(variant, request, dtype):
    weight, x, _ = problem(40, 96, 70, dtype)
    together, packed = cpu.linear(x, *tiles(weight), 40), tiles(weight)
    few = 2 if dtype == torch.bfloat16 and request.node.callspec.params["variant"] == "amx" else 1  # one: on vectors
    assert all(torch.equal(together[i : i + few], cpu.linear(x[i : i + few], *packed, 40)) for i in range(0, 70, few))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["2:4", "dense"])
@pytest.mark.parametrize("n, k", [(16, 32), (1100, 36), (131, 1052)])  # more than an item, a panel
def test_many_tokens(variant, n, k, form, dtype, monkeypatch):
    """More tokens than a batch, or than panels: the bits of a few at a time, whatever the threads."""
    weight, x, bias = problem(n, k, 530, dtype)
    held, found = tiles(weight) if form == "2:4" else (layout.dense_tiles(weight, cpu.lanes()), None), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        found.append(cpu.linear(x, *held, n, bias))
    for tokens in (5, 53):
        few = torch.cat([cpu.linear(part, *held, n, bias) for part in x.split(tokens)])
        assert all(torch.equal(y, few) for y in found)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert (few - truth).norm() <= 2 * (F.linear(x, weight, bias) - truth).norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(1, 4), (16, 32), (37, 172)])
def test_tiles_are_undone_exactly(variant, dtype, n, k):
    weight, _, _ = problem(n, k, 1, dtype)
    packed = pack(weight)
    back = layout.from_tiles(*layout.to_tiles(packed, cpu.lanes()), n, k)
    assert torch.equal(back.values, packed.values) and torch.equal(back.metadata, packed.metadata)
    assert torch.equal(cpu.expand(*tiles(weight), torch.empty(n, k, dtype=dtype)), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1, 20000, 1 << 22])
def test_a_product_in_parts_is_the_whole_one(variant, dtype, part, monkeypatch):
    monkeypatch.setattr(cpu, "PART", part)
    weight, x, bias = problem(131, 172, 5, dtype)
    for b in (bias, None):
        torch.testing.assert_close(cpu.through_dense(x, *tiles(weight), 131, b), F.linear(x, weight, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [3, 50])
def test_nan_and_inf_pass_through(variant, dtype, bad, m):
    weight, x, _ = problem(20, 64, m, dtype)
    weight[4, torch.nonzero(weight[4])[0]] = bad
    x[x == 0] = 1
    y = cpu.linear(x, *tiles(weight), 20)
    assert not y[:, 4].isfinite().any() and y[:, :4].isfinite().all() and y[:, 5:].isfinite().all()
    weight, x, _ = problem(20, 64, m, dtype)
    x[1, 10] = bad
    y = cpu.linear(x, *tiles(weight), 20)
    assert not y[1, weight[:, 10] != 0].isfinite().any() and y[0].isfinite().all() and y[2:].isfinite().all()
    assert bool((weight[:, 10] != 0).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_without_rows_gives_nothing(variant, dtype):
    weight, x, _ = problem(20, 64, 70, dtype)
    none = [part[:0] for part in tiles(weight)]  # no weight is packed like that, but the operator takes it
    assert all(cpu.linear(x[:m], *none, 0).shape == (m, 0) for m in (1, 9, 70))


def test_damaged_metadata_is_refused():
    values, metadata, shape = pack(problem(20, 64, 1, torch.bfloat16)[0])
    metadata[7, 3] = 0
    with pytest.raises(ValueError, match="bad metadata: row 7, group 6"):
        layout.to_tiles(reference.Packed(values, metadata, shape), 8)
    with pytest.raises(ValueError, match="bad metadata: row 7, group 6"):
        Sparse24Linear.from_packed(values, metadata)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_module_keeps_its_weight_through_everything(dtype, untuned):
    weight, x, bias = problem(20, 36, 3, dtype)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2], bias)
    assert layer.weight.ndim == 3 and "2:4 tiles" in repr(layer) and torch.equal(layer.dense(), weight)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    state = layer.state_dict()
    assert torch.equal(state["weight"], pack(weight).values) and torch.equal(state["metadata"], pack(weight).metadata)
    other = Sparse24Linear.from_packed(*pack(torch.zeros_like(weight))[:2], torch.zeros_like(bias))
    other.load_state_dict(state)
    assert other.weight.ndim == 3 and torch.equal(other(x), layer(x))
    for target in DTYPES:
        assert torch.equal(copy.deepcopy(layer).to(target).dense(), weight.to(target))
    wide = layer.double()  # no kernel takes float64
    assert wide.weight.ndim == 2 and torch.equal(wide.weight, pack(weight).values.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_a_weight_that_others_cast_is_still_right(dtype, other, untuned):
    """`oneshot.models.resident` casts tensors one by one, past the module."""
    weight, x, bias = problem(20, 36, 3, dtype)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2], bias)
    layer.weight.data, layer.bias.data = layer.weight.data.to(other), layer.bias.data.to(other)
    want = F.linear(x.to(other), weight.to(other), bias.to(other))
    torch.testing.assert_close(layer(x.to(other)), want)
    assert torch.equal(layer.dense(), weight.to(other))
    assert ("call prepare() again" in explain(layer, 3)) == ((dtype == torch.bfloat16) != (other == torch.bfloat16))
    assert torch.equal(layer.prepare().dense(), weight.to(other)) and "call prepare()" not in explain(layer, 3)


def test_memory_is_what_the_packed_weight_takes():
    weight, _, _ = problem(64, 256, 1, torch.bfloat16)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2])
    held = sum(t.numel() * t.element_size() for t in (layer.weight, layer.metadata))
    assert held == weight.numel() * 2 * 0.5625


def test_a_measured_path_is_taken_where_it_was_measured(untuned, monkeypatch):
    weight, _, bias = problem(24, 64, 1, torch.float32)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2], bias)
    assert [dispatch.choose(layer.problem(m)).path for m in (1, 64, 5000)] == ["tiles"] * 3
    assert "24x64 float32 threads=" in explain(layer, 2) and library.why("linear") in explain(layer, 2)
    x = torch.randn(130, 64)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias))
    key = layer.problem(1).key
    rows = {1: {"tiles": {"us": 2.0, "config": None}, "expand": {"us": 1.0, "config": None}}}
    dispatch.save_table(dispatch.table_path(torch.device("cpu")), {key: rows}, {})
    assert dispatch.choose(layer.problem(1)).path == "expand" and "tiles 2.0 us" in explain(layer, 1)
    assert torch.equal(layer(x), F.linear(x, weight, bias))  # the library's own product, bit for bit
    with monkeypatch.context() as patch:
        patch.setattr(library, "threads", lambda: 64)
        assert dispatch.choose(layer.problem(1)).path == "tiles"  # measured for another number of threads
    monkeypatch.setattr(build, "processor", lambda *words: "Other (R) 9000")
    dispatch._table_name.cache_clear()
    assert dispatch.choose(layer.problem(1)).path == "tiles"  # and on another processor, which shares the home
    table = dispatch.table_path(torch.device("cpu"))
    assert table.name.startswith(f"cpu-Other-R-9000-{library.why('linear')}-triton")
    monkeypatch.setattr(library, "why", lambda _: "avx9")  # nor do those of one name that lack instructions
    dispatch._table_name.cache_clear()
    assert dispatch.table_path(torch.device("cpu")).name.startswith("cpu-Other-R-9000-avx9-triton")
    monkeypatch.delenv("ONESHOT_KERNELS_CACHE")
    assert dispatch.table_path(torch.device("cpu")).parent == build.cache_folder()


def test_tile_registers_take_any_number_of_tokens(untuned, monkeypatch):
    weight, _, _ = problem(24, 64, 1, torch.bfloat16)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2])
    monkeypatch.setattr(library, "why", lambda _: "amx")
    assert [dispatch.choose(layer.problem(m)).path for m in (1, 65, 5000)] == ["tiles"] * 3
    assert "any number of tokens" in explain(layer, 5000)


@pytest.mark.parametrize("variant, can, many", [
    ("avx512", {}, "tiles"), ("avx512", {"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "tiles"),
    ("avx512", {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "expand"), ("avx512", {"amx_bf16": True}, "expand"),
    ("avx2", {}, "tiles"), ("neon", {}, "expand")])
def test_many_tokens_expand_only_where_torchs_product_is_faster(untuned, monkeypatch, variant, can, many):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    monkeypatch.setattr(library, "why", lambda _: variant)
    weight, _, _ = problem(24, 64, 1, torch.bfloat16)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2])
    assert [dispatch.choose(layer.problem(m)).path for m in (16, 65, 5000)] == ["tiles", many, many]
    assert dispatch.choose(layer.float().problem(129)).path == ("expand" if variant == "neon" else "tiles")


@pytest.mark.parametrize("m", [3, 70])
def test_operator_passes_opcheck_and_refuses_other_shapes(m, untuned):
    weight, x, bias = problem(20, 36, m, torch.float32)
    values, metadata = tiles(weight)
    torch.library.opcheck(torch.ops.oneshot_kernels.linear.default, (x, values, metadata, 20, bias))
    with pytest.raises(ValueError, match="another shape"):
        ops.linear(x, values[:1], metadata, 20)
    with pytest.raises(ValueError, match="another shape"):
        ops.linear(torch.zeros(2, 68), values, metadata, 20)


def test_gate_and_up_with_norm_and_residual_mean_what_the_reference_says(untuned):
    weight, x, bias = problem(26, 64, 5, torch.float32)
    gain, residual = torch.rand(64), torch.randn(5, 13)
    for m in (1, 5):
        y = ops.linear(x[:m], *tiles(weight), 13, bias, residual[:m], gain, 1e-5, True)
        options = {"bias": bias, "residual": residual[:m], "norm_gain": gain, "norm_eps": 1e-5, "swiglu": True}
        torch.testing.assert_close(y, reference.linear(x[:m], pack(weight), **options).float())


def test_without_a_compiler_a_layer_runs_through_torch_and_explains_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path))
    library.forget()
    dense = nn.Linear(36, 20).requires_grad_(False)
    dense.weight.copy_(problem(20, 36, 1, torch.float32)[0])
    try:
        with pytest.warns(RuntimeWarning, match="plain torch") as seen:
            layers = [Sparse24Linear.from_linear(dense) for _ in range(2)]
        assert len(seen) == 1 and layers[0].weight.ndim == 2
        x = torch.randn(3, 36)
        assert torch.equal(layers[0](x), dense(x)) and "no C++ compiler (CXX=" in explain(layers[0], 3)
    finally:
        library.forget()


def test_the_self_test_finds_a_wrong_library(variant):
    right = cpu._library()
    assert cpu._self_test(right) is None

    class Wrong:
        lanes, expand = right.lanes, right.expand

        @staticmethod
        def linear(x, values, metadata, bias, y, *rest):
            return right.linear(x, values, metadata, None, y, *rest)
    assert "2:4 torch.float32, 1 tokens: relative error" in cpu._self_test(Wrong)


def test_tuning_writes_what_dispatch_reads(untuned, capsys):
    tune.main(["--shapes", "24x64,48x64:swiglu", "--tokens", "1,70", "--dtype", "float32"])
    assert capsys.readouterr().out.count("tokens, us: ") == 4
    weight, _, _ = problem(24, 64, 1, torch.float32)
    layer = Sparse24Linear.from_packed(*pack(weight)[:2])
    assert "measured" in explain(layer, 1) and "measured" in explain(layer, 50)
    with pytest.raises(SystemExit):
        tune.main(["--tokens", "1"])


def test_the_selftest_command_says_what_runs_here(untuned, capsys, monkeypatch):
    assert selftest.main() == 0
    out = capsys.readouterr().out
    assert {*selftest.LIBRARIES, "features"} == {source.stem for source in build.HERE.glob("*.cpp")}  # CPUID: no test
    for name in selftest.LIBRARIES:
        assert all(f"CPU, {name}, {variant}: right" in out for variant in build.variants(name))
    assert "2048x2048 bfloat16" in out and "2048x2048 int4 2:4 bfloat16" in out and "1024 tokens on " in out
    monkeypatch.setattr(selftest, "LIBRARIES", {"linear": cpu})
    monkeypatch.setattr(cpu, "_self_test", lambda cdll: "off by one")
    assert selftest.main() == 1 and "off by one" in capsys.readouterr().out
