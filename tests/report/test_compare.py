"""`oneshot.compare`: whatever holds a finished run, in one table and one page; what does not, in one line."""

import json

import pytest
import reporting

from oneshot import report
from oneshot.report import compare, page
from oneshot.runtime.files import write_json, write_text


@pytest.fixture(autouse=True)
def plain_pages(monkeypatch):
    """Pages without pictures, which take long to draw."""
    monkeypatch.setattr(page, "_pictures", lambda records: [])


@pytest.fixture
def go(tmp_path, capsys, monkeypatch):
    """`go(*arguments)`: (exit code, stdout, stderr), in a folder of its own; page.html is the page."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = compare.main([*map(str, argv), "--page", "page.html"])
        return code, *capsys.readouterr()
    return call


def test_records_folders_and_checkpoints(go, tmp_path):
    folder, saved = tmp_path / "runs", tmp_path / "saved"
    write_json({"schema": 1, "record": reporting.record("ria", ppl=13.5), "tensors": {}}, saved / "oneshot.json")
    for r in (reporting.record("wanda", ppl=12.5), reporting.record("dense", ppl=9.5)):
        report.write(r, folder / f"{r['run_id']}.json")
    single = report.write(reporting.record("alps", ppl=11.5), tmp_path / "single.json")
    code, out, err = go(folder, saved, tmp_path / "single.json", folder, saved / "oneshot.json")
    assert code == 0 and err == "report: page.html\n"
    lines = out.splitlines()
    assert len(lines) == 2 + 4, "each run once"
    for words in (("dense", "9.500"), ("wanda", "12.50"), ("alps", "11.50"), ("ria", "13.50")):
        assert any(all(word in line for word in words) for line in lines[2:]), words
    text = (tmp_path / "page.html").read_text()
    assert single["run_id"] in text and text.endswith("</html>\n") and "4 pruning runs compared" in text


def test_a_checkpoint_that_a_run_saved(go, tmp_path, capsys):
    import tiny  # here, as the other tests need no model

    place = tiny.make(tmp_path / "place")
    assert tiny.main(*tiny.flags(place, "--no-dense", save=tmp_path / "saved")) == 0
    capsys.readouterr()
    code, out, _ = go("saved")
    assert code == 0 and len(out.splitlines()) == 3 and "wanda" in out


def test_records_of_version_0_1_are_read_in_todays_words(go, tmp_path):
    old = reporting.of_version_0_1()
    report.write(old, tmp_path / "old.json")
    write_json({"record": old | {"run_id": "other"}}, tmp_path / "saved" / "oneshot.json")
    code, out, _ = go("old.json", "saved")
    assert code == 0 and out.count("alps, owl, block, distil") == 2


def test_formats(go, tmp_path):
    report.write(reporting.record("wanda", ppl=12.25), tmp_path / "a.json")
    assert "| wanda" in go("a.json", "--format", "markdown")[1]
    assert go("a.json", "--format", "csv")[1].splitlines()[1].split(",")[2] == "wanda"
    go("a.json", "--title", "My <title>")
    assert "My &lt;title&gt;" in (tmp_path / "page.html").read_text()


def test_a_failed_run_is_a_row(go, tmp_path):
    failed = {k: v for k, v in reporting.record("wanda").items() if k in ("schema", "run_id", "settings")}
    report.write(failed | {"status": "failed", "error": "out of tape", "metrics": {}, "model": {"name": "demo"}},
                 tmp_path / "runs" / "a-failed.json")
    report.write(reporting.record("dense", ppl=9.5), tmp_path / "runs" / "b.json")
    code, out, _ = go("runs")
    assert code == 0 and "failed: out of tape" in out and "finished" in out
    assert "demo #" not in out, "a failed run has no fingerprint, which makes it no second model"


@pytest.mark.parametrize(("make", "words"), [
    (lambda d: None, ["x: no such file or folder"]),
    (lambda d: (d / "x").mkdir(), ["x: holds no run record"]),
    (lambda d: (d / "x").write_text("{"), ["x is not a run record", "not JSON"]),
    (lambda d: (d / "x").write_bytes(b"\xff\xfe\x00"), ["x is not a run record"]),
    (lambda d: (d / "x").write_text("[1]"), ["x is not a run record", "schema"]),
    (lambda d: (d / "x").write_text('{"schema": 1, "run_id": "a", "metrics": 3}'), ["x", "`metrics`"]),
    (lambda d: other_schema(d / "x" / "a.json"), ["a.json has schema 99 (by oneshot 7.0)", "reads 1"]),
    (lambda d: other_schema(d / "x" / "oneshot.json", manifest=True), ["oneshot.json has schema 99", "reads 1"]),
    (lambda d: write_text("{}", d / "x" / "oneshot.json"), ["x/oneshot.json: damaged"]),
    (lambda d: write_text("[", d / "x" / "oneshot.json"), ["x/oneshot.json: damaged"]),
    (lambda d: (d / "x" / ".oneshot").mkdir(parents=True), ["x: a run was interrupted", "continues"]),
    (lambda d: write_text("{}", d / "x" / "config.json"), ["x: a model that oneshot did not write"]),
], ids=range(12))
def test_what_is_no_run(go, tmp_path, make, words):
    make(tmp_path)
    report.write(reporting.record(), tmp_path / "good.json")
    code, out, err = go("good.json", "x")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert not [word for word in words if word not in err], err
    assert not (tmp_path / "page.html").exists()


def other_schema(file, manifest=False):
    """A record of another version, or a checkpoint's manifest with one."""
    record = reporting.record() | {"schema": 99, "environment": {"oneshot": "7.0"}}
    write_text(json.dumps({"schema": 1, "record": record, "tensors": {}} if manifest else record), file)


@pytest.mark.parametrize(("argv", "word"), [([], "runs"), (["good.json", "--form", "csv"], "--form"),
                                            (["good.json", "--page", "."], "--page")])
def test_bad_flags(tmp_path, capsys, monkeypatch, argv, word):
    monkeypatch.chdir(tmp_path)
    report.write(reporting.record(), tmp_path / "good.json")
    assert compare.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err
