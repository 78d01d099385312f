"""Training with a fixed mask: which parameters may change, and how they are fitted.

    steps   updates, one batch of windows each
    lr      learning rate as a share of each tensor's root mean square: absolute rates do not carry over between models
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from .. import calibrate
from ..calibrate import Activations
from ..models import Block
from ..runtime.proof import prove

SHARE = 10  # one window in so many is held out
WARM_UP = 0.05  # of the steps
VECTORS = 0.1  # norms and biases move slower: at the matrices' rate they undid in 12 steps what 12 more could not mend
BETAS = (0.9, 0.95)
LOOKS = 8  # how often the held-out batches are looked at
ATTEMPTS, FALL = 3, 4


def check(cfg, name: str) -> None:
    """Raise ValueError naming the flag of the method `name` whose value cannot be used."""
    if cfg.steps < 1:
        raise ValueError(f"--{name}.steps {cfg.steps}: must be at least 1")
    if not 0 < cfg.lr < 1:
        raise ValueError(f"--{name}.lr {cfg.lr:g}: must lie between 0 and 1")


class Trainable:
    """The parameters of a module that may change: matrices where they are not zero, and all vectors (norms, biases).

    parameters: name -> nn.Parameter of `module`. stored: {name: dtype it will be saved in}. leave: names of matrices
    that are never pruned, so never touched (routers, embeddings).
    """

    def __init__(self, module: nn.Module, stored: dict[str, torch.dtype], leave: Iterable[str] = ()):
        self.stored, self.parameters, self.masks = stored, {}, {}
        for name, p in module.named_parameters():
            if p.is_floating_point() and name not in leave:
                self.parameters[name] = p
                if p.ndim > 1:
                    self.masks[name] = p.data != 0

    def __enter__(self):
        self.dtypes = {name: p.dtype for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.data = p.data.float() if p.element_size() < 4 else p.data  # small steps would be lost in 16 bits
            p.requires_grad_(True)
        return self

    def __exit__(self, *_):
        for name, p in self.parameters.items():
            p.requires_grad_(False)
            p.grad = None
            p.data = p.data.to(self.stored[name]).add_(0.0).to(self.dtypes[name])  # no -0.0, as View.set has it
        for name, mask in self.masks.items():
            prove(not self.parameters[name].data[~mask].any(), f"{name}: a pruned weight came back")

    def groups(self, lr: float) -> list[dict]:
        """Adam's parameter groups: each tensor its own rate. A bias that is all zero takes the matrices' scale."""
        sizes = {name: rms(p.data, self.masks.get(name)) for name, p in self.parameters.items()}
        matrices = [sizes[name] for name in self.masks if sizes[name]]
        usual = sum(matrices) / len(matrices) if matrices else 1.0
        return [{"params": [p], "lr": lr * (sizes[name] or usual) * (1 if p.ndim > 1 else VECTORS)}
                for name, p in self.parameters.items()]

    def mask_gradients(self) -> None:
        """Zero gradients keep Adam's averages, and so the weights, at exactly zero."""
        for name, mask in self.masks.items():
            if self.parameters[name].grad is not None:  # an expert without tokens has none
                self.parameters[name].grad.mul_(mask)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy in CPU memory: it is seldom needed, and a device has none to spare."""
        return {name: p.data.to("cpu", copy=True) for name, p in self.parameters.items()}

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        for name, p in self.parameters.items():
            p.data.copy_(snapshot[name])


def rms(t: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Root mean square of what may change."""
    n = t.numel() if mask is None else int(mask.count_nonzero())
    return float(torch.linalg.vector_norm(t) / max(n, 1) ** 0.5)


def held_out_windows(n: int, seed: int) -> tuple[int, ...]:
    """Numbers of the windows, of n, that no healer of a run trains on: a tenth, rounded up; none of a single one."""
    count = -(-n // SHARE) if n > 1 else 0
    return tuple(sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist()))


def fit(trainable: Trainable, loss: Callable[[int], torch.Tensor], held: Sequence[bool], *, steps: int, lr: float,
        seed: int, progress: Callable[[], object] | None = None) -> dict:
    """Adam with warm-up and cosine on the mean of loss(i) over the batches i; plain values for the record.

    loss(i): a scalar tensor for batch i. held: one bool a batch, whether it is held out. The state that does best on
    those is kept, and training ends early when twice in a row it got worse. Where nothing was gained at all, the rate
    was too high for this model: it is divided by FALL and all begins anew. seed: of the batches' order. progress():
    called every step.
    """
    fitting = Fitting(trainable, loss, held, steps, seed, progress)
    before, start, warnings = fitting.held_out_loss(), trainable.snapshot(), []
    for attempt in range(ATTEMPTS):
        rate = lr / FALL**attempt
        done, best = fitting.descend(rate, before, start)
        if before is None or best < before:
            break
    if attempt:
        warnings.append(f"learning rate lowered from {lr:g} to {rate:g}" if best < before else
                        f"nothing gained at learning rates from {lr:g} down to {rate:g}: left as it was")
    if before is None:
        warnings.append("one window only: nothing held out, no early stop; raise --nsamples")
    return {"steps": done, "lr": rate, "held_out_before": before, "held_out_after": best, "warnings": warnings}


class Fitting:
    """What one `fit` works on; the order of the batches goes on from one descent to the next."""

    def __init__(self, trainable, loss, held, steps, seed, progress):
        self.trainable, self.loss, self.steps, self.progress = trainable, loss, steps, progress
        self.train, self.held = ([i for i, apart in enumerate(held) if apart == kind] for kind in (False, True))
        self.gen = torch.Generator().manual_seed(seed)

    def held_out_loss(self) -> float | None:
        """Mean loss over the held-out batches; None without any."""
        return mean(self.loss, self.held)

    @torch.enable_grad()
    def descend(self, lr: float, best: float | None, state: dict[str, torch.Tensor]) -> tuple[int, float | None]:
        """One training from the parameters as they are, whose held-out loss is `best` and which `state` holds.

        Leaves the state that did best in place. Returns (steps done, its held-out loss).
        """
        optimizer = torch.optim.Adam(self.trainable.groups(lr), betas=BETAS, foreach=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        worse, queue, done = 0, [], 0
        for done in range(1, self.steps + 1):
            queue = queue or [self.train[i] for i in torch.randperm(len(self.train), generator=self.gen).tolist()]
            optimizer.zero_grad(set_to_none=True)
            self.loss(queue.pop()).backward()
            self.trainable.mask_gradients()
            optimizer.step()
            schedule.step()
            if self.progress:
                self.progress()
            if self.held and (done % max(1, self.steps // LOOKS) == 0 or done == self.steps):
                now = self.held_out_loss()
                best, state, worse = (now, self.trainable.snapshot(), 0) if now < best else (best, state, worse + 1)
                if worse == 2:
                    break
        if self.held:
            self.trainable.restore(state)
        return done, best

    def rate_at(self, step: int) -> float:
        """The learning rate's share at a step: up in a line, down in half a cosine."""
        warm = max(1, round(self.steps * WARM_UP))
        return min((step + 1) / warm, 1) * (0.5 + 0.5 * math.cos(math.pi * min(step / self.steps, 1)))


def mean(loss: Callable[[int], torch.Tensor], batches: Sequence[int]) -> float | None:
    """Mean loss over batches, a float; None of nothing."""
    with torch.no_grad():
        return sum(float(loss(i)) for i in batches) / len(batches) if batches else None


def distance(block: Block, activations: Activations, targets: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """A block's loss: a function that gives ‖block(X) - Y‖² / ‖Y - X‖² of batch i, over the tokens that are no padding.

    X: the activations at the block. Y: targets, one (B, T, H) a batch.
    """
    def loss(i):
        out = calibrate.forward(block.module, activations, block.number, i).float()
        Y, X = (t.to(activations.device).float() for t in (targets[i], activations.hidden[i]))
        if activations.rows[i] is not None:
            out, Y, X = (t.reshape(-1, t.shape[-1])[activations.rows[i]] for t in (out, Y, X))
        return (out - Y).square().sum() / (Y - X).square().sum()
    return loss
