"""`--heal full` and `lora` by command, ended in the middle: the same command continues, with what is whole."""

import os
import resource
import shutil
import signal
from types import SimpleNamespace

import processes
import pytest
import tiny
import torch
from healing_on_text import argv
from tiny import place, plain_pages  # noqa: F401

from oneshot import checkpoint
from oneshot.heal import text
from oneshot.heal.text import trainer
from oneshot.pipeline import heal_command
from oneshot.report import page
from oneshot.runtime import sealed

pytestmark = pytest.mark.usefixtures("plain_pages")


@pytest.mark.parametrize("heal", ["full", "lora"])
def test_a_killed_run_continues_to_the_same_bits(place, heal, tmp_path, monkeypatch):  # noqa: F811
    assert tiny.main(*argv(place, tmp_path / "whole", heal=heal, heal_tokens="320")) == 0
    real = trainer.TextTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TextTrainer, "training_step", step)
        assert tiny.main(*argv(place, tmp_path / "broken", heal=heal, heal_tokens="320")) == 130
    assert (tmp_path / "broken" / ".oneshot" / "heal").is_dir()
    steps = []

    def counting(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return real(self, *args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TextTrainer, "training_step", counting)
        assert tiny.main(*argv(place, tmp_path / "broken", heal=heal, heal_tokens="320")) == 0
    assert min(steps) > 0  # it did not begin anew
    first, record = (checkpoint.read_manifest(tmp_path / name)["record"] for name in ("whole", "broken"))
    spent, pruning = record["seconds"], sum(sum(block["seconds"].values()) for block in record["blocks"])
    assert "earlier" not in first["seconds"] and spent["total"] > spent["prune"] > spent["earlier"]
    assert 0 < spent["earlier"] - pruning < record["heal"][heal]["seconds"]  # of both processes, all steps
    whole, broken = (tiny.weights(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.fixture(scope="module")
def broken(place, tmp_path_factory):  # noqa: F811
    """(the folder of a run that was killed after two checkpoints, the weights that an uninterrupted one gives)."""
    out = tmp_path_factory.mktemp("broken") / "out"
    real = trainer.TextTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pictures", lambda records: [])
        assert tiny.main(*argv(place, out.with_name("whole"), heal_tokens="320")) == 0
        patch.setattr(trainer.TextTrainer, "training_step", step)
        assert tiny.main(*argv(place, out, heal_tokens="320")) == 130
    return out, tiny.weights(out.with_name("whole"))


@pytest.mark.parametrize("name, spoil, said", [
    ("full/attempt-0/checkpoint-*/model.safetensors", "truncate", None),
    ("full/attempt-0/checkpoint-*/optimizer.pt", "flip", None), ("full/attempts.json", "truncate", "are damaged"),
    ("full/start.json", "remove", "are damaged"), ("text/train.npy", "flip", None),
    ("text/text.json", "truncate", None)])
def test_damaged_work_files_are_not_used(place, broken, name, spoil, said, tmp_path):  # noqa: F811
    """Bits that changed on the disk, or a file that a power failure cut short."""
    shutil.copytree(broken[0], tmp_path / "out")
    files = list((tmp_path / "out" / ".oneshot" / "heal").glob(name))
    assert files
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(content[:middle] + (b"" if spoil == "truncate" else b"\xff" * 8 + content[middle + 8:]))
        if spoil == "remove":
            file.unlink()
    assert tiny.main(*argv(place, tmp_path / "out", heal_tokens="320")) == 0
    found = tiny.weights(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in broken[1].items())
    warnings = checkpoint.read_manifest(tmp_path / "out")["record"]["warnings"]
    assert [said in w for w in warnings] == [True] if said else warnings == []


def test_adams_averages_of_pruned_weights_are_exactly_zero_after_resuming_too(
        place, broken, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(broken[0], tmp_path / "out")
    found, real = [], trainer.TextTrainer.train

    def sums(self):
        """(of pruned weights, of kept ones)."""
        trainable = self.masked.__self__
        averages = [(self.optimizer.state[trainable.parameters[name]][key].abs(), mask)
                    for name, mask in trainable.masks.items() for key in ("exp_avg", "exp_avg_sq")]
        return [float(sum(t[where == kept].sum() for t, where in averages)) for kept in (False, True)]

    def train(self, **kwargs):
        real_step = self.training_step

        def step(*args, **more):
            found.append((self.state.global_step, *sums(self)))
            return real_step(*args, **more)
        self.training_step = step
        done = real(self, **kwargs)
        found.append((self.state.global_step, *sums(self)))
        return done
    monkeypatch.setattr(trainer.TextTrainer, "train", train)
    assert tiny.main(*argv(place, tmp_path / "out", heal_tokens="320")) == 0
    assert found[0][0] > 0 and found[-1][0] == 10
    assert all(pruned == 0.0 < kept for _, pruned, kept in found)


def run_or_die(folder, moment, *words):
    """`oneshot heal`, ended by SIGKILL in the step after `moment` of them, if that is not None; says its first step."""
    page._pictures, real, steps = lambda records: [], trainer.TextTrainer.training_step, []

    def step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if self.state.global_step == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)
    trainer.TextTrainer.training_step = step
    code = heal_command.main(list(words))
    (folder / "first").write_text(str(min(steps)))
    return code


def test_oneshot_heal_killed_and_run_again_ends_with_the_same_bits(place, tmp_path):  # noqa: F811
    assert tiny.main(*tiny.flags(place, "--no-dense", evaluate="none", save=tmp_path / "pruned")) == 0

    def heal(name, moment):
        words = [tmp_path / "pruned", "--data", place / "calibration.txt", "--tokens", 320, "--batch", 32,
                 "--heal-seqlen", 16, "--no-dense", "--evaluate", "none", "--device", "cpu", "--save", tmp_path / name,
                 "--results", tmp_path / "runs", "--no-progress"]
        return processes.together(1, tmp_path / "said", run_or_die, tmp_path, moment, *map(str, words))
    assert heal("whole", None) == [0], processes.said(tmp_path / "said")
    assert heal("broken", 5) == [-signal.SIGKILL] and (tmp_path / "broken" / ".oneshot" / "heal").is_dir()
    assert heal("broken", None) == [0] and int((tmp_path / "first").read_text()) > 0
    whole, broken = (tiny.weights(tmp_path / name) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


def limited(work, size):
    """What `work` does in a process that may write no file larger than `size` bytes, as on a disk that is full."""
    def done(self, *args, **kwargs):
        before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            return work(self, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    return done


def killed(work):
    """What `work` does until it is interrupted in the fourth step."""
    def done(self, args, state, *more, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt
        return work(self, args, state, *more, **kwargs)
    return done


def planned(work):
    """What `work` measures, but the second look is the best of the first three, and the fourth is better."""
    def done(self, *args, **kwargs):
        found = work(self, *args, **kwargs)
        losses = {1: 50.0, 2: 40.0, 3: 60.0, 4: 30.0}
        return found | {"eval_loss": losses.get(self.state.global_step, found["eval_loss"])}
    return done


@pytest.mark.parametrize("breaks", ["model.safetensors", "optimizer.pt", "seal", "seal of the best"])
def test_what_ends_while_a_checkpoint_is_written_continues_with_the_one_before(
        place, broken, breaks, tmp_path, monkeypatch, capfd):  # noqa: F811
    given, steps, real = argv(place, tmp_path / "out", heal_tokens="320"), [], trainer.TextTrainer.training_step

    def counting(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return real(self, *args, **kwargs)
    with monkeypatch.context() as patch:
        if breaks == "seal of the best":
            patch.setattr(trainer.TextTrainer, "evaluate", planned(trainer.TextTrainer.evaluate))
        if "seal" in breaks:
            patch.setattr(trainer.Seals, "on_save", killed(trainer.Seals.on_save))
        else:
            size = 50_000 if breaks == "model.safetensors" else 150_000  # the optimiser's state is larger
            patch.setattr(trainer.TextTrainer, "_save_checkpoint", limited(trainer.TextTrainer._save_checkpoint, size))
        assert tiny.main(*given) == (130 if "seal" in breaks else 2)
    [line] = [line for line in tiny.said(capfd.readouterr().err) if line.startswith("error: ")]
    assert "seal" in breaks or line.startswith(f"error: --save {tmp_path / 'out'}: cannot be written (")
    monkeypatch.setattr(trainer.TextTrainer, "training_step", counting)
    assert tiny.main(*given) == 0 and min(steps) == 3
    found = tiny.weights(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in broken[1].items())


def test_an_attempt_whose_steps_are_done_is_not_trained_further(place, tmp_path, monkeypatch):  # noqa: F811
    """Also where its text ends with a window that is no whole step."""
    real, copied, steps = trainer.TextTrainer.training_step, [], []

    def step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return real(self, *args, **kwargs)

    def interrupted(*args):
        copied.append(args)
        raise KeyboardInterrupt
    given = [argv(place, tmp_path / name, heal_tokens="336") for name in ("whole", "broken")]
    assert tiny.main(*given[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(text.shutil, "copyfile", interrupted)
        assert tiny.main(*given[1]) == 130 and copied
    monkeypatch.setattr(trainer.TextTrainer, "training_step", step)
    assert tiny.main(*given[1]) == 0 and not steps
    told = [checkpoint.read_manifest(tmp_path / name)["record"]["heal"]["full"] for name in ("whole", "broken")]
    assert told[0]["attempts"] == told[1]["attempts"] and told[0]["attempts"][0]["steps"] == 10


@pytest.mark.parametrize("name", ["model.safetensors", "rng_state_1.pth", "shard-1.pt"])
def test_a_checkpoint_is_whole_only_with_what_all_processes_wrote(name, tmp_path):
    files = [tmp_path / "checkpoint-3" / name for name in ("model.safetensors", "rng_state_1.pth", "shard-1.pt")]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(b"as written")
    state = SimpleNamespace(global_step=3, is_world_process_zero=True, best_model_checkpoint=None)
    trainer.Seals(7.0).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert sealed.kept(tmp_path / "checkpoint-3" / text.SEAL)["seconds"] > 7
    (tmp_path / "checkpoint-3" / name).write_bytes(b"changed")
    assert not sealed.kept(tmp_path / "checkpoint-3" / text.SEAL)
