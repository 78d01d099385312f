"""A packed model takes its packed bytes and those of what is not packed: nowhere is a dense copy beside them."""

import gc
import shutil

import pytest
import tiny
import torch
from decoding import say
from oneshot_kernels import fast_decode, sparsify

import oneshot
from oneshot.checkpoint import packed
from oneshot.report import page

WHOLE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 256, "max_position_embeddings": 64}  # tiles without padding
SLACK = 20_000  # bytes: the rotary tables of 64 positions; less than the smallest linear takes when dense, in bfloat16
FORMS = [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int4:64")]


@pytest.fixture(scope="module", params=FORMS, ids=lambda p: f"{str(p[0])[6:]}-{p[1]}")
def folder(request, tmp_path_factory):
    """A saved packed model of one dtype and rounding."""
    dtype, form = request.param
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SIZES, "llama", WHOLE)
        patch.setattr(page, "_pictures", lambda records: [])
        tiny.make(place)
        tiny.save_model(place / "model", "llama", dtype)
        more = ("--no-dense",) if form == "none" else ("--no-dense", "--quantise", form)
        assert tiny.main(*tiny.flags(place, *more, method="wanda", evaluate="none", save=place / "out",
                                     format="packed")) == 0
    return place / "out"


def living():
    """{where it is: its bytes} of the memory of every tensor that anybody holds, views of it counted once."""
    gc.collect()
    found = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)
             and t.device.type == "cpu" and t.layout == torch.strided]
    return {memory.data_ptr(): memory.nbytes() for memory in found}


def expected(model):
    """Bytes of the packed weights, and of all parameters and buffers beside them."""
    inside = {id(t) for m in packed.linears(model) for t in (*m.parameters(), *m.buffers())}
    rest = {id(t): t for t in (*model.parameters(), *model.buffers())}
    bias = [m.bias for m in packed.linears(model) if m.bias is not None]
    return packed.bytes_of(model)[0] + sum(t.nbytes for key, t in rest.items() if key not in inside) + sum(
        t.nbytes for t in bias)


@pytest.mark.parametrize("how", ["loaded", "ran", "fused", "fast"])
def test_a_packed_model_takes_its_packed_bytes(folder, how):
    """Of everything that is alive because the model is: parameters, buffers, attributes, and what others keep of it."""
    if how == "fast" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    ids = torch.arange(3, 8).unsqueeze(0)
    before = living()
    model, _ = oneshot.load(str(folder))
    want = expected(model)
    dense = packed.bytes_of(model)[1]
    smallest = min(m.in_features * m.rows for m in packed.linears(model)) * model.dtype.itemsize
    assert smallest > SLACK and want < 0.8 * (dense + want - packed.bytes_of(model)[0]), "a dense copy would show"
    if how in ("fused", "fast"):  # as `oneshot generate` does
        sparsify(model)
    if how == "fast":
        assert fast_decode(model) is None
    if how != "loaded":
        assert say(model, ids, n=12).shape == (1, 17)
    now = sum(size for at, size in living().items() if at not in before)
    assert now <= want + SLACK, f"{now} bytes, of which {now - want} are more than packed and rest"
