"""What is contacted and executed: nothing, where all input is local and nobody has said that code is to be trusted."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from tiny import place  # noqa: F401

from oneshot import models
from oneshot.measure import task_list, tasks
from oneshot.models.loading import DEMO
from oneshot.pipeline import api, lesson
from oneshot.settings import flags, parse
from oneshot.settings.known import known

YAML = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""

SPY = '''"""Run commands of oneshot, given as JSON, and print every attempt to reach another machine."""
import gc, json, socket, sys, urllib.request

gc.disable()  # it would go over all of torch again and again

def told(name):
    real = getattr(socket.socket, name)
    def call(self, address, *more):
        if self.family != socket.AF_UNIX:
            print("CONTACT", name, address, flush=True)
            raise OSError("no network here")
        return real(self, address, *more)
    setattr(socket.socket, name, call)

for name in ("connect", "connect_ex", "sendto"):
    told(name)
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    def call(*args, name=name, **kwargs):
        print("CONTACT", name, args, flush=True)
        raise OSError("no network here")
    setattr(socket, name, call)

from oneshot.__main__ import main
from oneshot.report import page
page._pictures = lambda records: []
for argv in json.loads(sys.argv[1]):
    code = main(argv)
    print("DONE", argv[0], code, flush=True)
    assert code == 0
'''


def write_task(folder, rows):
    """A task `mine` on these rows; the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(YAML.format(file=folder / "rows.jsonl"))
    return folder


def test_nothing_is_contacted_when_all_input_is_local(place, tmp_path):  # noqa: F811
    """HF_HUB_OFFLINE is not set; datasets would count even a local file at s3.amazonaws.com, three tries."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    import datasets

    letters = (place / "calibration.txt").read_text()
    for name, write in (("t.parquet", "to_parquet"), ("t.csv", "to_csv"), ("t.jsonl", "to_json")):
        getattr(datasets.Dataset.from_dict({"text": [letters] * 2}), write)(str(tmp_path / name))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog", "expected": "ran"}\n')
    tasks_at = write_task(tmp_path / "yaml", [{"query": "the", "choices": ["ab", "cd"], "gold": 1}] * 3)
    run = ["prune", *tiny.flags(place, method="magnitude", nsamples=2, eval_windows=2, results=tmp_path / "runs",
                                calibration=tmp_path / "t.parquet", save=tmp_path / "saved", tasks="mine",
                                task_path=tasks_at, prompts=tmp_path / "p.jsonl",
                                evaluate=f"{tmp_path / 't.csv'},b={tmp_path / 't.jsonl'},{place / 'evaluation.txt'}")]
    demo = ["prune", *tiny.flags(place, "--no-dense", model="demo", calibration="builtin", evaluate="builtin",
                                 nsamples=2, eval_windows=1, results=tmp_path / "runs")]
    commands = [run, demo, ["verify", str(tmp_path / "saved"), "--twin", str(tmp_path / "saved")],
                ["generate", str(tmp_path / "saved"), "--max-new-tokens", "3", "--prompt", "a dog"],
                ["compare", str(tmp_path / "runs"), "--page", str(tmp_path / "page.html")]]
    env = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "AUTO"}
    done = subprocess.run([sys.executable, "-c", SPY, json.dumps(commands)], capture_output=True, text=True, env=env,
                          timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("DONE ") == len(commands)
    assert "CONTACT" not in done.stdout, [line for line in done.stdout.splitlines() if "CONTACT" in line]


def test_the_counter_is_as_it_was_afterwards(place, tmp_path):  # noqa: F811
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    task_list.digest(["mine"], str(write_task(tmp_path / "yaml", [{"query": "a", "choices": ["b", "c"], "gold": 0}])))
    assert before == datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


# ------------------------------------------------------------------------------------------------ what runs code

def test_the_flags_that_trust():
    """They are off, they change no number (no identity either), and only a command line may turn them on."""
    flags = {name: flag for name, flag in known().items() if flag.metadata["trusts"]}
    assert set(flags) == {"trust_remote_code", "trust_task_code"}
    assert all(flag.is_switch and flag.default is False and not flag.metadata["python"] for flag in flags.values())
    base = ["--method", "wanda", "--pattern", "2:4", "--tasks", "x", "--task-path", "y"]
    with_it, without = (parse([*base, *more])[0] for more in (["--trust-task-code"], []))
    assert with_it.trust_task_code and with_it.settings() == without.settings()
    assert with_it.run_id("a") == without.run_id("a")


MARK = "open({mark!r}, 'w').close()\n"


@pytest.mark.parametrize("how", ["function", "jinja", "include", "python task", "group"])
def test_nothing_of_a_task_folder_runs_before_it_is_trusted(place, tmp_path, capsys, how):  # noqa: F811
    """Each way in which a YAML makes lm-eval run code leaves a mark with the flag, and none without."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    folder = write_task(tmp_path / "yaml", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    mark, utils = tmp_path / "MARK", folder / "marking.py"
    utils.write_text(MARK.format(mark=str(mark)) + "\n\ndef f(doc):\n    return 0\n\n\nclass T:\n    pass\n")
    yaml = (folder / "mine.yaml").read_text()
    touch = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    if how == "function":
        yaml = yaml.replace('"{{gold}}"', "!function marking.f")
    elif how == "jinja":
        yaml = yaml.replace("{{query}}", touch)
    elif how == "include":
        (folder / "base.inc").write_text("doc_to_target: !function marking.f\n")
        yaml = "include: base.inc\n" + yaml.replace('doc_to_target: "{{gold}}"\n', "")
    elif how == "python task":
        yaml += "class: !function marking.T\n"
    else:
        yaml = yaml.replace('"{{gold}}"', "!function marking.f").replace("task: mine", "task: part")
        (folder / "group.yaml").write_text("group: mine\ntask: [part]\naggregate_metric_list: [{metric: acc}]\n")
    (folder / "mine.yaml").write_text(yaml)
    argv = tiny.flags(place, "--no-dense", evaluate="none", tasks="mine", task_path=folder, results=tmp_path / "runs")
    assert argv.pop(argv.index("--trust-task-code"))
    assert tiny.main(*argv) == 2 and not mark.exists()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --task-path {folder}: ") and "--trust-task-code" in line
    assert tiny.main(*argv, "--trust-task-code") in (0, 2) and mark.exists(), "else the test shows nothing"


def test_tasks_do_not_change_the_tokenizer_that_is_saved(place, tmp_path):  # noqa: F811
    """lm-eval gives a tokenizer without a pad token one, and it is the run's own that `--save` writes."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    folder = write_task(tmp_path / "yaml", [{"query": "a", "choices": ["b", "c"], "gold": 0}])
    for name, more in (("with", {"tasks": "mine", "task_path": folder}), ("without", {})):
        assert tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", save=tmp_path / name,
                                     results=tmp_path / "runs", **more)) == 0
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes(), file


@pytest.mark.parametrize(("row", "words"), [
    ("[" * 100_000, "line 1: not JSON that can be read"), (r'{"query": "\ud83d", "choices": ["a"], "gold": 0}',
                                                          "line 1: holds half of a surrogate pair"),
    ('{"query": "<|new|>", "choices": ["b", "c"], "gold": 0}', r"document 1: token 32 ('<|new|>') is beyond the 32"),
    ('{"query": "a", "choices": ["b", "<|new|>"], "gold": 0}', r"document 1: token 32 ('<|new|>') is beyond the 32")])
def test_documents_of_any_content(place, tmp_path, capsys, row, words):  # noqa: F811
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    folder = write_task(tmp_path / "yaml", [])
    (folder / "rows.jsonl").write_text(row + "\n")
    model, tokenizer = tiny.copy(place / "model", tmp_path / "model"), tiny.tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(model)
    argv = tiny.flags(place, "--no-dense", model=model, evaluate="none", tasks="mine", task_path=folder)
    assert tiny.main(*argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --tasks mine: ") and words in line and len(line) < 500, line


@pytest.mark.parametrize("files", [{"g": "g"}, {"g": "h", "h": "g"}])
def test_a_group_that_holds_itself(place, tmp_path, capsys, files):  # noqa: F811
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    for name, part in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"group: {name}\ntask: [{part}]\n")
    assert tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", tasks="g", task_path=tmp_path)) == 2
    assert "error: --tasks g: the group g holds itself" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.jsonl", "other.yaml"])
def test_pipes_among_the_tasks(place, tmp_path, capsys, name):  # noqa: F811
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    folder = write_task(tmp_path / "yaml", [])
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert tiny.main(*tiny.flags(place, evaluate="none", tasks="mine", task_path=folder)) == 2
    assert "pipe or a device" in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_fails_on_a_task(place, tmp_path, monkeypatch):  # noqa: F811
    """Whatever its own code raises, and a token that only lm-eval's own tokenising would have met."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    folder = str(write_task(tmp_path / "yaml", [{"query": "<|new|>", "choices": ["b", "c"], "gold": 0}]))
    model, tokenizer = models.load(place / "model")
    tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(ValueError, match=r"^--tasks mine: token 32 .* is beyond the 32 rows"):
        tasks.evaluate(model, tokenizer, ["mine"], task_path=folder)
    assert not model.get_input_embeddings()._forward_pre_hooks

    def failing(*args, **kwargs):
        raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(type(model), "forward", failing)
    with pytest.raises(ValueError, match=r"^--tasks mine: cannot be measured: RuntimeError: shapes do not fit"):
        tasks.evaluate(model, tiny.tokenizer(), ["mine"], task_path=folder)


def with_own_code(model, folder, mark):
    """A copy of a folder whose model's code lies beside its weights, and makes the file `mark` when it is run.

    transformers keeps code by the name of its folder, so each test needs its own.
    """
    tiny.copy(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {
        "model_type": "mine_llama", "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_mine.MineConfig",
                     "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}}))
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine_llama'\n")
    (folder / "modeling_mine.py").write_text(
        f"from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n\n"
        f"open({str(mark)!r}, 'w').close()\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n")
    return folder


def test_other_processes_that_heal_run_the_models_own_code_when_trusted(place, tmp_path, monkeypatch):  # noqa: F811
    """From where the first has written the pruned model for them."""
    folder = with_own_code(place / "model", tmp_path / "shared", tmp_path / "MARK")
    model, tokenizer = models.load(str(folder), trust_remote_code=True)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "work" / "start")
    made = []

    def make_lesson(subject, *_):
        made.append(type(subject.model).__name__)
        raise KeyboardInterrupt
    monkeypatch.setattr(lesson, "make_lesson", make_lesson)
    for trusted in (False, True):
        cfg = flags.build({"model": str(folder), "method": "wanda", "pattern": "2:4", "heal": "full",
                           "heal_data": str(place / "calibration.txt"), "device": "cpu", "trust_remote_code": trusted})
        with pytest.raises(KeyboardInterrupt if trusted else ValueError):
            lesson.take_part(cfg, str(tmp_path / "work"), "full")
    assert made == ["MineForCausalLM"]


def test_a_fit_that_continues_runs_the_models_own_code_when_trusted(place, tmp_path, monkeypatch):  # noqa: F811
    folder = with_own_code(place / "model", tmp_path / "fitted", tmp_path / "MARK")
    model, tokenizer = models.load(str(folder), trust_remote_code=True)

    def fitted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(api.fit_command, "fitted", fitted)
    for trusted, raised in ((False, KeyboardInterrupt), (True, KeyboardInterrupt), (False, ValueError)):
        with pytest.raises(raised):
            api.fit(model, tokenizer, target="parameters=0.9", save=tmp_path / "fit", trust_remote_code=trusted)


def test_the_models_own_code_is_run_by_generate_and_verify_when_trusted(place, tmp_path, capsys):  # noqa: F811
    from oneshot.checkpoint import verify
    from oneshot.pipeline import generate

    folder = with_own_code(place / "model", tmp_path / "pruned", tmp_path / "MARK")
    saved, mark = tmp_path / "saved", tmp_path / "MARK"
    run = tiny.flags(place, "--no-dense", model=folder, save=saved, results=tmp_path / "runs")
    generate_it = [str(saved), "--max-new-tokens", "2", "--prompt", "a dog"]
    err = capsys.readouterr().err if tiny.main(*run) == 2 else ""
    assert "--model" in err and "--trust-remote-code" in err and not mark.exists()
    assert tiny.main(*run, "--trust-remote-code") == 0
    for main, argv in ((verify.main, [str(saved), "--quiet"]), (generate.main, generate_it)):
        mark.unlink()
        assert main(argv) == 2 and not mark.exists(), argv
        assert "add --trust-remote-code" in capsys.readouterr().err
        assert main([*argv, "--trust-remote-code"]) == 0
        mark.touch()


def test_the_demo_needs_no_trust():
    assert not list(DEMO.glob("*.py")) and "auto_map" not in (DEMO / "config.json").read_text()
