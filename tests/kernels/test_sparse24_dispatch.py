"""The table of measurements and the choice it leads to, without any GPU."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="dispatch between GPU kernels needs Triton (pip install triton)")

from oneshot_kernels import dispatch, shapes
from oneshot_kernels.gpu import decode, expand, tune

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def pretend_hopper(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESHOT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretend H200 (80 GB)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    dispatch._table_name.cache_clear()
    dispatch.forget()
    yield
    dispatch._table_name.cache_clear()
    dispatch.forget()


def choose(tokens, **options):
    return dispatch.choose(dispatch.Problem(tokens, 6144, 4096, torch.bfloat16, GPU, **options))


def test_untuned_choices_are_labelled_estimates():
    paths = {tokens: choose(tokens).path for tokens in (1, 64, 65, 512, 513, 4096)}
    assert paths == {1: "decode", 64: "decode", 65: "middle", 512: "middle", 513: "scratch", 4096: "scratch"}
    assert choose(513, prefill_copy=True).path == "sparselt"
    assert choose(8).source == "estimate, untuned" and choose(8).config == decode.default_config(8, 4096)


def test_measured_times_decide_among_what_is_usable():
    config = {"row_tiles": 2, "warps": 4, "stages": 4, "direct_x": False}
    measured = {
        "decode": {"us": 7.0, "config": config},
        "sparselt": {"us": 5.0, "config": 3},
        "scratch": {"us": 9.0, "config": None},
    }
    path = dispatch.table_path(GPU)
    assert path.name.startswith("Pretend-H200-80-GB-") and not path.exists()
    dispatch.save_table(path, {"6144x4096 bfloat16": {16: measured}}, {"device": "Pretend"})
    assert choose(9).path == "decode" and choose(9).config == decode.Config(2, 4, 4, False)
    assert choose(9, prefill_copy=True).config == 3  # cuSPARSELt's algorithm number
    assert choose(100).path == "scratch"  # beyond the largest measured size: no decode there
    assert choose(9, swiglu=True).source == "estimate, untuned"  # another epilogue, another entry
    assert str(path) in choose(9).source and "decode 7.0 us, scratch 9.0 us" in choose(9).reason


def test_the_next_measured_size_up_counts():
    rows = {4: {"scratch": {"us": 1.0, "config": None}}, 16: {"decode": {"us": 2.0, "config": {}}}}
    dispatch.save_table(dispatch.table_path(GPU), {"6144x4096 bfloat16": rows}, {})
    assert [choose(tokens).path for tokens in (1, 4, 5, 16)] == ["scratch", "scratch", "decode", "decode"]


def test_the_table_is_written_whole_and_read_back():
    path = dispatch.table_path(GPU)
    tune.add_to_table(path, tune.Shape(64, 32), torch.float16, GPU, 1, {"scratch": {"us": 2.0, "config": None}})
    tune.add_to_table(path, tune.Shape(64, 32), torch.float16, GPU, 8, {"scratch": {"us": 3.0, "config": None}})
    assert set(dispatch.load_table(path)["64x32 float16"]) == {1, 8}
    assert json.loads(path.read_text())["device"] == "Pretend H200 (80 GB)"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary left behind


def test_a_damaged_table_is_not_ignored():
    path = dispatch.table_path(GPU)
    path.write_text("{}")
    with pytest.raises(ValueError, match="delete it and tune again"):
        choose(1)


@pytest.mark.parametrize(("hip", "capability", "path"), [("6.4", (9, 4), "middle"), (None, (7, 5), "scratch")])
def test_gpus_without_sparse_tensor_cores(hip, capability, path, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose(1).path == path


def test_middle_kernel_splits_k_until_the_gpu_is_full():
    assert expand.default_config(64, 4096, 4096).split == 4  # 64 programs for 132 multiprocessors
    assert expand.default_config(512, 28672, 4096).split == 1


def test_model_shapes_and_the_command_line(capsys):
    llama_3_8b = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    }
    wanted = [
        tune.Shape(6144, 4096),
        tune.Shape(4096, 4096),
        tune.Shape(28672, 4096, True),
        tune.Shape(4096, 14336),
    ]
    assert shapes.model_shapes(llama_3_8b) == wanted
    apart = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]  # q and o, k and v, gate and up, down
    assert shapes.model_shapes(llama_3_8b, fused=False) == [tune.Shape(*size) for size in apart]
    assert tune.Shape.parse("28672x4096:swiglu") == wanted[2] and wanted[2].outputs == 14336
    for text in ("6144", "6144x", "64x64:gelu"):
        with pytest.raises(ValueError, match="a shape looks like"):
            tune.Shape.parse(text)
    with pytest.raises(SystemExit):
        tune.main(["--shapes", "64x64"])
    assert "needs a GPU" in capsys.readouterr().err
