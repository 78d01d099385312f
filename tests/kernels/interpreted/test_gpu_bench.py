"""scripts/bench/gpu.py at toy size, in slices: everything but the timing. Its report, from made-up times."""

import csv
import json
import re

import gpu
import gpu_baselines as others
import gpu_checks as checks
import gpu_report as report
import pytest
import torch
from gpu_measure import Bench
from oneshot_kernels.gpu import decode, expand, mma_sp, tune
from oneshot_kernels.gpu.selftest import relative_error

STAMP = {"commit": "abc", "device": "a card", "torch": "2", "triton": "3", "dtype": "bfloat16"}


def test_toy_run_resumes_and_covers_every_stage(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers", reason="end-to-end decode needs transformers")
    monkeypatch.setenv("ONESHOT_KERNELS_CACHE", str(tmp_path / "tuned"))
    monkeypatch.chdir(tmp_path)
    assert gpu.main(["--toy", "--budget-s", "0"]) == 0
    assert (tmp_path / "build" / "gpu_toy" / "tables.md").exists() and not (tmp_path / "results").exists()
    slices = 0
    while "done\n" not in capsys.readouterr().out.replace("not done", ""):
        assert gpu.main(["--toy", "--results", str(tmp_path), "--budget-s", "2"]) == 0
        slices += 1
        assert slices < 10, "the bench makes no progress"
    assert slices > 1
    with (tmp_path / "bench" / "kernels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["stage"] for row in rows} == {"check", "ceiling", "sweep", "table", "mlp"}
    methods = {row["method"] for row in rows}
    assert {"read", "matmul", "mma.sp", "dense", "int8", "fused", "ours: decode", "ours: middle"} <= methods
    assert len([row for row in rows if row["method"] == "read"]) == 1  # no unit ran twice
    assert all(row["device"].startswith("cpu (toy") and row["us"] == "" for row in rows)
    with (tmp_path / "bench" / "decode.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["dense", "packed"]
    assert "Not measured yet" in (tmp_path / "tables.md").read_text()
    assert not (tmp_path / "figures").exists()


def test_a_wrong_result_stops_it_with_exit_code_1(tmp_path, monkeypatch, capsys):
    """A fragment map with two registers of A exchanged is what a GPU that disagrees with us would look like."""
    right = checks.to_fragments
    monkeypatch.setattr(checks, "to_fragments", lambda p: (right(p)[0].roll(2, dims=-1), right(p)[1]))
    assert gpu.main(["--toy", "--results", str(tmp_path)]) == 1
    assert "STOPPED: mma.sp fragment map, k-block 0" in capsys.readouterr().err
    assert not (tmp_path / "bench" / "kernels.csv").exists()


def test_a_wrong_path_is_caught(monkeypatch):
    monkeypatch.setattr(expand, "matmul", lambda x, v, m, n, **kw: torch.zeros(x.shape[0], n, dtype=x.dtype))
    with pytest.raises(checks.Wrong, match="middle"):
        checks.paths(torch.device("cpu"), torch.float16, toy=True)


@pytest.mark.parametrize(("method", "rounding"), [(others.int8, 0.01), (others.int4, 0.15)])
def test_dense_baselines_of_fewer_bits_compute_the_layer(method, rounding):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 256, generator=generator).bfloat16() for rows in (64, 5))
    error = relative_error(method(weight)(x), x.double() @ weight.double().T)
    assert rounding / 10 < error < rounding


def test_a_baseline_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(others, "int8", lambda weight: lambda x: x.new_zeros(x.shape[0], weight.shape[0]))
    bench = Bench(torch.device("cpu"), torch.float16, toy=True)
    rows = {row["method"]: row for row in others.baselines(bench, tune.Shape(64, 256), 3)}
    assert rows["int8"]["config"] == "failed: relative error 1" and "us" not in rows["int8"]
    assert rows["sparselt"]["config"].startswith("failed: ") and "us" in rows["dense"] and "us" in rows["int4"]


def test_a_toy_run_needs_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "INTERPRET", False)
    for arguments, message in ((["--toy"], "set TRITON_INTERPRET=1"), ([], "no GPU here")):
        assert gpu.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert mma_sp.INTERPRET


def measured_rows():
    """What a GPU run would append: one shape, two sizes, times chosen so that the arithmetic is easy to check."""
    common = {"stage": "table", "n": 4096.0, "k": 4096.0}
    rows = []
    for tokens, dense, sparselt, ours in ((1.0, 10.0, 20.0, 5.0), (8.0, 10.0, 12.0, 8.0)):
        times = {"dense": dense, "sparselt": sparselt, "int4": 4.0, "ours: decode": ours, "ours: scratch": 30.0}
        rows += [{**common, "tokens": tokens, "method": method, "us": us} for method, us in times.items()]
    gpu.derive(rows, read_tb_per_s=4.0)
    ceiling = {"stage": "ceiling", "n": "", "k": "", "tokens": ""}
    rows.append({**ceiling, "method": "read", "us": 1.0, "tb_per_s": 4.0})
    rows.append({**ceiling, "method": "matmul", "us": 1.0, "tflop_per_s": 700.0})
    return rows


def test_derived_figures():
    rows = {(row["method"], row["tokens"]): row for row in measured_rows()}
    assert rows["ours: decode", 1.0]["speedup"] == 2.0 and "speedup" not in rows["dense", 1.0]
    assert rows["dense", 1.0]["tb_per_s"] == pytest.approx(4096 * 4096 * 2 / 10 / 1e6)
    packed = rows["ours: decode", 1.0]
    assert packed["tb_per_s"] == pytest.approx(4096 * 4096 * 1.125 / 5 / 1e6)
    assert packed["percent_of_read"] == pytest.approx(25 * packed["tb_per_s"])


def test_report_keeps_what_others_wrote_and_draws(tmp_path):
    (tmp_path / "tables.md").write_text("# Tables\n\nmine\n")
    model = [{"stage": "decode", "method": "packed", "batch": 1.0, "ms_per_step": 2.0, "tokens_per_s": 500.0}]
    model[0] |= {"speedup": 1.6, "peak_gib": 10.0}
    report.write_report(tmp_path, [], [], STAMP, False)
    report.write_report(tmp_path, measured_rows(), model, STAMP, True)
    text = re.sub(" +", " ", (tmp_path / "tables.md").read_text())
    assert text.startswith("# Tables\n\nmine\n") and text.count("kernels: written by") == 1
    assert "Not measured" not in text
    assert "| 4096x4096 | 2.00 | 1.25 |" in text and "| geometric mean | 2.00 | 1.25 |" in text
    assert "geometric mean 2.45x, worst 1.50x, over 2" in text  # sqrt(20/5 * 12/8)
    assert "up to 64 tokens: int4 2.50x over" in text
    assert "read 4.00 TB/s, matmul 700 TFLOP/s" in text and "| packed | 1 | 2.00 | 500 | 1.60 | 10.0 |" in text
    assert "Unfinished" not in text
    assert (tmp_path / "figures" / "kernels_speedup.png").stat().st_size > 10_000


def test_the_best_of_the_sweep_are_tried_elsewhere():
    def row(tokens, config, us, path="decode"):
        common = {"stage": "sweep", "n": 1.0, "k": 2.0, "method": path, "tokens": tokens, "us": us}
        return {**common, "config": json.dumps(config)}

    rows = [row(8.0, {"warps": warps}, us) for warps, us in ((4, 9.0), (8, 5.0), (16, 7.0), (2, 6.0))]
    rows += [row(64.0, {"warps": 1}, 1.0), row(64.0, {"split": 2}, 1.0, "middle")]
    best = [decode.Config(warps=warps) for warps in (8, 2, 16)]
    assert gpu.best_configs(rows, "decode", 4) == best
    assert gpu.best_configs(rows, "decode", 9) == [decode.Config(warps=1)]
    assert gpu.best_configs(rows, "middle", 256) == [expand.Config(split=2)]
    assert gpu.best_configs([], "decode", 4) == []


def test_results_of_other_code_are_not_resumed(tmp_path):
    results = gpu.Results(tmp_path, STAMP, restart=False)
    results.add("unit", [{"stage": "table", "method": "dense", "us": 1.5}])
    assert gpu.Results(tmp_path, STAMP, restart=False).done == ["unit"]
    assert gpu.Results(tmp_path, STAMP, restart=False).rows("kernels")[0]["us"] == 1.5
    other = gpu.Results(tmp_path, {**STAMP, "commit": "def"}, restart=False)
    assert other.done == [] and other.rows("kernels") == []
    assert gpu.Results(tmp_path, STAMP, restart=True).done == []
