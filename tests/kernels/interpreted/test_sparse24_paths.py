"""The operator, dispatch and tuning with real kernels, under Triton's interpreter."""

import pytest
import torch
from oneshot_kernels import Sparse24Linear, dispatch, explain, ops
from oneshot_kernels.gpu import decode, selftest, tune
from oneshot_kernels.gpu.fragment import to_fragments
from sparse24 import problem

FP16 = torch.float16  # the interpreter truncates what is stored as bfloat16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESHOT_KERNELS_CACHE", str(tmp_path))
    dispatch.forget()


@pytest.mark.parametrize("path", ["decode", "middle", "scratch"])
def test_every_path_computes_the_same_fused_layer(path):
    """N = 20: gate and up are padded to 32 rows each in fragment order, and no path may mix them up."""
    x, packed, extras = problem(20, 36, 5, FP16, bias=True, residual=True, norm=True, swiglu=True)
    fragments = to_fragments(packed, row_blocks=2)
    choice = dispatch.Choice(path, decode.Config() if path == "decode" else None, "test", "")
    y = ops.run(choice, x, *fragments, 20, **extras)
    truth = ops.reference.linear(x, packed, **extras)
    assert selftest.relative_error(y, truth) < 1.5e-3  # two to four roundings


def test_module_runs_from_fragments():
    x, packed, extras = problem(33, 172, 6, FP16, bias=True)
    layer = Sparse24Linear.from_packed(packed.values, packed.metadata, extras["bias"])
    assert layer.weight.shape == (3, 8, 32, 8)
    assert "decode (estimate, untuned" in explain(layer, 6) and "middle (estimate" in explain(layer, 65)
    assert "scratch (estimate" in explain(layer, 4096)
    y = layer(x.view(2, 3, 172))
    truth = ops.reference.linear(x, packed, **extras)
    assert y.shape == (2, 3, 33) and selftest.relative_error(y.view(6, 33), truth) < 5e-4


def test_state_dict_is_row_major_and_loads_back_into_fragments():
    _, packed, _ = problem(33, 172, 1, FP16)
    layer = Sparse24Linear.from_packed(packed.values, packed.metadata)
    state = layer.state_dict()
    assert torch.equal(state["weight"], packed.values) and torch.equal(state["metadata"], packed.metadata)
    other = Sparse24Linear.from_packed(torch.zeros_like(packed.values), packed.metadata)
    other.load_state_dict(state)
    assert other.weight.ndim == 4 and torch.equal(other.weight, layer.weight)


def test_casting_a_prepared_layer_keeps_its_values():
    _, packed, _ = problem(16, 64, 1, FP16)
    layer = Sparse24Linear.from_packed(packed.values, packed.metadata)
    wide = layer.dense().float()
    assert layer.float().weight.ndim == 2 and torch.equal(layer.dense(), wide)
    assert layer.bfloat16().weight.ndim == 4 and torch.equal(layer.dense(), wide.bfloat16())


@pytest.mark.parametrize(
    ("warps", "swiglu", "whole_k", "even_warps"),
    [(2, False, True, True), (2, False, True, False), (2, False, False, True), (2, True, False, False)],
)
def test_selftest_passes_and_covers_the_variant_it_names(warps, swiglu, whole_k, even_warps, monkeypatch):
    seen = []
    monkeypatch.setattr(selftest, "decode", lambda x, *a, **kw: seen.append((x, kw)) or decode.decode(x, *a, **kw))
    v = selftest.Variant(decode.Config(warps=warps), 8, FP16, CPU, True, swiglu, whole_k, even_warps)
    assert selftest.measure(v) < selftest.LIMIT
    ((x, options),) = seen
    assert decode.shape_flags(x.shape[1], options["config"]) == (warps, whole_k, even_warps)


def test_failed_selftest_warns_and_falls_back_to_the_middle_kernel(monkeypatch):
    x, packed, extras = problem(16, 64, 2, FP16)
    layer = Sparse24Linear.from_packed(packed.values, packed.metadata)
    monkeypatch.setattr(selftest, "INTERPRET", False)
    monkeypatch.setattr(selftest, "measure", lambda v: float("inf"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a test")
    monkeypatch.setattr(decode, "decode", lambda *a, **kw: pytest.fail("the distrusted kernel ran"))
    selftest.trusted.cache_clear()
    with pytest.warns(RuntimeWarning, match="FAILED its self-test"):
        y = layer(x)
    selftest.trusted.cache_clear()
    assert selftest.relative_error(y, ops.reference.linear(x, packed, **extras)) < 5e-4


def test_selftest_refuses_to_run_inside_graph_capture(monkeypatch):
    monkeypatch.setattr(selftest, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    selftest.trusted.cache_clear()
    with pytest.raises(RuntimeError, match="before capturing"):
        selftest.trusted(selftest.variant(decode.Config(), 1, 64, FP16, CPU, False, False))


def test_tuning_writes_the_table_that_dispatch_reads(monkeypatch):
    shape = tune.Shape(32, 64)
    monkeypatch.setattr(tune, "decode_candidates", lambda tokens: [decode.Config(), decode.Config(2, 4, 2)])
    slow_first = iter((9.0, 3.0, 5.0))

    def timer(calls):
        return next(slow_first)

    row = tune.fastest(tune.time_candidates(shape, 8, FP16, CPU, timer, copies=2))
    assert row["decode"] == {"us": 3.0, "config": {"row_tiles": 2, "warps": 4, "stages": 2, "direct_x": True}}
    assert row["scratch"] == {"us": 5.0, "config": None}
    path = dispatch.table_path(CPU)
    tune.add_to_table(path, shape, FP16, CPU, 8, row)

    _, packed, _ = problem(32, 64, 1, FP16)
    layer = Sparse24Linear.from_packed(packed.values, packed.metadata)
    assert dispatch.choose(layer.problem(3)).config == decode.Config(2, 4, 2)
    text = explain(layer, 3)
    assert f"measured, {path}" in text and "decode 3.0 us, scratch 5.0 us" in text
    assert dispatch.choose(layer.problem(100)).path == "scratch"  # decode was faster, but takes 64 tokens


def test_tuning_refuses_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(decode, "decode", lambda x, *a, **kw: torch.full((x.shape[0], 32), torch.nan))
    with pytest.raises(RuntimeError, match="is wrong at"):
        tune.time_candidates(tune.Shape(32, 64), 8, FP16, CPU, lambda calls: 1.0, copies=1)


def test_row_major_weights_where_kernels_could_run_are_slow_and_say_so():
    x, packed, extras = problem(16, 64, 2, FP16)
    with pytest.warns(UserWarning, match="row-major, which is slow"):
        y = ops.linear(x, packed.values, packed.metadata, 16)
    assert selftest.relative_error(y, ops.reference.linear(x, packed, **extras)) < 5e-4
