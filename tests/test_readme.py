"""The README's commands run, at small size, on the built-in model and text."""

import re
import shlex
from pathlib import Path

import pytest
from tiny import plain_pages  # noqa: F401

from oneshot.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text()
HERE = {"meta-llama/Llama-3.1-8B": "demo", "c4": "builtin", "wikitext2": "builtin:prose", "cuda": "cpu",
        "0.7*c4,0.3*mine.txt": "builtin", "wikitext2/ppl<=1.1x": "builtin:prose/ppl<=3x"}
FEW = ["--nsamples", "2", "--seqlen", "32", "--eval-windows", "2", "--no-progress"]
SMALL = {"latency": ["--rounds", "1", "--no-progress"], "plan": FEW, "prune": FEW, "verify": [],
         "shrink": [*FEW, "--tries", "2"],
         "heal": [*FEW, "--tokens", "1k", "--heal-seqlen", "64", "--batch", "256"],
         "fit": [*FEW, "--target", "bytes=0.7", "--step", "100%", "--tokens", "1k", "--heal-seqlen", "64",
                 "--heal-batch", "256"],
         "generate": ["--max-new-tokens", "4"]}


def commands():
    """Every `oneshot ...` line of the README's code blocks, as words."""
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line.startswith("oneshot ")]


@pytest.mark.usefixtures("plain_pages")
def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = commands()
    assert {verb for _, verb, *_ in ran} == set(SMALL)
    for _, verb, *words in ran:
        argv = [verb, *(HERE.get(w, w) for w in words), *SMALL[verb]]
        assert main(argv) == 0, (argv, capsys.readouterr().err)
    out = capsys.readouterr().out
    assert out.count("all proved") == 6 and "(packed)" in out


def test_python_lines():
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    space = {}
    exec(code.replace('pattern="2:4"', 'pattern="2:4", nsamples=4, progress=False'), space)
    assert space["record"]["sparsity"] == pytest.approx(0.5, abs=1e-6)


def test_no_arguments_is_three_methods_and_two_patterns():
    from oneshot.settings import flags

    asked = [(c.model, c.method, c.pattern) for c in flags.parse([])]
    assert set(asked) == {("demo", "dense", "dense"), *(("demo", m, p) for p in ("0.5", "2:4")
                                                       for m in ("magnitude", "wanda", "sparsegpt"))}


def test_its_map_names_what_is_there():
    root = Path(__file__).parent.parent
    for block in re.findall(r"## Map\n\n```\n(.*?)```", README, re.S):
        for path in re.findall(r"^(\S+/\S*)", block, re.M):
            assert (root / path).exists(), path
