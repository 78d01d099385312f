"""Block: train a pruned block's kept weights to give the dense block's outputs (reconstruction, arXiv 2510.14444).

    X     the block's input in the pruned model, (B, T, H)
    Y     the dense block's output on the dense model's input, (B, T, H)
    loss  ‖block(X) - Y‖² / ‖Y - X‖², over the tokens that are no padding

The teacher runs on DENSE inputs, so a block makes up for what the blocks before it have lost. Memory: one block, its
gradients, Adam's two averages, two snapshots, and the dense model's hidden states beside the pruned one's.

`unit parts` trains attention first, then the MLP. A block whose MLP gives zeros, block₀, ends with the hidden state
behind attention's residual addition, X + attention(norm(X)), in whatever way the family writes its block:

    attention   ‖block₀(X) - Y₀‖² / ‖Y₀ - X‖² over the parameters that reach block₀'s output; Y₀ is the dense block₀'s
    MLP         the loss above over all others: where both read one norm (parallel blocks), the norm is attention's

Either takes `steps` updates. Y₀ is one more set of hidden states. What stands beside attention and MLP (experts, Gemma
3n's and 4's per-layer inputs) counts as MLP.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .. import calibrate, models
from ..calibrate import Activations
from ..models import Block
from ..runtime.flag import flag
from . import Heal as Base
from .train import Trainable, check, distance, fit, mean

UNITS = ("block", "parts")


@dataclass(frozen=True)
class Config:
    unit: str = flag("block", "what is trained at once: the whole block, or its parts: attention, then the MLP",
                     choices=UNITS)
    steps: int = flag(200, "updates a unit, one batch of windows each")
    lr: float = flag(0.03, "learning rate as a share of each tensor's root mean square")

    def __post_init__(self):
        check(self, "block")
        if self.unit not in UNITS:
            raise ValueError(f"--block.unit {self.unit}: give {' or '.join(UNITS)}")


def check_model(model: nn.Module, cfg: Config, device: str) -> None:
    """Raise ValueError naming `--block.unit` where a block of the model has no such parts."""
    if cfg.unit == "parts":
        for b, block in enumerate(models.blocks(model)[1]):
            try:
                models.mlp(block)
            except ValueError as error:
                raise ValueError(f"--block.unit parts: block {b}: {error}; use --block.unit block") from None


class Heal(Base):
    """See above."""

    def before_block(self, block: Block, dense: Activations) -> None:
        """Keep Y₀, the hidden states behind the dense block's attention, where it is trained by itself."""
        self.middle = None
        if self.cfg.unit == "parts":
            to_middle = dense.fork()
            with models.silent(models.mlp(block.module)):
                calibrate.replay(block.module, to_middle, block.number)
            self.middle = to_middle.hidden

    def after_block(self, block: Block, activations: Activations, targets: list[torch.Tensor]) -> dict:
        """Train the whole block, or attention and then the MLP."""
        tensors, leave = models.tensors_of(block.module), models.untouched(block.module)
        with models.resident(tensors, activations.device, write_back=True, dtype=torch.float32):
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
        """Train attention, then the MLP; both are undone where the whole block got worse."""
        whole = Trainable(block.module, block.stored, leave)
        loss, held = distance(block, activations, targets), [i for i, apart in enumerate(activations.held) if apart]
        before, start = mean(loss, held), whole.snapshot()
        with models.silent(models.mlp(block.module)):
            ahead = reached(whole, block, activations)
            attention = self.train(block, activations, self.middle, leave | (set(whole.parameters) - ahead))
        mlp = self.train(block, activations, targets, leave | ahead)
        parts = {"attention": attention, "mlp": mlp}
        warnings = [f"{part}: {w}" for part, info in parts.items() for w in info.pop("warnings")]
        after = mean(loss, held)
        if held and after > before:
            whole.restore(start)
            warnings.append(f"attention and MLP one by one made the held-out loss worse, {before:.3g} to {after:.3g}: "
                            "left as it was")
            after = before
        return {"steps": attention["steps"] + mlp["steps"], "held_out_before": before, "held_out_after": after,
                "parts": parts, "warnings": warnings}


@torch.enable_grad()
def reached(trainable: Trainable, block: Block, activations: Activations) -> set[str]:
    """Names of the parameters that bear on the block's output, seen on the first batch."""
    for p in trainable.parameters.values():
        p.requires_grad_(True)
    out = calibrate.forward(block.module, activations, block.number, 0)
    at_random = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    gradients = torch.autograd.grad(out, list(trainable.parameters.values()), at_random, allow_unused=True)
    for p in trainable.parameters.values():
        p.requires_grad_(False)
    return {name for name, g in zip(trainable.parameters, gradients, strict=True) if g is not None and bool(g.any())}
