"""The benchmark of CPU layers: rows, the memory that it waits for, the page that judges them."""

import csv
import functools

import common
import cpu_kernels
import cpu_kernels_table
import pytest
import torch
from variants import needs_compiler


@needs_compiler
def test_cpu_kernels(tmp_path, capsys):
    threads = torch.get_num_threads()
    assert cpu_kernels.main(["--toy", "--threads", "1", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert torch.get_num_threads() == threads
    rows = [line.split(",") for line in (tmp_path / "cpu_kernels.csv").read_text().splitlines()]
    methods = {kind: [row[5] for row in rows[1:] if row[2:4] == [kind, "1"]] for kind in ("float16", "int8", "int4")}
    assert rows[0] == cpu_kernels.HEAD and methods["float16"] == ["torch", "dense", "2:4", "layer", "read"]
    extra = sum("torch's" in own for own in methods.values())
    assert len(rows) == 1 + 2 * (5 * 5 + extra)  # tokens; dtypes, methods
    for row in (dict(zip(rows[0], row, strict=True)) for row in rows[1:]):
        assert float(row["us"]) > 0 and 0 < float(row["memory"]) <= 1
        state = "busy" if float(row["load"]) > 0.3 else "slow memory" if float(row["memory"]) < 0.8 else "idle"
        assert row["machine"] == state
        assert row["method"] != "torch" or row["over_torch"] == "1.00"
    here = [str(value) for value in rows[1]]
    device, threads = cpu_kernels.HEAD.index("device"), cpu_kernels.HEAD.index("threads")
    elsewhere, more = [*here], [*here]
    elsewhere[device], more[threads] = "cpu (another)", "2"
    lines = [",".join(row) for row in (rows[0], here, elsewhere, more)]
    (tmp_path / "cpu_kernels.csv").write_text("\n".join([*lines, ""]))
    assert cpu_kernels.main(["--toy", "--threads", "1", "--out", str(tmp_path)]) == 0
    again = [line.split(",") for line in (tmp_path / "cpu_kernels.csv").read_text().splitlines()]
    assert again[:3] == [rows[0], elsewhere, more] and len(again) == len(rows) + 2


def test_memory_is_waited_for_until_it_is_as_fast_as_it_was(monkeypatch):
    memory, speeds = common.Memory(32, 0.0), iter([10.0, 5.0, 6.0, 9.0, 5.0, 4.0, 7.0])
    def speed_now():
        speed, threads = next(speeds), torch.get_num_threads()
        memory.best[threads] = max(speed, memory.best.get(threads, 0.0))
        return speed
    monkeypatch.setattr(memory, "speed", speed_now)
    assert [cpu_kernels.waited(memory, 3) for _ in range(3)] == [1.0, 0.9, 0.7]


def test_a_turn_touches_what_it_times_and_goes_on_where_the_last_one_ended(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(cpu_kernels.time, "perf_counter", lambda: clock[0])
    def run(seconds, name, i):
        clock[0] += seconds
        calls.append((name, i))
    long = 2 * cpu_kernels.TURN
    runs = {"short": functools.partial(run, 1e-3, "short"), "long": functools.partial(run, long, "long")}
    us = cpu_kernels.interleaved(runs, 2, 3)
    assert us["short"] == pytest.approx(1e3) and us["long"] == pytest.approx(long * 1e6)
    assert [i for name, i in calls if name == "short"] == [0, 1, 2] * 4
    assert [i for name, i in calls if name == "long"] == [0, 0, 1, 1]


def test_memory_is_compared_with_the_best_of_as_many_threads(monkeypatch):
    clock, spent = [0.0], iter([4.0, 4.0, 2.0, 8.0, 8.0, 8.0, 1.0, 1.0])
    monkeypatch.setattr(common.bandwidth, "read", lambda buffer: clock.append(clock[-1] + next(spent)))
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[-1])
    memory = common.Memory(32, seconds=10.0)
    size, threads = memory.buffers[0].nbytes, torch.get_num_threads()
    assert memory.speed() == size / 2 and memory.speed() == size / 8 and memory.best == {threads: size / 2}
    monkeypatch.setattr(common.torch, "get_num_threads", lambda: 64)
    memory.seconds = 0.0
    assert memory.speed() == size and memory.best == {threads: size / 2, 64: size}


def kernel_rows(tokens, dense, ours, *, kind="int8", shape=(4096, 4096), own=None, **more):
    """The rows of a line: microseconds of the dense twin, of 2:4, of torch's own product; torch takes 10."""
    us = {"torch": 10.0, **({"torch's": own} if own else {}), "dense": dense, "2:4": ours, "layer": ours, "read": 1.0}
    first = {"rows": shape[0], "k": shape[1], "dtype": kind, "tokens": tokens, "threads": 1, "limit": 0.9,
             "memory": 1.0, "machine": "idle", "variant": "avx2", "device": "cpu (A)", "torch": "2", "commit": "abc"}
    return [{**dict.fromkeys(cpu_kernels.HEAD, ""), **first, "method": name, "us": value, **more}
            for name, value in us.items()]


def test_the_page_of_layers_judges_line_by_line(tmp_path):
    rows = [*kernel_rows(1, 3.0, 1.5), *kernel_rows(1, 3.0, 2.5, shape=(2048, 2048)),
            *kernel_rows(16, 3.0, 2.0, own=1.5), *kernel_rows(4, 3.0, 9.0, machine="busy"),
            *kernel_rows(1, 3.0, 9.0, memory="", device="cpu (B)"),
            *kernel_rows(64, 3.0, 9.0, kind="float32", shape=(576, 576)),
            *kernel_rows(1, 3.0, 1.0, variant="amx")]
    with (tmp_path / "cpu_kernels.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, cpu_kernels.HEAD)
        out.writeheader()
        out.writerows(rows)
    assert cpu_kernels_table.main(["--out", str(tmp_path), "--check"]) == 1
    assert cpu_kernels_table.main(["--out", str(tmp_path)]) == 0
    assert cpu_kernels_table.main(["--out", str(tmp_path), "--check"]) == 0
    targets, other, lines, older = (tmp_path / "cpu_kernels.md").read_text().split("\n## ")[1:]
    assert targets.startswith("Targets: cpu (A), avx2\n") and other.startswith("Targets: cpu (A), amx\n")
    judged = [[cell.strip() for cell in line.split("|")[1:-1]] for line in targets.splitlines() if "| int8" in line]
    assert ["2:4 / dense", "int8", "1", "1", "1.50", "1.60", "1.20", "1 of 2", "**missed**", "-"] in judged
    assert ["2:4 / torch", "int8", "1", "1", "5.50", "5.33", "4.00", "1 of 2", "**missed**", "7.41"] in judged
    assert ["dense / limit", "int8", "1", "1", "0.85", "0.90", "0.90", "2 of 2", "met", "-"] in judged
    assert ["2:4 / dense", "int8", "4, 16", "1", "1.35", "1.50", "1.50", "1 of 1", "met", "-"] in judged  # not busy
    assert "not measured" in targets and "cpu (B)" not in targets + lines and "cpu (B)" in older
    said = [line.split("|")[9].strip() for line in lines.splitlines() if "| cpu (A)" in line]
    assert said == ["met", "missed: 2:4 / dense 1.20, not 1.50; 2:4 / torch 4.00, not 5.50",
                    "missed: layer / best 0.75, not 1.00", "-", "met", "met"]
    (tmp_path / "none").mkdir()
    assert cpu_kernels_table.main(["--out", str(tmp_path / "none")]) == 2


def test_the_page_of_layers_here_is_not_stale():
    assert cpu_kernels_table.main(["--check"]) == 0, "run python scripts/tables/cpu_kernels_table.py"
