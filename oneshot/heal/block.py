"""Block: train the kept weights of each pruned block to reproduce the dense block's outputs (arXiv 2510.14444).

    X     the block's input in the pruned model, (B, T, H)
    Y     the dense block's output on the dense model's input, (B, T, H)
    loss  ‖block(X) - Y‖² / ‖Y - X‖² over the tokens that are not padding, each token's part of both divided by its ‖Y‖²

The teacher runs on the DENSE model's inputs, so a block also compensates for errors of the blocks before it. Memory:
one block, its gradients, Adam's two averages, two snapshots, and the dense model's hidden states next to the pruned
model's.

`--block.unit parts` trains attention first, then the MLP. Let block₀ be the block with an MLP that returns zeros.
However a model family writes its blocks, the output of block₀ is the hidden state after attention's residual addition,
X + attention(norm(X)). The two losses are

    attention   ‖block₀(X) - Y₀‖² / ‖Y₀ - X‖², likewise per token, over the parameters that affect block₀'s output; Y₀:
                the dense block₀'s
    MLP         the loss above over all other parameters; a norm shared by both (parallel blocks) belongs to attention

with `steps` updates each. Y₀ takes the memory of one more set of hidden states. Whatever is neither attention nor MLP
(experts, the per-layer inputs of Gemma 3n and 4) counts as MLP.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import calibrate, models
from ..calibrate import Activations
from ..models import Block
from ..runtime import distributed
from ..runtime.flag import flag
from . import Heal as Base
from . import Run
from .train import Trainable, check, distance, fit, mean

UNITS = ("block", "parts")


@dataclass(frozen=True)
class Config:
    unit: str = flag("block", "what is trained at once: the whole block, or its parts one after the other, attention "
                              "and then the MLP", choices=UNITS)
    steps: int = flag(200, "updates per unit, each on one batch of windows (512 tokens, or one longer window)")
    lr: float = flag(0.02, "learning rate as a share of each tensor's root mean square")

    def __post_init__(self) -> None:
        check(self, "block")
        if self.unit not in UNITS:
            raise ValueError(f"--block.unit {self.unit}: give {' or '.join(UNITS)}")


def check_model(model: nn.Module, cfg: Config, run: Run) -> None:
    """Raise ValueError naming `--block.unit` if attention and MLP of a block cannot be told apart."""
    if cfg.unit == "parts":
        for block in models.walk(model):
            try:
                models.mlp(block.module)
            except ValueError as error:
                raise ValueError(f"--block.unit parts: block {block.number}: {error}; use --block.unit block") from None


class Heal(Base):
    """Block reconstruction at work in one run, see above."""

    def before_block(self, block: Block, dense: Activations) -> None:
        """Keep Y₀, the hidden states after the dense block's attention, if attention is trained separately."""
        self.middle: list[torch.Tensor] | None = None
        if self.cfg.unit == "parts":
            to_middle = dense.fork()
            with models.silent(models.mlp(block.module)):
                calibrate.replay(block.module, to_middle, block.number)
            self.middle = to_middle.hidden

    def after_block(self, block: Block, activations: Activations, targets: list[torch.Tensor]) -> dict:
        """Train the whole block, or attention and then the MLP."""
        leave = models.untouched(block.module)
        with models.resident(block.module, activations.device, write_back=True, dtype=torch.float32):
            if self.middle is None:
                return self.train(block, activations, targets, leave)
            return self.train_parts(block, activations, targets, leave)

    def train(self, block: Block, activations: Activations, targets: list[torch.Tensor], leave: set[str]) -> dict:
        """Train all but the parameters named in `leave`."""
        with Trainable(block.module, block.stored, leave) as trainable:
            return fit(trainable, distance(block, activations, targets), activations.held, steps=self.cfg.steps,
                       lr=self.cfg.lr, seed=self.seed + block.number)

    def train_parts(self, block: Block, activations: Activations, targets: list[torch.Tensor],
                    leave: set[str]) -> dict:
        """Train attention, then the MLP; both are undone if the whole block got worse."""
        whole = Trainable(block.module, block.stored, leave)
        loss, held = distance(block, activations, targets), [i for i, apart in enumerate(activations.held) if apart]
        before, start = mean(loss, held), whole.snapshot()
        with models.silent(models.mlp(block.module)):
            ahead = distributed.first(reached(whole, block, activations))
            attention = self.train(block, activations, self.middle, leave | (set(whole.parameters) - ahead))
        mlp = self.train(block, activations, targets, leave | ahead)
        parts = {"attention": attention, "mlp": mlp}
        warnings = [f"{part}: {w}" for part, info in parts.items() for w in info.pop("warnings")]
        after = mean(loss, held)
        if before is not None and not after <= before:  # a NaN is no gain
            whole.restore(start)
            warnings.append(f"attention and MLP one by one made the held-out loss worse, {before:.3g} to {after:.3g}: "
                            "left as it was")
            after = before
        return {"steps": attention["steps"] + mlp["steps"], "held_out_before": before, "held_out_after": after,
                "parts": parts, "warnings": warnings}


@torch.enable_grad()
def reached(trainable: Trainable, block: Block, activations: Activations) -> set[str]:
    """Names of the parameters that affect the block's output on the first batch."""
    for p in trainable.parameters.values():
        p.requires_grad_(True)
    out = calibrate.forward(block.module, activations, block.number, 0)
    at_random = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    gradients = torch.autograd.grad(out, list(trainable.parameters.values()), at_random, allow_unused=True)
    for p in trainable.parameters.values():
        p.requires_grad_(False)
    return {name for name, g in zip(trainable.parameters, gradients, strict=True) if g is not None and bool(g.any())}
