"""Transformers' Trainer as healing on text uses it: Adam's parameter groups, a mask, looks, a progress bar."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ...runtime import distributed, sealed
from ..options import TENSORBOARD
from ..train import BETAS
from . import SEAL, sharded, verdict

__all__ = ["Looks", "Seals", "Shards", "TextTrainer", "TrainingArguments", "watching"]


class TextTrainer(Trainer):
    """Trainer with Adam's parameter groups, and a function that sets the gradients of pruned weights to zero."""

    def __init__(self, *args: Any, groups: list[dict], masked: Callable[[], None], **kwargs: Any) -> None:
        with sharded.by_itself():
            super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.groups, self.masked = groups, masked
        if sharded.asked():  # said here, as it refuses to train one that is to be resumed: `Shards` sees to that
            self.is_distributed_loading_by_transformers = True
        self.model_accepts_loss_kwargs = False  # the loss is a mean, to be divided by the accumulated steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam without weight decay, which would pull the healed weights away from the dense model's."""
        kind = sharded.Adam if sharded.asked() else torch.optim.AdamW
        self.optimizer = self.optimizer or kind(self.groups, betas=BETAS, weight_decay=0.0, fused=True)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As Trainer's; pruned weights get no gradient, so that neither they nor Adam's averages ever leave zero."""
        loss = super().training_step(*args, **kwargs)
        self.masked()
        return loss


def watching(work: Path, attempt: int, progress: bool) -> list[TrainerCallback]:
    """What shows how training goes: a bar, and TensorBoard's log where the environment names a folder for it.

    work: the folder for checkpoints, SAVE/.oneshot/heal/METHOD or a temporary one, by which runs are told apart.
    """
    bar = [Bar()] if progress else []
    if distributed.rank() or not (folder := os.environ.get(TENSORBOARD)):
        return bar
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    run = work.parents[2] if work.parents[1].name == ".oneshot" else work.parent
    place = Path(folder).expanduser() / f"{run.absolute().name}-{work.name}-attempt-{attempt}"
    return [*bar, TensorBoardCallback(SummaryWriter(place))]


class Bar(TrainerCallback):
    """A progress bar over all steps of an attempt, with the last losses."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="heal", unit="step", leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **_: Any) -> None:
        """See the class."""
        said = {"loss": "loss", "eval_loss": "held out"}
        for key in said.keys() & logs.keys():
            self.bar.set_postfix_str(f"{said[key]} {logs[key]:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        self.bar.close()


class Looks(TrainerCallback):
    """Ends an attempt that does harm, or no longer gains. before: the held-out loss before healing."""

    def __init__(self, before: float | None) -> None:
        self.before = before

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        if self.before is not None and verdict(
                [row["eval_loss"] for row in state.log_history if "eval_loss" in row], self.before):
            control.should_training_stop = True


class Seals(TrainerCallback):
    """Adds to each checkpoint the hashes of its files, when all processes have written theirs.

    Only then removes the earlier ones, but for the best: Trainer would remove them before this one is whole.
    seconds: of training, by earlier processes; each checkpoint says how many it took in all.
    """

    def __init__(self, seconds: float) -> None:
        self.began = time.perf_counter() - seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The best checkpoint lies where the others do, also if the folder was moved or is called otherwise now."""
        if state.best_model_checkpoint:
            state.best_model_checkpoint = str(Path(args.output_dir) / Path(state.best_model_checkpoint).name)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See the class."""
        distributed.wait()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name != SEAL)
            said = {"step": state.global_step, "seconds": time.perf_counter() - self.began}
            sealed.keep(said, folder / SEAL, names)
            keep = {folder.name, Path(state.best_model_checkpoint or folder).name}
            for other in folder.parent.glob("checkpoint-*"):
                if other.name not in keep:
                    shutil.rmtree(other)


class Shards(TrainerCallback):
    """Keeps each process's shard of the optimiser's state in the checkpoint, and reads it when training resumes."""

    def file(self, arguments: Any, step: int) -> Path:
        """This process's file in the checkpoint of a step."""
        return Path(arguments.output_dir) / f"checkpoint-{step}" / f"shard-{distributed.rank()}.pt"

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        """See the class."""
        if state.global_step:
            optimizer.load_state_dict(torch.load(self.file(args, state.global_step), weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        """See the class."""
        torch.save(optimizer.state_dict(), self.file(args, state.global_step))
