"""Commands: exit codes of all of them, errors in one line, and what the command `oneshot` makes of its verbs."""

import gc
import sys
import types

import pytest
import torch

import oneshot
from oneshot import __main__ as dispatcher
from oneshot.runtime import command, inputs
from oneshot.runtime.command import Parser, exit_code


def raising(error):
    def work():
        raise error
    return work


@pytest.mark.parametrize("found, code", [(None, 0), (0, 0), (1, 1)])
def test_what_is_done_ends_with_its_own_code(found, code, capsys):
    assert exit_code(lambda: found) == code and capsys.readouterr().err == ""


@pytest.mark.parametrize("error, line", [
    (ValueError("--seqlen 1: must be\n  at least 2"), "error: --seqlen 1: must be at least 2\n"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
    (FileNotFoundError("a.txt"), "error: a.txt\n"),
    (ValueError(), "error: ValueError\n"),
    (torch.OutOfMemoryError("CUDA is full.\nTried"), "error: out of memory (CUDA is full. Tried); buy more\n"),
], ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "")
def test_what_the_user_can_mend_is_one_line_and_2(error, line, capsys):
    assert exit_code(raising(error), memory="buy more") == 2
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("more, said", [("", "interrupted"), ("it resumes", "interrupted; it resumes")])
def test_an_interrupt_is_130(more, said, capsys):
    assert exit_code(raising(KeyboardInterrupt()), interrupted=lambda: more) == 130
    assert capsys.readouterr() == ("", f"error: {said}\n")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), TypeError("int"), KeyError("x"),
                                   AssertionError("no")], ids=lambda e: type(e).__name__)
def test_faults_of_the_program_keep_their_traceback(error):
    """Nothing a user could mend: no line may hide where it came from."""
    with pytest.raises(type(error)) as found:
        exit_code(raising(error))
    assert found.value is error


def test_parser_says_what_is_wrong_in_one_line():
    parser = Parser(prog="x", allow_abbrev=False)
    parser.add_argument("--method", choices=("wanda", "magnitude"))
    parser.add_argument("--nsamples", type=int)
    for argv, words in ((["--methd", "wanda"], r"^--methd: no such flag, did you mean --method\? \(--help"),
                        (["--zzzzzz=3"], r"^--zzzzzz=3: no such flag \(--help lists the flags\)$"),
                        (["--nsamples", "many"], "^--nsamples: invalid int value: 'many'"),
                        (["--method", "other"], "^--method: invalid choice: 'other'")):
        with pytest.raises(ValueError, match=words) as found:
            parser.parse_args(argv)
        assert "\n" not in str(found.value)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0


# ---------------------------------------------------------------- the command oneshot

@pytest.fixture
def called(monkeypatch):
    """[(module, argv)] of the mains that were called; each of them ends with 7."""
    found = []

    class Main:
        def __init__(self, module):
            self.module = module

        def main(self, argv):
            found.append((self.module, argv))
            return 7
    monkeypatch.setattr(dispatcher, "importlib", types.SimpleNamespace(import_module=Main))
    return found


@pytest.mark.parametrize("verb", dispatcher.COMMANDS)
def test_a_verb_gets_the_rest_of_the_line_and_gives_the_exit_code(verb, called):
    assert dispatcher.main([verb, "--help", verb]) == 7
    assert called == [(dispatcher.COMMANDS[verb][0], ["--help", verb])]


@pytest.mark.parametrize("argv", [[], ["--method", "wanda"], ["--seqlen=3", "verify"]])
def test_without_a_verb_it_is_prune(argv, called):
    assert dispatcher.main(argv) == 7 and called == [("oneshot.pipeline.run", argv)]


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_lists_every_verb(flag, capsys, called):
    assert dispatcher.main([flag]) == 0 and not called
    out, err = capsys.readouterr()
    assert err == "" and all(f"oneshot {verb}" in out and text in out
                             for verb, (_, text) in dispatcher.COMMANDS.items())


def test_version(capsys, called):
    assert dispatcher.main(["--version"]) == 0 and not called
    assert capsys.readouterr() == (f"oneshot {oneshot.__version__}\n", "")


@pytest.mark.parametrize("verb", ["prun", "wanda", "Verify"])
def test_an_unknown_verb_is_one_line_and_2(verb, capsys, called):
    assert dispatcher.main([verb, "--method", "wanda"]) == 2 and not called
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {verb}: no such command; there are prune, shrink, fit, heal, ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("verb", dispatcher.COMMANDS)
def test_every_verbs_module_has_a_main_whose_help_names_it(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        dispatcher.main([verb, "--help"])
    assert stop.value.code == 0 and f"usage: oneshot {verb}" in capsys.readouterr().out


def looked_at(thing):
    """Whether the collector goes over an object."""
    return any(found is thing for found in gc.get_objects())


def test_the_collector_does_not_go_over_what_a_verb_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_verb.py").write_text("import gc\nseen = gc.isenabled()\nkept = [[]]\n")
    (tmp_path / "a_broken_verb.py").write_text("import nothing_of_this_name\n")
    verb = dispatcher.imported("a_verb")
    assert not verb.seen and gc.isenabled() and not looked_at(verb.kept)
    later = [[]]
    assert dispatcher.imported("a_verb") is verb and looked_at(later)  # what is already there is left alone
    with pytest.raises(ModuleNotFoundError):
        dispatcher.imported("a_broken_verb")
    assert gc.isenabled()


@pytest.mark.parametrize(("given", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                             ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_wait_patiently_unless_told_otherwise(given, spins, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_patient_verb.py").write_text("import os\nspins = os.environ.get('GOMP_SPINCOUNT')\n")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "a_patient_verb", raising=False)
    assert dispatcher.imported("a_patient_verb").spins == spins


def test_the_line_of_the_process_is_the_default(monkeypatch, called):
    monkeypatch.setattr("sys.argv", ["oneshot", "verify", "folder"])
    assert dispatcher.main() == 7 and called == [("oneshot.checkpoint.verify", ["folder"])]


def test_one_line_and_fail(capsys):
    assert inputs.one_line(ValueError("a\n\n  b")) == "a b" and inputs.one_line(KeyError()) == "KeyError"
    full = OSError(28, "No space\nleft", "/a")
    assert inputs.reason(full) == "No space left" and inputs.reason(ValueError("a\n" * 200)) == "a " * 100
    assert inputs.reason(OSError("")) == "OSError"
    assert command.fail("no") == 2 and capsys.readouterr().err == "error: no\n"
