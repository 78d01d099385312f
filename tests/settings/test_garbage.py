"""Every flag with values that are none: one line that names the flag, or a run that works; never a traceback."""

import pytest
import tiny
import torch
from tiny import place, plain_pages  # noqa: F401

import oneshot
from oneshot import heal, models
from oneshot.checkpoint import verify
from oneshot.pipeline import generate
from oneshot.prune import solvers
from oneshot.report import compare
from oneshot.settings.known import known, python_names

GARBAGE = ["", "abc", "-1", "0", "1e300", "nan", "[]", "\ud83d", "9" * 30]
IN_PYTHON = [None, "", "abc", "\ud83d", "a\0b", -1, 0, 10**30, 1e300, float("nan"), True, [], {}, ["a"], b"x", object()]
pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.fixture(scope="module")
def record(place, tmp_path_factory):  # noqa: F811
    """The record of a run with --sensitivity linear."""
    results = tmp_path_factory.mktemp("sensitivity")
    assert tiny.main(*tiny.flags(place, "--no-dense", method="magnitude", sensitivity="linear", results=results)) == 0
    [file] = results.glob("*.json")
    return file


def around(flag, place, record):  # noqa: F811
    """Flags of a small run in which this one has something to do."""
    given, part = {"method": "magnitude", "pattern": "0.5", "nsamples": 2, "eval_windows": 2}, flag.name.split(".")[0]
    if flag.chosen_by == "method":
        refiner = part in solvers.names()["refiner"]
        given["method"] = f"wanda+{part}" if refiner else part
    elif flag.chosen_by == "allocate":
        given |= {"method": "wanda", "allocate": part, "pattern": "2:4" if part == "mix" else "0.5"}
        given |= {"sensitivity.record": record} if part == "sensitivity" else {}
    elif flag.chosen_by == "quantiser":
        given |= {"quantise": "int4", "quantiser": part}
    elif flag.chosen_by == "heal":
        given |= {"heal": part} | ({f"{part}.steps": 2} if f"{part}.steps" in known() else {})
        given |= {"heal_data": place / "calibration.txt", "heal_tokens": "200", "heal_seqlen": 16,
                  "heal_batch": 32} if heal.trains_on_text(part) else {}
    more = {"effort": {"method": "best"}, "tasks": {"task_path": place / "tasks"}, "task_limit": {"tasks": "none"},
            "quantiser": {"quantise": "int4"},
            "split": {"calibration": "owner/name"}, "revision": {"calibration": "owner/name"},
            "data_config": {"calibration": "owner/name"}}
    return given | more.get(flag.name, {})


def told(argv, err, *names):
    """Whether a refusal is one line that names the flag."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    last = err.splitlines()[-1]
    assert len(lines) == 1 and last == lines[0] and len(last) < 500, (argv, err)
    assert any(name in last for name in names), (argv, last)


@pytest.mark.parametrize("name", [name for name, flag in known().items() if not flag.is_switch])
def test_flag(name, place, record, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (place / "tasks").mkdir(exist_ok=True)
    (place / "tasks" / "mine.yaml").write_text("task: mine\n")
    flag = known()[name]
    for value in GARBAGE:
        if name.endswith(".steps") and value == "9" * 30:
            continue  # many steps are no mistake
        given = around(flag, place, record) | {"results": tmp_path / "runs", name: value}
        argv = tiny.flags(place, "--no-dense", **{key: x for key, x in given.items() if key != name})
        argv.append(f"{flag.option}={value}")
        code = tiny.main(*argv)
        _, err = capfd.readouterr()
        assert code in (0, 2), (argv, err)
        if code == 2:
            told(argv, err, *flag.options, *(["--calibration"] if given.get("calibration") == "owner/name" else []))


@pytest.mark.parametrize("name", [name for name, flag in known().items() if flag.is_switch])
def test_switch(name, place, capfd):  # noqa: F811
    assert tiny.main(*tiny.flags(place), f"{known()[name].option}=abc") == 2
    told(name, capfd.readouterr().err, known()[name].option)


@pytest.mark.parametrize("name", sorted({*python_names(), "pattern", "method", "calibration", "sparsegpt.damping",
                                         "sparsegpt.block_size", "owl.spread", "block.steps", "block.unit"}))
def test_setting_in_python(name, place, capfd):  # noqa: F811
    """A ValueError that names the setting, or a record."""
    flag = known()[name]
    given = {"method": "magnitude", "pattern": "0.5", "nsamples": 2, "seqlen": 8, "progress": False,
             "calibration": str(place / "calibration.txt")} | ({"method": "best"} if name == "effort" else {})
    given |= {"heal": "block"} if name.startswith("block.") else {"method": "sparsegpt"} if "sparse" in name else {}
    given |= {"allocate": "owl"} if name.startswith("owl.") else {}
    parts = {"block.steps": 1} if given.get("heal") == "block" else {}
    for value in IN_PYTHON:
        if name == "block.steps" and value == 10**30:
            continue
        model, tokenizer = models.load(place / "model")
        settings = {**given} if "." in name else given | {name: value}
        try:
            oneshot.prune(model, tokenizer, parts=parts | ({name: value} if "." in name else {}), **settings)
        except ValueError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 500, said
            assert any(option in said for option in flag.options), (value, said)


def test_token_ids_in_python(place):  # noqa: F811
    model, _ = models.load(place / "model")
    for ids in (torch.zeros(2), torch.zeros(3, dtype=torch.long), torch.full((2, 8), 99), torch.full((2, 8), -1),
                torch.zeros((2, 999), dtype=torch.long), torch.zeros((0, 8), dtype=torch.long),
                torch.zeros((2, 0), dtype=torch.long), torch.zeros((2, 8), dtype=torch.bool), torch.zeros((2, 1))):
        with pytest.raises(ValueError, match=r"^calibration: ") as error:
            oneshot.prune(model, calibration=ids, progress=False)
        assert "\n" not in str(error.value)


OTHERS = {"--prompt": generate, "--max-new-tokens": generate, "--temperature": generate, "--seed": generate,
          "--device": generate, "--dtype": generate, "--compare": generate, "model": generate, "--static": generate,
          "--twin": verify, "folder": verify, "--page": compare, "--format": compare, "--title": compare,
          "runs": compare}


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands(name, place, record, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    first = {generate: [place / "model", "--max-new-tokens", "2"], compare: [record], verify: [place / "model"]}
    for value in GARBAGE:
        own, *more = map(str, first[OTHERS[name]])
        argv = [own, *more, f"{name}={value}"] if name.startswith("--") else [value, *more]
        code = OTHERS[name].main(argv)
        _, err = capfd.readouterr()
        assert code in (0, 2), (argv, err)
        if code == 2:
            told(argv, err, name, ascii(value)[1:-1] or ".", str(place / "model"))
