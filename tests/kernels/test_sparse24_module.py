"""The operator, the module and `sparsify` on a CPU, by whatever path it has (test_cpu_linear.py: which)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oneshot_kernels import Sparse24Linear, explain, ops, pack, sparsify, unpack
from oneshot_kernels.gpu import prefill
from oneshot_kernels.reference import linear as truth
from torch import nn


def prune(weight):
    """2:4 by magnitude, in place."""
    groups = weight.data.view(-1, 4)
    groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0.0)


class Attention(nn.Module):
    """Projections under transformers' names; q and k have a bias as in Qwen2."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 24), nn.Linear(32, 8), nn.Linear(32, 8)
        self.o_proj = nn.Linear(24, 32, bias=False)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x), self.k_proj(x)], dim=-1))


class MLP(nn.Module):
    def __init__(self, swapped=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 20, bias=False), nn.Linear(32, 20, bias=False)
        self.down_proj, self.act_fn, self.swapped = nn.Linear(20, 32, bias=False), nn.SiLU(), swapped

    def forward(self, x):
        gate, up = (self.up_proj, self.gate_proj) if self.swapped else (self.gate_proj, self.up_proj)
        return self.down_proj(self.act_fn(gate(x)) * up(x))


class Block(nn.Module):
    def __init__(self, swapped=False):
        super().__init__()
        self.self_attn, self.mlp, self.lm_head = Attention(), MLP(swapped), nn.Linear(32, 12)

    def forward(self, x):
        return self.lm_head(self.mlp(self.self_attn(x)))


def block(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Block(**options).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            prune(module.weight)
    return model


def packed_problem(n=20, k=36, dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight = torch.randn(n, k).to(dtype)
    prune(weight)
    return torch.randn(3, 5, k).to(dtype), weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layer_errs_at_most_twice_as_much_as_its_dense_twin(dtype):
    dense = nn.Linear(36, 20).to(dtype)
    prune(dense.weight)
    layer = Sparse24Linear.from_linear(dense)
    x = torch.randn(3, 5, 36).to(dtype)
    truth = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double())
    assert (layer(x) - truth).norm() <= 2 * (dense(x) - truth).norm() and torch.equal(layer.dense(), dense.weight)
    assert layer(x[:0]).shape == (0, 5, 20)


def test_fused_operator_means_what_the_reference_says():
    x, weight = packed_problem(dtype=torch.float32)
    packed = pack(weight)
    gain, bias, residual = torch.rand(36), torch.randn(20), torch.randn(3, 5, 10)
    y = ops.linear(x, packed.values, packed.metadata, 10, bias, residual, gain, 1e-5, True)
    options = {"bias": bias, "residual": residual, "norm_gain": gain, "norm_eps": 1e-5, "swiglu": True}
    torch.testing.assert_close(y, truth(x, packed, **options).float())


def test_operator_passes_opcheck():
    x, weight = packed_problem()
    values, metadata, _ = pack(weight)
    for extras in (
        (),
        (torch.randn(20).bfloat16(), torch.randn(3, 5, 20).bfloat16(), torch.rand(36).bfloat16(), 1e-5),
    ):
        torch.library.opcheck(torch.ops.oneshot_kernels.linear.default, (x, values, metadata, 20, *extras))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 40)}, "another shape"),
        ({"x": torch.zeros(2, 36, dtype=torch.float64)}, "x is torch.float64"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"residual": torch.zeros(1, 20)}, "residual must have shape"),
        ({"norm_gain": torch.zeros(35)}, "norm_gain must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    _, weight = packed_problem(dtype=torch.float32)
    values, metadata, _ = pack(weight)
    arguments = {"x": torch.zeros(2, 36), "values": values, "metadata": metadata, "out_features": 20}
    with pytest.raises(ValueError, match=message):
        ops.linear(**{**arguments, **change})


def test_an_empty_layer_loads_a_packed_checkpoint():
    _, weight = packed_problem()
    source = Sparse24Linear.from_packed(*pack(weight)[:2], torch.randn(20).bfloat16())
    state = source.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "weight": (20, 18),
        "metadata": (20, 5),
        "bias": (20,),
    }
    empty = Sparse24Linear(36, 20, device="meta", dtype=torch.bfloat16)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.prepare().dense(), weight) and torch.equal(empty.bias, source.bias)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Sparse24Linear(40, 20, dtype=torch.bfloat16).load_state_dict(state)
    with pytest.raises(ValueError, match="divisible by 4"):
        Sparse24Linear(38, 20)


def test_prefill_copy_says_why_it_cannot_work():
    _, weight = packed_problem()
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        Sparse24Linear.from_packed(*pack(weight)[:2], prefill_copy=True)


def test_prefill_copies_are_counted_and_printed(monkeypatch, capsys):
    """Where cuSPARSELt can run; its blob is stood in for by one of the size that the packed weight has."""
    def blob(dense):
        return torch.zeros(dense.numel() * dense.element_size() * 9 // 16, dtype=torch.uint8)

    monkeypatch.setattr(prefill, "compress", blob)
    monkeypatch.setattr(prefill, "sparselt_refuses", lambda n, k, *at: None if k % 16 == 0 else "K is odd")
    model = block()
    report = sparsify(model, prefill_copy=True)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Sparse24Linear)}
    kept = {name for name, m in layers.items() if m.prefill_copy is not None}
    assert kept == {name for name, m in layers.items() if m.in_features % 16 == 0} and kept != set(layers)
    assert report.prefill_copy_bytes == sum(layers[name].rows * layers[name].in_features * 9 // 4 for name in kept)
    assert set(report.no_prefill_copy) == set(layers) - kept
    assert "prefill copies (2 impossible)" in capsys.readouterr().out


def test_prefill_copies_on_cpu_are_impossible_and_say_so(capsys):
    report = sparsify(block(), prefill_copy=True)
    assert report.prefill_copy_bytes == 0 and "0 MiB of prefill copies (4 impossible)" in capsys.readouterr().out
    assert set(report.no_prefill_copy.values()) == {"cuSPARSELt needs an NVIDIA GPU"}


def test_explain_on_cpu():
    layer = Sparse24Linear.from_packed(*pack(packed_problem()[1])[:2])
    layer._arrange(2)
    text = explain(layer, 3)
    assert text.startswith("20x36 bfloat16, 3 tokens on cpu: reference (only path; on CPU: unpack, then F.linear)")


def test_sparsify_fuses_and_computes_the_same():
    model, x = block(), torch.randn(2, 3, 32)
    want = model(x)
    report = sparsify(model)
    assert report.fused == ["self_attn.(q_proj, k_proj, v_proj)", "mlp.(gate_proj, up_proj, down_proj)"]
    assert report.skipped == {"lm_head": "asked to skip"} and len(report.replaced) == 7
    torch.testing.assert_close(model(x), want)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(x[:1]), model(x[:1]))  # and nothing is left over from the call before


def test_projections_share_one_launch(monkeypatch):
    model, x = block(), torch.randn(2, 3, 32)
    sparsify(model)
    shared = model.self_attn.q_proj.shared
    calls = []
    monkeypatch.setattr(shared, "layer", lambda x: calls.append(x) or model.self_attn.q_proj.layer(x))
    q, k, v = (getattr(model.self_attn, name)(x) for name in ("q_proj", "k_proj", "v_proj"))
    assert len(calls) == 1 and (q.shape[-1], k.shape[-1], v.shape[-1]) == (24, 8, 8)
    assert shared.x is None and not shared.outputs  # no activation outlives the layer
    model.self_attn.v_proj(torch.randn(1, 32))
    assert len(calls) == 2 and torch.equal(model.self_attn.q_proj(x), q)


def test_fused_state_dict_is_the_unfused_one():
    model = block()
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify(model)
    state = model.state_dict()
    packed = {name.removesuffix("metadata") for name in state if name.endswith("metadata")}
    assert set(state) - {name + "metadata" for name in packed} == set(dense)
    for name, tensor in dense.items():
        if name.endswith("weight") and name != "lm_head.weight":
            prefix = name.removesuffix("weight")
            assert torch.equal(unpack(state[name], state[prefix + "metadata"]), tensor)
        else:
            assert torch.equal(state[name], tensor)


def test_a_forward_that_only_looks_familiar_is_not_fused():
    """gate and up exchanged: same names, another function."""
    model, x = block(swapped=True), torch.randn(2, 3, 32)
    want = model(x)
    report = sparsify(model)
    assert report.fused == ["self_attn.(q_proj, k_proj, v_proj)"]
    torch.testing.assert_close(model(x), want)


def test_sparsify_leaves_dense_layers_and_says_so():
    model = block()
    model.mlp.down_proj = nn.Linear(20, 32, bias=False)
    report = sparsify(model, fuse=False)
    assert report.skipped["mlp.down_proj"] == "weight is not 2:4" and not report.fused
    assert "6 layers packed" in str(report) and "2 left dense" in str(report)
    with pytest.raises(ValueError, match="no linear layer of this model is 2:4"):
        sparsify(nn.Sequential(nn.Linear(8, 8)))


def test_backward_is_refused_loudly():
    x, weight = packed_problem(dtype=torch.float32)
    y = Sparse24Linear.from_packed(*pack(weight)[:2])(x.requires_grad_())
    with pytest.raises(RuntimeError):
        y.sum().backward()


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it now fails
import torch
from oneshot_kernels import Sparse24Linear, explain, pack
weight = torch.eye(8)
layer = Sparse24Linear.from_packed(*pack(weight)[:2])
assert torch.equal(layer(weight), weight) and "8 tokens on cpu: " in explain(layer, 8)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(ops.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
