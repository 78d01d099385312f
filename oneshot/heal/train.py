"""Recovery: ways to repair a pruned model without losing a zero. One file, one way; its name is the `--recover` name.

A way is a module with

    Config      a frozen dataclass: its flags, with `metadata={"help": ...}` each
    check_model (model, cfg, device): raise ValueError naming the flag where the model or the device does not allow it
    repair      what run.py calls; block.py: for each block, around its pruning, through the loop; distil.py: for the
                whole pruned model at the end. Ends in plain values for the record.

Every way trains the weights that pruning kept, with their mask fixed: a weight that is zero stays zero, bit by bit.
What is trained lives in float32 and is rounded to the stored dtype at the end. The calibration windows are all the
data. A tenth of the windows, rounded up, is held out: drawn once a run by its seed, in batches of its own, the same for
every block and every way, so none judges by windows that another has trained on (solvers and their statistics do see
them). What did best there is kept, so, but for that rounding, no repair makes its own held-out loss worse. A run with
one window holds out nothing, keeps the last state and warns.

    steps   updates, one batch of windows each
    lr      learning rate as a share of each tensor's root mean square: absolute rates do not carry over between models
"""

import importlib
import math
import pkgutil

import torch

SHARE = 10  # one window in so many is held out
WARM_UP = 0.05  # of the steps
VECTORS = 0.1  # norms and biases move slower: at the matrices' rate they undid in 12 steps what 12 more could not mend
BETAS = (0.9, 0.95)
LOOKS = 8  # how often the held-out batches are looked at
ATTEMPTS, FALL = 3, 4


def names():
    """All `--recover` ways there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module(name):
    """The module of one way. Raises ValueError naming `--recover` when there is none."""
    if name not in names():
        raise ValueError(f"--recover {name}: no such way; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def check(cfg, name):
    """Refuse settings that no way can use."""
    if cfg.steps < 1:
        raise ValueError(f"--{name}.steps {cfg.steps}: must be at least 1")
    if not 0 < cfg.lr < 1:
        raise ValueError(f"--{name}.lr {cfg.lr:g}: must lie between 0 and 1")


class Trainable:
    """The parameters of a module that may change: matrices where they are not zero, and all vectors (norms, biases).

    parameters: name -> nn.Parameter of `module`. stored: {name: dtype it will be saved in}. leave: names of matrices
    that are never pruned, so never touched (routers, embeddings).
    """

    def __init__(self, module, stored, leave=()):
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
            assert not self.parameters[name].data[~mask].any(), f"{name}: a pruned weight came back"

    def groups(self, lr):
        """Adam's parameter groups: each tensor its own rate. A bias that is all zero takes the matrices' scale."""
        sizes = {name: rms(p.data, self.masks.get(name)) for name, p in self.parameters.items()}
        matrices = [sizes[name] for name in self.masks if sizes[name]]
        usual = sum(matrices) / len(matrices) if matrices else 1.0
        return [{"params": [p], "lr": lr * (sizes[name] or usual) * (1 if p.ndim > 1 else VECTORS)}
                for name, p in self.parameters.items()]

    def mask_gradients(self):
        """Zero gradients keep Adam's averages, and so the weights, at exactly zero."""
        for name, mask in self.masks.items():
            if self.parameters[name].grad is not None:  # an expert without tokens has none
                self.parameters[name].grad.mul_(mask)

    def snapshot(self):
        """A copy in CPU memory: it is seldom needed, and a device has none to spare."""
        return {name: p.data.to("cpu", copy=True) for name, p in self.parameters.items()}

    def restore(self, snapshot):
        for name, p in self.parameters.items():
            p.data.copy_(snapshot[name])


def rms(t, mask=None):
    """Root mean square of what may change."""
    n = t.numel() if mask is None else int(mask.count_nonzero())
    return float(torch.linalg.vector_norm(t) / max(n, 1) ** 0.5)


def held_out_windows(n, seed):
    """Numbers of the windows, of n, that no repair of a run trains on: a tenth, rounded up; none of a single one."""
    count = -(-n // SHARE) if n > 1 else 0
    return tuple(sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist()))


def fit(trainable, loss, held, *, steps, lr, seed, progress=None):
    """Adam with warm-up and cosine on the mean of loss(i) over the batches i; plain values for the record.

    loss(i): a scalar tensor for batch i. held: one bool a batch, whether it is held out. The state that does best on
    those is kept, and training ends early when twice in a row it got worse. Where nothing was gained at all, the rate
    was too high for this model: it is divided by FALL and all begins anew. seed: of the batches' order. progress():
    called every step.
    """
    gen = torch.Generator().manual_seed(seed)
    train, held = ([i for i, apart in enumerate(held) if apart == kind] for kind in (False, True))
    before, start, warnings = mean(loss, held), trainable.snapshot(), []
    for attempt in range(ATTEMPTS):
        rate = lr / FALL**attempt
        done, best = descend(trainable, loss, train, held, steps=steps, lr=rate, gen=gen, before=before, state=start,
                             progress=progress)
        if not held or best < before:
            break
    if attempt:
        warnings.append(f"learning rate lowered from {lr:g} to {rate:g}" if best < before else
                        f"nothing gained at learning rates from {lr:g} down to {rate:g}: left as it was")
    if not held:
        warnings.append("one window only: nothing held out, no early stop; raise --nsamples")
    return {"steps": done, "lr": rate, "held_out_before": before, "held_out_after": best, "warnings": warnings}


@torch.enable_grad()
def descend(trainable, loss, train, held, *, steps, lr, gen, before, state, progress):
    """One training; leaves the best state on `held` in place. Returns (steps done, its held-out loss)."""
    optimizer = torch.optim.Adam(trainable.groups(lr), betas=BETAS, foreach=True)
    warm = max(1, round(steps * WARM_UP))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / warm, 1) * (
        0.5 + 0.5 * math.cos(math.pi * min(t / steps, 1))))
    best, worse, queue, done = before, 0, [], 0
    for done in range(1, steps + 1):
        queue = queue or [train[i] for i in torch.randperm(len(train), generator=gen).tolist()]
        optimizer.zero_grad(set_to_none=True)
        loss(queue.pop()).backward()
        trainable.mask_gradients()
        optimizer.step()
        schedule.step()
        if progress:
            progress()
        if held and (done % max(1, steps // LOOKS) == 0 or done == steps):
            now = mean(loss, held)
            best, state, worse = (now, trainable.snapshot(), 0) if now < best else (best, state, worse + 1)
            if worse == 2:
                break
    if held:
        trainable.restore(state)
    return done, best


def mean(loss, batches):
    """Mean loss over batches, a float; None of nothing."""
    with torch.no_grad():
        return sum(float(loss(i)) for i in batches) / len(batches) if batches else None
