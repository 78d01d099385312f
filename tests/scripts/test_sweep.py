"""Sweeps: what the file asks for, what is recognised as finished, failures as rows, shards, a kill."""

from pathlib import Path

import index
import pytest
import sweep
import tiny
from sweeping import go, rows, write
from tiny import place  # noqa: F401

from oneshot import models, report
from oneshot.pipeline import run
from oneshot.report import tables

WHOLE = {("model", "dense", "dense", None): "finished",
         **{("model", m, "2:4", s): "finished" for m in ("magnitude", "wanda") for s in (0, 1)}}


@pytest.fixture
def loads(monkeypatch):
    """How many models were loaded."""
    real, calls = models.load, []

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)
    monkeypatch.setattr(models, "load", counted)
    return calls


# ---------------------------------------------------------------- what the file asks for

def configs(file):
    return sweep.expand(sweep.load(file), file, "runs")


def test_a_file_becomes_configurations(place, tmp_path):  # noqa: F811
    """An unquoted 2:4 is a pattern and not YAML's number 124; what a model gives goes before what stands on top."""
    file = write(tmp_path, place, patterns=["0.5", "2:4"], models=[
        "demo", {"model": "demo", "nsamples": "8", "methods": ["sparsegpt"], "sparsegpt.damping": "0.1", "seeds": "7",
                 "true_sequential": "true", "layer_errors": "false", "dense": "false"}])
    found = configs(file)
    first = [c for c in found if c.nsamples == 4]
    assert {(c.method, c.pattern, c.seed) for c in first} == {("dense", "dense", 0), *(
        (m, p, s) for m in ("magnitude", "wanda") for p in ("0.5", "2:4") for s in (0, 1))}
    assert len(first) == 9, "the dense model is measured once, whatever the seeds"
    other = [c for c in found if c.nsamples == 8]
    assert [(c.method, c.pattern, c.seed) for c in other] == [("sparsegpt", "0.5", 7), ("sparsegpt", "2:4", 7)]
    assert all(c.true_sequential and not c.layer_errors and c.solver["sparsegpt"].damping == 0.1 for c in other)
    assert not any(c.progress for c in found)


def test_a_flags_former_name_is_the_same_flag(place, tmp_path):  # noqa: F811
    old, new = ([c for c in configs(write(tmp_path / name, place, **{name: "block"})) if c.prunes]
                for name in ("recover", "heal"))
    assert old == new and all(c.heals == ["block"] for c in new)


@pytest.mark.parametrize("name", ["demo", "small"])
def test_the_sweeps_that_are_here_can_be_read(name):
    file = Path(sweep.__file__).with_name(f"{name}.yaml")
    found = configs(file)
    assert len(found) == {"demo": 5, "small": 137}[name] and len({c.run_id() for c in found}) == len(found)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
def test_shards_share_everything_out(n):
    whole = list(range(11))
    shares = [sweep.share(whole, i, n) for i in range(1, n + 1)]
    assert sorted(x for share in shares for x in share) == whole
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("text", "words"), [
    ("models: [demo]\nnsample: 3", ["model 1 (demo)", "--nsample", "did you mean --nsamples"]),
    ("models: [demo]\nmethods: [wander]", ["--method wander"]),
    ("models: [demo]\npatterns: []", ["patterns"]),
    ("models: [demo]\nsave: x", ["save", "records"]),
    ("models: [demo]\nmethod: wanda", ["method", "methods: [...]"]),
    ("models: [demo]\nwanda.use_variant: perhaps", ["true or false"]),
    ("models: [demo]\nnsamples: {a: 1}", ["nsamples", "not a mapping"]),
    ("models: [demo]\nsparsegpt.damping: 0.1\nmethods: [wanda]", ["does not use sparsegpt"]),
    ("models: [demo]\ndevice: abacus", ["--device abacus"]),
    ("models: [demo]\nseeds: [1]\nseeds: [2]", ["seeds is given twice"]),
    ("models: [{nsamples: 3}]", ["model 1", "`model:` is missing"]),
    ("models: demo", ["`models:`"]), ("", ["`models:`"]), ("models: [demo", ["no valid YAML"]),
    ("[" * 50_000, ["nested too deeply"]), ("models: [demo, null]", ["model 2", "a name"]),
    ("models: ['']", ["model 1", "a name"]), ("models: [[demo]]", ["model 1", "a name"]),
    ("models: [{model: [demo]}]", ["model 1", "a name"]),
], ids=lambda x: x.replace("\n", "; ")[:40] if isinstance(x, str) else "")
def test_bad_files(tmp_path, capsys, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    refused(capsys, [str(tmp_path / "bad.yaml"), "--results", str(tmp_path / "runs")], words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("more", "words"), [
    (["--shard", "3/2"], ["--shard", "3/2", "1/4"]), (["--shard", "half"], ["--shard", "half"]),
    (["--workers", "-1"], ["--workers"]), (["--worker", "2"], ["--worker", "--workers"])])
def test_bad_flags(place, tmp_path, capsys, more, words):  # noqa: F811
    refused(capsys, [str(write(tmp_path, place)), *more], words)
    refused(capsys, [str(tmp_path / "absent.yaml")], ["absent.yaml"])


def refused(capsys, argv, words):
    code = sweep.main(argv)
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert not [word for word in words if word not in err], err


# ---------------------------------------------------------------- running

def test_a_finished_sweep_loads_nothing(place, tmp_path, loads, capsys):  # noqa: F811
    file, results = write(tmp_path, place), tmp_path / "runs"
    assert go(file, results) == 0
    assert rows(results) == WHOLE and len(loads) == 5
    before = {f: f.read_bytes() for f in results.glob("*.json")}
    capsys.readouterr()
    assert go(file, results, "--list") == go(file, results) == 0
    assert len(loads) == 5 and {f: f.read_bytes() for f in results.glob("*.json")} == before
    out = capsys.readouterr()
    assert "5 finished earlier, 0 to go" in out.err and "to do" not in out.out


def test_two_shards_are_the_whole(place, tmp_path):  # noqa: F811
    file = write(tmp_path, place)
    assert go(file, tmp_path / "one") == go(file, tmp_path / "two", "--shard", "1/2") == 0
    assert 0 < len(rows(tmp_path / "two")) < len(WHOLE)
    assert go(file, tmp_path / "two", "--shard", "2/2") == 0
    names = [sorted(f.name for f in (tmp_path / which).glob("*.json")) for which in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == len(WHOLE)


def test_without_the_index_the_record_is_taken_once_the_model_is_read(place, tmp_path, loads, monkeypatch):  # noqa: F811
    file, results = write(tmp_path, place, methods=["wanda"], seeds=["0"], dense="false"), tmp_path / "runs"
    go(file, results)
    for entry in (results / index.FOLDER).iterdir():
        entry.unlink()
    monkeypatch.setattr(run, "work", lambda *args: pytest.fail("computed again"))
    assert go(file, results) == 0 and len(loads) == 2
    assert go(file, results) == 0 and len(loads) == 2, "and is known from then on"


@pytest.mark.parametrize("what", ["weights", "calibration", "evaluation", "setting", "package", "library"])
def test_nothing_stale_is_taken(place, tmp_path, monkeypatch, what):  # noqa: F811
    here = tiny.copy(place, tmp_path / "place")
    options = {"methods": ["wanda"], "seeds": ["0"], "dense": "false"}
    file, results = write(tmp_path, here, **options), tmp_path / "runs"
    assert go(file, results) == 0
    [cfg] = configs(file)
    cfg = sweep.expand(sweep.load(file), file, results)[0]
    assert index.finished(cfg)
    if what == "weights":
        tiny.change_weights(here / "model", lambda tensors: tensors["model.norm.weight"].mul_(2))
    elif what in ("calibration", "evaluation"):
        tiny.save_text(here / f"{what}.txt", 9)
    elif what == "setting":
        cfg = sweep.expand(sweep.load(write(tmp_path, here, **options | {"nsamples": "5"})), file, results)[0]
    elif what == "package":
        monkeypatch.setattr(index, "package", lambda: "another version")
    else:
        monkeypatch.setattr(index.environment, "version", lambda name: "0.0")
    assert index.finished(cfg) is None
    before = len(rows_by_file(results))
    assert go(file, results) == 0
    assert len(rows_by_file(results)) - before == (what not in ("package", "library")), "those leave the numbers"


def rows_by_file(results):
    return [f for f in results.glob("*.json") if report.read(f)["status"] == "finished"]


def test_a_lost_or_damaged_record_is_made_again(place, tmp_path):  # noqa: F811
    file, results = write(tmp_path, place, methods=["wanda"], seeds=["0"], dense="false"), tmp_path / "runs"
    go(file, results)
    [record] = results.glob("*.json")
    for spoil in (record.unlink, lambda: record.write_text(record.read_text()[:100])):
        spoil()
        assert go(file, results) == 0
        assert report.read(record)["status"] == "finished"


def test_files_that_changed_under_a_run_are_not_remembered(place, tmp_path):  # noqa: F811
    here = tiny.copy(place, tmp_path / "place")
    file = write(tmp_path, here, methods=["wanda"], seeds=["0"], dense="false")
    cfg = sweep.expand(sweep.load(file), file, tmp_path / "runs")[0]
    key = index.key_of(cfg)
    tiny.save_text(here / "calibration.txt", 9)
    index.remember(cfg, "some-run", key)
    assert not (tmp_path / "runs").exists()


def test_a_failing_run_is_a_row_and_the_rest_goes_on(place, tmp_path, capsys):  # noqa: F811
    here = tiny.copy(place, tmp_path / "place")
    file = write(tmp_path, here, patterns=["2:5", "2:4"], seeds=["0"], methods=["wanda"])  # widths are no multiple of 5
    results = tmp_path / "runs"
    assert go(file, results) == 1
    assert sorted(rows(results).values()) == ["failed", "finished", "finished"]
    out = capsys.readouterr()
    assert "failed: --pattern 2:5" in out.out and "FAILED (--pattern 2:5" in out.err
    [failed] = [r for f in results.glob("*-failed.json") if (r := report.read(f))]
    assert failed["error"].startswith("--pattern 2:5") and failed["settings"]["pattern"] == "2:5"
    assert failed["run_id"] in tables.table([failed], "csv") and "--pattern 2:5" in tables.table([failed])


def test_a_later_success_removes_the_failure(place, tmp_path):  # noqa: F811
    here = tiny.copy(place, tmp_path / "place")
    (here / "calibration.txt").rename(here / "away")
    file, results = write(tmp_path, here, methods=["wanda"], seeds=["0"], dense="false"), tmp_path / "runs"
    assert go(file, results) == 1 and set(rows(results).values()) == {"failed"}
    (here / "away").rename(here / "calibration.txt")
    assert go(file, results) == 0 and set(rows(results).values()) == {"finished"}


def test_a_bug_of_ours_does_not_stop_the_rest(place, tmp_path, monkeypatch):  # noqa: F811
    def broken(subject, *args):
        if subject.cfg.method == "magnitude":
            raise RuntimeError("the axle\nbroke")
        return real(subject, *args)
    real = run.work
    monkeypatch.setattr(run, "work", broken)
    assert go(write(tmp_path, place, seeds=["0"]), tmp_path / "runs") == 1
    errors = [report.read(f)["error"] for f in (tmp_path / "runs").glob("*-failed.json")]
    assert errors == ["RuntimeError: the axle broke"] and len(rows_by_file(tmp_path / "runs")) == 2
