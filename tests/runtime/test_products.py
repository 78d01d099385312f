"""runtime/products.py: float32 products that are as precise by whichever library multiplies."""

import pytest
import torch

from oneshot.runtime import products

SHAPES = [((70, 64), (64, 96)), ((1, 300), (300, 5)), ((3, 40, 172), (3, 172, 33))]


@pytest.fixture(autouse=True)
def fresh():
    """Each test decides anew which library multiplies, as does what comes after."""
    products.by_onednn.cache_clear()
    yield
    products.by_onednn.cache_clear()


@pytest.mark.parametrize("shapes", SHAPES)
def test_products_have_float32s_precision(shapes):
    a, b = map(torch.randn, shapes)
    want, plain = a.double() @ b.double(), a @ b
    with products.float32():
        found = a @ b
    assert (found - want).norm() <= 4 * (plain - want).norm() + 1e-7 * want.norm()


def test_the_setting_is_the_callers_again_also_after_an_error():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), products.float32(tf32=True):
        assert torch.get_float32_matmul_precision() in ("high", "medium")
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def pretend(monkeypatch, name: str, trial: float) -> None:
    """A processor of this name without a GPU, on which products may have errors up to `trial`."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "cpu_name": name})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "ERROR", trial)


@pytest.mark.parametrize("name, trial, want", [("AMD EPYC", 1.0, "medium"), ("AMD EPYC", 0.0, "highest"),
                                               ("Intel(R) Xeon(R)", 1.0, "highest")])
def test_onednn_multiplies_where_it_is_faster_and_the_trial_is_precise(name, trial, want, monkeypatch):
    pretend(monkeypatch, name, trial)
    with products.float32():
        assert torch.get_float32_matmul_precision() == want


def test_a_processor_that_rounds_products_is_found_out(monkeypatch):
    """Those with units for bfloat16 products (AMX) do, once torch lets oneDNN."""
    a, b = torch.randn(2, 300, 300)
    monkeypatch.setattr(products, "by_onednn", lambda: True)
    with products.float32():
        error = (a.double() @ b.double() - a @ b).norm() / (a.double() @ b.double()).norm()
    monkeypatch.undo()
    pretend(monkeypatch, "AMD EPYC", products.ERROR)
    assert products.by_onednn() == bool(error <= products.ERROR)


def test_a_torch_that_does_not_know_its_processor_multiplies_as_ever(monkeypatch):
    """2.9 has no get_capabilities."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    with products.float32():
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_rounds_only_when_asked(monkeypatch):
    pretend(monkeypatch, "AMD EPYC", products.ERROR)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for tf32, want in ((False, "highest"), (True, "high")):
        with products.float32(tf32):
            assert torch.get_float32_matmul_precision() == want
