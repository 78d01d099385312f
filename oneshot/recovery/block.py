"""Block: train a pruned block's kept weights to give the dense block's outputs (reconstruction, arXiv 2510.14444).

    X    the block's input in the pruned model, (B, T, H)
    Y    the dense block's output on the dense model's input, (B, T, H)
    loss ‖block(X) - Y‖² / ‖Y - X‖², over the tokens that are no padding

The teacher runs on DENSE inputs, so a block makes up for what the blocks before it have lost. Memory: one block, its
gradients, Adam's two averages, two snapshots, and the dense model's hidden states beside the pruned one's.
"""

from dataclasses import dataclass, field

import torch

from .. import capture, models
from . import Trainable, check, fit

unit = "block"


@dataclass(frozen=True)
class Config:
    steps: int = field(default=200, metadata={"help": "updates a block, one batch of windows each"})
    lr: float = field(default=0.03, metadata={"help": "learning rate as a share of each tensor's root mean square"})

    def __post_init__(self):
        check(self, "block")


def repair(block, stream, b, targets, stored, cfg, seed):
    """Train the resident `block`, number b, in place; plain values for the record.

    stream: the pruned model's, at this block. targets: one (B, T, H) a batch. stored: {parameter: dtype to save in}.
    """
    def loss(i):
        out = capture.forward(block, stream, b, i).float()
        Y, X = (t.to(stream.device).float() for t in (targets[i], stream.hidden[i]))
        if stream.rows[i] is not None:
            out, Y, X = (t.reshape(-1, t.shape[-1])[stream.rows[i]] for t in (out, Y, X))
        return (out - Y).square().sum() / (Y - X).square().sum()

    with models.resident(models.tensors_of(block), stream.device, write_back=True, dtype=torch.float32), \
            Trainable(block, stored, models.untouched(block)) as trainable:
        return fit(trainable, loss, stream.held, steps=cfg.steps, lr=cfg.lr, seed=seed + b)
