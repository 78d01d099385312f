"""The compiled int8 and int4 linears, dense and 2:4: every variant this CPU runs, against float64 on the very codes."""


import pytest
import torch
import torch.nn.functional as F
import variants
from oneshot_kernels import reference, sparsify
from oneshot_kernels.cpu import integers, library
from oneshot_kernels.cpu import linear as cpu_linear
from oneshot_kernels.cpu.codes import emulate, round_groups, round_input, round_rows, value
from oneshot_kernels.cpu.integers import IntegerLinear, linear, prepare
from torch import nn
from variants import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("untuned")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=variants.NAMES)
def variant(request, monkeypatch):
    """This variant is the library."""
    variants.use(integers, "integers", request.param, monkeypatch)


def rounded(weight, bits):
    return round_rows(weight) if bits == 8 else round_groups(weight)


def problem(n, k, m, dtype, sparse, seed=0, bits=8):
    """(codes, scale, x, bias); inputs of very different size."""
    g = torch.Generator().manual_seed(seed)
    weight = reference.random_24(n, k, torch.float32, g) if sparse else torch.randn(n, k, generator=g)
    codes, scale = rounded(weight, bits)
    x = torch.randn(m, k, generator=g) * torch.randn(k, generator=g).exp()
    return codes, scale, x.to(dtype), torch.randn(n, generator=g).to(dtype)


@pytest.mark.parametrize("as_it_is", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n, k", [(1, 4), (5, 36), (16, 172), (70, 576), (131, 1052), (3, 11008)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_at_most_twice_as_much_as_torch(variant, dtype, n, k, sparse, bits, as_it_is):
    """Against float64 on the very codes; torch multiplies them in float32. Over all numbers of tokens together."""
    ours = plain = 0.0
    for m in (1, 2, 3, 7, 16, 70):
        codes, scale, x, bias = problem(n, k, m, dtype, sparse, m, bits)
        weight = prepare(codes, scale, sparse=sparse, bits=bits)
        for b in (bias, None):
            stays = as_it_is or integers.stays(len(x), x.dtype)
            y, truth = linear(x, weight, b, as_it_is), emulate(x, codes, scale, b, stays)
            seen = x.float() if stays else round_input(x).float()
            theirs = F.linear(seen, value(codes, scale).float(), None if b is None else b.float()).to(dtype)
            assert y.dtype == dtype and y.shape == (m, n)
            ours, plain = (e + (z.double() - truth).square().sum() for e, z in ((ours, y), (plain, theirs)))
    assert ours.sqrt() <= 2 * plain.sqrt()
    if n > 1 and k >= 100 and not as_it_is:  # and near the product that is not rounded at all
        exact = F.linear(x.double(), value(codes, scale))
        assert (emulate(x, codes, scale, None) - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("least", [-127, -128])
def test_the_largest_sums_do_not_overflow(variant, least):
    codes = torch.full((20, 128), 127, dtype=torch.int8)
    codes[::2] = least
    x = torch.full((3, 128), 5.0)
    y = linear(x, prepare(codes, torch.ones(20), sparse=False))
    assert torch.allclose(y, x @ codes.float().T, rtol=1e-6)
    codes[:, 2::4] = codes[:, 3::4] = 0
    y = linear(-x, prepare(codes, torch.ones(20), sparse=True))
    assert torch.allclose(y, -x @ codes.float().T, rtol=1e-6)


def test_every_code_of_int4_is_computed_with(variant):
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 8)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    scale = torch.ones(3, 2)
    y = linear(x, prepare(codes, scale, sparse=False, bits=4))
    assert torch.allclose(y.double(), emulate(x, codes, scale, None), rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
def test_any_number_of_threads_gives_the_same_bits(variant, sparse, bits, monkeypatch):
    codes, scale, x, bias = problem(400, 256, 5, torch.float32, sparse, 0, bits)
    weight, found = prepare(codes, scale, sparse=sparse, bits=bits), []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        found.append(linear(x, weight, bias))
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("as_it_is", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_token_does_not_depend_on_those_beside_it(variant, sparse, bits, as_it_is):
    codes, scale, x, bias = problem(83, 200, 70, torch.float32, sparse, 0, bits)
    weight = prepare(codes, scale, sparse=sparse, bits=bits)
    together = linear(x, weight, bias, as_it_is)
    for few in (1, 3, 17, 35):
        apart = torch.cat([linear(part.contiguous(), weight, bias, as_it_is) for part in x.split(few)])
        assert torch.equal(apart, together)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n, k", [(16, 64), (1100, 100), (131, 1052)])  # more than an item, a panel
def test_many_tokens(variant, n, k, sparse, bits, monkeypatch):
    """bfloat16, more tokens than a batch, whatever the threads; beside torch's product in bfloat16."""
    codes, scale, x, bias = problem(n, k, 530, torch.bfloat16, sparse, 0, bits)
    weight, found, dense = prepare(codes, scale, sparse=sparse, bits=bits), [], value(codes, scale).bfloat16()
    for threads in (1, 2, 3):
        monkeypatch.setattr(library, "threads", lambda threads=threads: threads)
        found.append(linear(x, weight, bias, plain=True))
    assert all(torch.equal(y, found[0]) for y in found)
    truth = emulate(x, codes, scale, bias, plain=True)
    assert (found[0] - truth).norm() <= 2 * (F.linear(x, dense, bias) - truth).norm()
    if integers.stays(len(x), x.dtype):
        assert torch.equal(linear(x, weight, bias), found[0])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("part", [1, 20000, 1 << 22])
def test_a_product_in_parts_is_the_whole_one(variant, part, sparse, bits, monkeypatch):
    monkeypatch.setattr(cpu_linear, "PART", part)
    for dtype in DTYPES:
        codes, scale, x, bias = problem(131, 172, 5, dtype, sparse, 0, bits)
        weight, dense = prepare(codes, scale, sparse=sparse, bits=bits), value(codes, scale).to(dtype)
        for b in (bias, None):
            torch.testing.assert_close(integers.through_dense(x, weight, b), F.linear(x, dense, b))


@pytest.mark.parametrize("units, variant, tokens, asked", [
    ("AMD", "avx512", 128, True), ("AMD", "avx512", 127, False), ("Intel", "avx512", 128, False),
    ("AMD", "amx", 128, False), ("", "avx2", 128, False)])
def test_many_tokens_go_through_torch_where_it_has_units_for_bfloat16(units, variant, tokens, asked, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bool(units), "cpu_name": units},
                        raising=False)
    assert integers.available()
    monkeypatch.setattr(library, "why", lambda _: variant)
    called, true = [], integers.through_dense
    monkeypatch.setattr(integers, "through_dense", lambda *args: called.append(1) or true(*args))
    codes, scale, x, bias = problem(20, 64, tokens, torch.bfloat16, True)
    linear(x, prepare(codes, scale, sparse=True), bias, plain=True)
    linear(x.float(), prepare(codes, scale, sparse=True), bias.float(), plain=True)
    assert bool(called) == asked and len(called) <= 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_pass_through(variant, bad, bits):
    codes, scale, x, _ = problem(20, 200, 3, torch.float32, True, 0, bits)
    x[1, 77] = bad
    y = linear(x, prepare(codes, scale, sparse=True, bits=bits))
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        rounded(torch.tensor([[1.0, bad]]), bits)


def test_a_layer_without_outputs_has_none(variant):
    layer = integers.IntegerLinear.from_linear(nn.Linear(64, 0, dtype=torch.bfloat16))
    assert all(layer(torch.ones(m, 64, dtype=torch.bfloat16)).shape == (m, 0) for m in (1, 9, 70))


def test_zeros_stay_zero(variant):
    for bits in (8, 4):
        codes, scale = rounded(torch.zeros(3, 8), bits)
        assert not codes.any() and bool((scale == 1).all())
        assert not linear(torch.zeros(2, 8), prepare(codes, scale, sparse=True, bits=bits)).any()


def test_what_int4_cannot_hold_is_refused(variant):
    codes, scale = torch.full((1, 64), 7, dtype=torch.int8), torch.ones(1, 1)
    for c, s in ((codes + 1, scale), (-codes - 2, scale), (codes, scale / 3)):
        with pytest.raises(ValueError, match="int4 wants codes from -8 to 7"):
            prepare(c, s, sparse=False, bits=4)
    with pytest.raises(ValueError, match="no fp16 scale"):
        round_groups(torch.full((1, 4), 1e6))
    weight = torch.randn(3, 100)
    codes, scale = round_groups(weight)
    assert (value(codes, scale) - weight).abs().max() <= 0.51 * scale.max() and codes.abs().max() == 7
    packed = prepare(codes, scale, sparse=False, bits=4)
    assert packed.values.numel() == len(packed.values) * packed.values.shape[2] * 128 // 2  # half a byte a weight


def test_memory_is_what_the_formats_take(variant):
    weight = reference.random_24(64, 512, torch.float32, torch.Generator().manual_seed(0))
    for bits, share in ((8, 0.625 + 4 / 512), (4, 0.375 + 2 / 64)):
        packed = prepare(*rounded(weight, bits), sparse=True, bits=bits)
        assert sum(t.numel() * t.element_size() for t in packed[:2]) == share * weight.numel()


def test_codes_that_are_not_24_are_refused(variant):
    with pytest.raises(ValueError, match=r"not 2:4: row 0, columns 0\.\.3"):
        prepare(torch.ones(2, 8, dtype=torch.int8), torch.ones(2), sparse=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rounds", [True, False])
def test_the_module_and_its_operator(rounds, sparse, bits):
    if not integers.available():
        pytest.skip(library.why("integers"))
    layer = nn.Linear(36, 20)
    layer.weight.data = reference.random_24(20, 36, torch.float32, torch.Generator().manual_seed(0))
    ours, x = IntegerLinear.from_linear(layer, bits=bits, sparse=sparse, round_inputs=rounds), torch.randn(2, 3, 36)
    want = emulate(x.view(6, 36), *rounded(layer.weight.detach(), bits), layer.bias.detach(), not rounds).view(2, 3, 20)
    assert ("inputs in int8" in repr(ours)) == rounds
    torch.testing.assert_close(ours(x).double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.dense(), value(*rounded(layer.weight.detach(), bits)).float())
    assert ours(x[:0]).shape == (0, 3, 20) and f"int{bits} {'2:4' if sparse else 'dense'}" in repr(ours)
    torch.library.opcheck(torch.ops.oneshot_kernels.linear_integers.default,
                          (x, ours.values, ours.scale, ours.bias, 20, bits, False))
    half = ours.to(torch.bfloat16)
    assert half.scale.dtype == (torch.float32 if bits == 8 else torch.float16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="do not fit"):
        half(x)
    with pytest.raises(ValueError, match="do not fit"):
        ours(torch.randn(2, 400).bfloat16())


def test_without_a_compiler_a_layer_says_why_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("ONESHOT_CACHE", str(tmp_path))
    library.forget()
    try:
        with pytest.warns(RuntimeWarning, match="plain torch"), pytest.raises(ValueError, match=r"there is no C\+\+"):
            IntegerLinear.from_linear(nn.Linear(64, 32))
    finally:
        library.forget()


def test_what_is_not_on_the_cpu_is_refused_or_only_shaped():
    if not integers.available():
        pytest.skip(library.why("integers"))
    layer = IntegerLinear.from_linear(nn.Linear(64, 32))
    assert layer(torch.empty(2, 64, device="meta")).shape == (2, 32)
    with pytest.raises(ValueError, match="both must be on the CPU"):
        integers.compute(torch.empty(2, 64, device="meta"), layer.values, layer.scale, layer.bias, 32, 8)


def test_a_rounded_head(monkeypatch):
    if not integers.available():
        pytest.skip(library.why("integers"))
    model = nn.Module()
    model.proj, model.lm_head = nn.Linear(32, 16, bias=False), nn.Linear(16, 40, bias=False)
    model.proj.weight.data = reference.random_24(16, 32, torch.float32, torch.Generator().manual_seed(0))
    x, want = torch.randn(3, 16), model.lm_head
    report = sparsify(model, head="int8")
    assert report.replaced == ["proj", "lm_head (int8)"] and not report.skipped
    assert (model.lm_head(x) - want(x)).norm() < 0.02 * want(x).norm()
    with pytest.raises(ValueError, match=r"plain nn\.Linear lm_head"):
        sparsify(model, head="int8")
    with pytest.raises(ValueError, match="give 'int8' or None"):
        sparsify(model, head="int3")


def test_the_self_test_finds_a_wrong_library(variant):
    right = integers._library()
    assert integers._self_test(right) is None

    class Wrong:
        lanes = right.lanes

        @staticmethod
        def linear_integers(x, values, scale, bias, *rest):
            return right.linear_integers(x, values, scale, None, *rest)
    assert "2:4 int8 torch.float32, 1 tokens: relative error" in integers._self_test(Wrong())
