"""Training with a fixed mask: which parameters may change, and how they are trained.

    steps   number of updates, each on one batch of windows, at most TOKENS tokens: for the same time, many small steps
            reach a lower loss than few large ones
    lr      learning rate as a share of each tensor's root mean square: absolute rates do not carry over between models

Weights, gradients and Adam's averages are float32. Matrix products are bfloat16 (autocast) where the model is stored in
16 bits and the device multiplies bfloat16 faster: 2.4 times on a Zen 5 core. The record's `products` says which.

Processes that work together (torchrun) take one batch each in a step, whose gradients are averaged: as many steps, in
the same time, on more data. Losses on held-out windows are means over those of all, so all decide alike.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .. import calibrate
from ..calibrate import Activations
from ..models import Block
from ..runtime import distributed, environment
from ..runtime.proof import prove

TOKENS = 512  # in a batch at most, but at least one window
SHARE, HELD = 10, 4096  # one window in so many is held out, and so many tokens at most: looking at them takes time
WARM_UP = 0.05  # share of the steps
VECTORS = 0.1  # relative rate of norms and biases: at the matrices' rate, 12 steps did damage that 12 more did not undo
BETAS = (0.9, 0.95)  # of Adam
LOOKS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # shares of the steps after which the held-out loss is evaluated
FALL = 2  # by what the learning rate is divided where it does harm


def check(cfg: Any, name: str) -> None:
    """Raise ValueError naming the flag (`steps` or `lr`) of the method `name` whose value cannot be used."""
    if cfg.steps < 1:
        raise ValueError(f"--{name}.steps {cfg.steps}: must be at least 1")
    if not 0 < cfg.lr < 1:
        raise ValueError(f"--{name}.lr {cfg.lr:g}: must lie between 0 and 1")


def windows_per_step(batch_size: int, seqlen: int) -> int:
    """How many windows of `seqlen` tokens a batch has if a step is trained on it. batch_size: the most."""
    return max(1, min(batch_size, TOKENS // seqlen))


class Trainable:
    """The parameters of a module that may change: the nonzero entries of matrices, and all vectors (norms, biases).

    Within the context, they are float32 and require gradients; on leaving it they are rounded to their stored dtype.

    stored: {parameter name: dtype it is saved in}. leave: names of parameters that must not change (routers, matrices
    that are not recognised).
    """

    def __init__(self, module: nn.Module, stored: dict[str, torch.dtype], leave: Iterable[str] = ()) -> None:
        self.stored = stored
        self.parameters: dict[str, nn.Parameter] = {}
        self.masks: dict[str, torch.Tensor] = {}  # of the matrices, bool, True where a weight is kept
        for name, p in module.named_parameters():
            if p.is_floating_point() and name not in leave:
                self.parameters[name] = p
                if p.ndim > 1:
                    self.masks[name] = p.data != 0

    def __enter__(self) -> "Trainable":
        self.dtypes = {name: p.dtype for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.data = p.data.float() if p.element_size() < 4 else p.data  # small steps would be lost in 16 bits
            p.requires_grad_(True)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, p in self.parameters.items():
            p.requires_grad_(False)
            p.grad = None
            p.data = p.data.to(self.stored[name]).add_(0.0).to(self.dtypes[name])  # no -0.0, as in Weight.set
        for name, mask in self.masks.items():
            prove(not self.parameters[name].data[~mask].any(), f"{name}: a pruned weight came back")

    def products(self) -> torch.dtype:
        """The dtype in which matrices are multiplied in training, see above."""
        short = all(self.stored[name].itemsize < 4 for name in self.parameters)
        return torch.bfloat16 if short and environment.fast_bfloat16(self.device) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(p.device for p in self.parameters.values())

    def groups(self, lr: float) -> list[dict]:
        """Adam's parameter groups, each tensor with its own rate; a bias of zeros uses the matrices' mean scale."""
        return self.groups_of({name: rms(p.data, self.masks.get(name)) for name, p in self.parameters.items()}, lr)

    def groups_of(self, sizes: dict[str, float], lr: float) -> list[dict]:
        """`groups` for matrices and vectors of these root mean squares."""
        matrices = [sizes[name] for name in self.masks if sizes[name]]
        usual = sum(matrices) / len(matrices) if matrices else 1.0
        return [{"params": [p], "lr": lr * (sizes[name] or usual) * (1 if p.ndim > 1 else VECTORS)}
                for name, p in self.parameters.items()]

    def mask_gradients(self, names: Iterable[str] | None = None) -> None:
        """Set the gradients of pruned weights to zero, so that Adam's averages and the weights stay exactly zero.

        names: of which parameters (default: all).
        """
        for name in self.masks if names is None else names:
            if name in self.masks and self.parameters[name].grad is not None:  # an expert without tokens has none
                self.parameters[name].grad.mul_(self.masks[name])

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters as they will be saved, in CPU memory because it is rarely needed."""
        return {name: p.data.to("cpu", self.stored[name], copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def round(self) -> None:
        """Round the parameters as they will be saved; they stay in the dtype they are trained in."""
        for name, p in self.parameters.items():
            p.data.copy_(p.data.to(self.stored[name]))

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Set the parameters to a snapshot."""
        for name, p in self.parameters.items():
            p.data.copy_(snapshot[name])


def rms(t: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Root mean square of t, over its entries where the mask is True; the others must be zero."""
    n = t.numel() if mask is None else int(mask.count_nonzero())
    return float(torch.linalg.vector_norm(t) / max(n, 1) ** 0.5)


def held_out_windows(n: int, seqlen: int, seed: int) -> tuple[int, ...]:
    """Numbers of the windows, out of n of `seqlen` tokens, that no healing method trains on.

    A tenth, rounded up, but no more than hold HELD tokens, and at least one; none if n is 1.
    """
    count = min(-(-n // SHARE), max(1, HELD // seqlen)) if n > 1 else 0
    return tuple(sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist()))


def fit(trainable: Trainable, loss: Callable[[int], torch.Tensor], held: Sequence[bool], *, steps: int, lr: float,
        seed: int, progress: Callable[[], object] | None = None) -> dict:
    """Minimise the mean loss over the batches by Adam with warm-up and cosine decay; gives plain values for the record.

    loss(i): a scalar tensor for batch i. held: one bool per batch, whether it is held out. steps, lr: see above. seed:
    of the order of the batches. progress(): called after every step.

    The state with the best held-out loss is kept, and training stops early when that loss got worse twice in a row.
    Where it is worse than it was before training, the learning rate is too high for this model: the best state is
    restored, the rate is divided by FALL and the remaining steps are done with it. The first looks come early, so that
    few steps are lost.
    """
    fitting = Fitting(trainable, loss, held, steps, seed, progress)
    before, start, warnings = fitting.held_out_loss(), trainable.snapshot(), []
    done, rate, best = fitting.descend(lr, before, start)
    if before is None:
        warnings.append("one window only: nothing held out, no early stop; raise --nsamples")
    elif not best < before:
        warnings.append(f"nothing gained at learning rates from {lr:g} down to {rate:g}: left as it was")
    else:
        if rate < lr:
            warnings.append(f"learning rate lowered from {lr:g} to {rate:g}")
        trainable.round()  # the loss of what will be saved
        best = fitting.held_out_loss()
        if not best <= before:
            trainable.restore(start)
            best = before
            warnings.append("rounding to the stored dtype cost more than was gained: left as it was")
    return {"steps": done, "lr": rate, "products": str(fitting.products).removeprefix("torch."),
            "held_out_before": before, "held_out_after": best, "warnings": warnings}


class Fitting:
    """The state of one `fit`."""

    def __init__(self, trainable: Trainable, loss: Callable[[int], torch.Tensor], held: Sequence[bool], steps: int,
                 seed: int, progress: Callable[[], object] | None) -> None:
        self.trainable, self.of_batch, self.steps, self.progress = trainable, loss, steps, progress
        self.products = trainable.products()
        self.train, self.held = ([i for i, apart in enumerate(held) if apart == kind] for kind in (False, True))
        self.gen = torch.Generator().manual_seed(seed)
        self.queue: list[int] = []
        self.looks = {max(1, round(share * steps)) for share in LOOKS}

    def loss(self, i: int) -> torch.Tensor:
        """The loss of batch i, its matrix products in the dtype of `products`."""
        short = self.products == torch.bfloat16
        with torch.autocast(self.trainable.device.type, torch.bfloat16, enabled=short):
            return self.of_batch(i)

    def held_out_loss(self) -> float | None:
        """Mean loss over the held-out batches; None if there are none."""
        return mean(self.loss, self.held)

    @torch.enable_grad()
    def descend(self, lr: float, before: float | None,
                state: dict[str, torch.Tensor]) -> tuple[int, float, float | None]:
        """Train from the current parameters, which `state` holds and whose held-out loss is `before`.

        Leaves the parameters at their best state. Returns (steps done, last learning rate, that state's held-out loss).
        """
        optimizers, best, worse = self.optimizers(lr), before, 0
        for done in range(1, self.steps + 1):
            self.step(optimizers, done - 1)
            if before is None or done not in self.looks:
                continue
            now = self.held_out_loss()
            if now < best:
                best, state, worse = now, self.trainable.snapshot(), 0
            elif not now <= before and done < self.steps:  # a NaN is no gain
                lr, worse = lr / FALL, 0
                self.trainable.restore(state)
                optimizers = self.optimizers(lr)
            else:
                worse += 1
                if worse == 2:
                    break
        if before is not None:
            self.trainable.restore(state)
        return done, lr, best

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """{parameter: a new Adam}; fused, as that makes no copies of the weights."""
        groups = zip(self.trainable.parameters, self.trainable.groups(lr), strict=True)
        return {name: torch.optim.Adam([own | {"highest": own["lr"]}], betas=BETAS, fused=True) for name, own in groups}

    def step(self, optimizers: dict[str, torch.optim.Optimizer], number: int) -> None:
        """One update on the next batch, at the rate of this step, counted from 0.

        A process that is alone updates each parameter as soon as its gradient is there and lets go of it, so that they
        are never in memory all at once; several take the mean of theirs first.
        """
        for optimizer in optimizers.values():
            group = optimizer.param_groups[0]
            group["lr"] = group["highest"] * self.rate_at(number)
        self.queue = self.queue or [self.train[i] for i in torch.randperm(len(self.train), generator=self.gen).tolist()]

        def update(name: str, parameter: nn.Parameter) -> None:
            self.trainable.mask_gradients([name])
            optimizers[name].step()
            parameter.grad = None

        own, hooks = self.trainable.parameters, contextlib.ExitStack()
        for name, p in own.items() if distributed.ranks() == 1 else ():
            hooks.callback(p.register_post_accumulate_grad_hook(functools.partial(update, name)).remove)
        with hooks:
            self.loss(self.queue.pop()).backward()
        distributed.mean_gradients(own.values())
        for name, p in own.items():
            if p.grad is not None:
                update(name, p)
        if self.progress:
            self.progress()

    def rate_at(self, step: int) -> float:
        """The learning rate at a step, relative to its maximum: linear warm-up, then cosine decay."""
        warm = max(1, round(self.steps * WARM_UP))
        return min((step + 1) / warm, 1) * (0.5 + 0.5 * math.cos(math.pi * min(step / self.steps, 1)))


def mean(loss: Callable[[int], torch.Tensor], batches: Sequence[int]) -> float | None:
    """Mean of loss(i) over the batches i, those of all processes; None if there are none."""
    with torch.no_grad():
        sums = distributed.gathered((sum(float(loss(i)) for i in batches), len(batches)))
    n = sum(n for _, n in sums)
    return sum(total for total, _ in sums) / n if n else None


def distance(block: Block, activations: Activations, targets: list[torch.Tensor]) -> Callable[[int], torch.Tensor]:
    """A block's loss function: loss(i) is Σ ‖block(x) - y‖² / ‖y‖² over Σ ‖y - x‖² / ‖y‖² on batch i, a scalar tensor.

    x, y: one token's activations at the block, and its target; the sums are over the tokens that are not padding.
    targets: (B, T, H) per batch. The division by ‖y‖² makes all tokens count alike: what follows a block first
    normalises each token, and in many models a single token, the first, is a hundred times the others' size and would
    be all that an unweighted loss sees.
    """
    def loss(i: int) -> torch.Tensor:
        out = calibrate.forward(block.module, activations, block.number, i).float()
        Y, X = (t.to(activations.device).float() for t in (targets[i], activations.hidden[i]))
        if activations.rows[i] is not None:
            out, Y, X = (t.reshape(-1, t.shape[-1])[activations.rows[i]] for t in (out, Y, X))
        size = Y.square().sum(-1)
        share = size.where(size > 0, 1.0).reciprocal()
        return ((out - Y).square().sum(-1) * share).sum() / ((Y - X).square().sum(-1) * share).sum()
    return loss
