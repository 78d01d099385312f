"""Which path int8 and int4 layers take on a CPU: what `explain` says, and what `tune` measures."""


import pytest
import torch
from oneshot_kernels import dispatch, explain, reference
from oneshot_kernels.cpu import integers, library, tune
from oneshot_kernels.cpu.integers import IntegerLinear
from torch import nn
from variants import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("untuned")]


def test_explain_says_which_path_integers_take_and_why(monkeypatch):
    assert integers.available()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(library, "why", lambda _: "avx512")
    monkeypatch.setattr(library, "threads", lambda: 3)
    layer = IntegerLinear.from_linear(nn.Linear(64, 20, dtype=torch.bfloat16))
    assert explain(layer, 9) == ("20x64 int8 bfloat16 threads=3, 9 tokens on cpu: kernel (estimate, untuned; below 128 "
                                 "tokens time is weight bytes), inputs as they are, avx512")
    assert ": expand (estimate, untuned; many tokens" in explain(layer, 128)
    layer.round_inputs = True
    assert ": kernel (only path; it multiplies whole numbers), inputs rounded to int8" in explain(layer, 128)
    dispatch.forget()
    monkeypatch.setattr(library, "why", lambda _: "amx")
    assert "inputs rounded" in explain(layer, 64) and "inputs as they are, amx" in explain(layer, 65)
    other = IntegerLinear.from_linear(nn.Linear(64, 20), bits=4)
    assert "20x64 int4 float32 threads=3, 500 tokens on cpu: kernel" in explain(other, 500)


def test_tuning_measures_where_expanding_wins(capsys):
    tune.main(["--shapes", "24x64", "--tokens", "2,70", "--dtype", "int8"])
    out = capsys.readouterr().out
    assert out.count("24x64 int8 2:4 bfloat16 threads=") == out.count("24x64 int8 bfloat16 threads=") == 2
    dense = nn.Linear(64, 24, bias=False)
    dense.weight.data = reference.random_24(24, 64, torch.float32, torch.Generator().manual_seed(0))
    weight, x = IntegerLinear.from_linear(dense, sparse=True).packed, torch.randn(70, 64).bfloat16()
    assert dispatch.choose(weight.problem(50, x.dtype, True)).source.startswith("measured")
    for us, path in ((1.0, "kernel"), (3.0, "expand")):
        row = {"kernel": {"us": us, "config": None}, "expand": {"us": 2.0, "config": None}}
        key, table = weight.problem(70, x.dtype, True).key, dispatch.table_path(torch.device("cpu"))
        dispatch.save_table(table, {key: {70: row}}, {})
        assert dispatch.choose(weight.problem(70, x.dtype, True)).path == path
    assert torch.equal(integers.linear(x, weight, None, plain=True), integers.through_dense(x, weight))
    with pytest.raises(SystemExit):
        tune.main(["--shapes", "24x64:swiglu", "--dtype", "int4"])
    assert "int4 layers are not fused" in capsys.readouterr().err
