"""Fold: put the linear map that best makes up for what was removed into a block's last linear (ReplaceMe, 2505.02819).

    h       input of the linear by which a block writes into the hidden state last (down_proj), (N, C), K its columns
            that are not zero
    D       the dense model's hidden state after the block, and after all blocks dropped behind it, (N, H)
    R       D - block(x), what the pruned block misses of it
    w       1 / ‖D_t‖², the weight of a token

    ΔW_K = (Rᵀ diag(w) h_K / N) (h_Kᵀ diag(w) h_K / N + μI)⁻¹

No parameter is added, nothing is trained step by step. μ is the one of RIDGES (shares of the mean diagonal) with the
least error on the held-out windows; where none lowers it, or no window is held out, nothing is changed. Where the zeros
are not whole columns, each row is solved on its own kept weights by conjugate gradients; while a model is made smaller,
single zeros (4-bit grids have many) are weights like any other. It needs a linear that is not an expert, and whose
output is added to the hidden state as it is (without a norm in between); any other block is left as it was, and the
record says so.
"""

from dataclasses import dataclass

import torch

from .. import calibrate, models
from ..calibrate import Activations
from ..models import Block, Weight, groups
from ..prune import cholesky
from ..runtime import distributed
from ..runtime.flag import flag
from . import Heal as Base

RIDGES = (0.03, 0.3, 3.0, 30.0)
STEPS = 50  # of conjugate gradients


@dataclass(frozen=True)
class Config:
    everywhere: bool = flag(True, "fold in every block, not only before those that were dropped")


class Heal(Base):
    """Folding at work in one run, see above."""

    skips: frozenset[int] = frozenset()  # numbers of the blocks that are dropped
    columns = False  # whether only whole columns are pruned: a single zero is then a weight like any other

    def __init__(self, cfg: "Config", seed: int = 0, progress: bool = False) -> None:
        super().__init__(cfg, seed, progress)
        self.plain: dict[int, bool] = {}  # {number of a block: whether it `writes_plainly`}, which no cut changes

    def after_block(self, block: Block, activations: Activations, targets: list[torch.Tensor]) -> dict | None:
        """Fold what is missing of `targets` into the block's last linear; returns plain values for the record."""
        if not self.cfg.everywhere and block.number + 1 not in self.skips:
            return None
        weight = last_linear(block)
        if weight is None:
            return nothing("it has no single linear that writes last")
        with torch.no_grad():
            W = weight.get()
            kept = W.any(0)
            if not any(distributed.gathered(any(activations.held))):
                return nothing("no window is held out (--nsamples)")
            if block.number not in self.plain:
                self.plain[block.number] = distributed.first(writes_plainly(block, weight, activations))
            if not self.plain[block.number]:
                return nothing(f"the output of {weight.linear} is not added to the hidden state as it is")
            train, held = sums(block, weight, kept, activations, targets)
            best, change = choose(train, held, (W[:, kept] != 0) | self.columns)
            before, after = held.missing, held.missing + (best or 0.0)
            if change is not None:
                W = W.clone()
                W[:, kept] += change[0]
                weight.set(W)
        return {"linear": weight.linear, "ridge": change[1] if change else 0.0, "held_out_before": before,
                "held_out_after": after, "warnings": []}


def nothing(why: str) -> dict:
    """The record of a block that was left as it was."""
    return {"ridge": 0.0, "warnings": [f"not folded: {why}"]}


def last_linear(block: Block) -> Weight | None:
    """The consumer of the block's last neurons; None for experts, of which each token sees others."""
    own = {w.linear: w for w in block.weights}
    found = [w.consumer for w in groups.widths(block.module) if w.kind == groups.NEURONS]
    return own.get(found[0]) if len(found) == 1 else None


class Sums:
    """Weighted sums over the tokens of some windows, float64: of h hᵀ, of R hᵀ, and of ‖R‖²; see above."""

    def __init__(self, C: int, H: int, device: torch.device) -> None:
        self.n, self.missing = 0, 0.0
        self.G = torch.zeros(C, C, dtype=torch.float64, device=device)
        self.B = torch.zeros(H, C, dtype=torch.float64, device=device)

    def add(self, h: torch.Tensor, R: torch.Tensor, w: torch.Tensor) -> None:
        """Take in h (N, C), R (N, H), w (N,)."""
        root = w.sqrt().unsqueeze(1)
        h, R = h * root, R * root
        self.n += len(h)
        self.G += h.T @ h
        self.B += R.T @ h
        self.missing += float(R.square().sum())


def sums(block: Block, weight: Weight, kept: torch.Tensor, activations: Activations,
         targets: list[torch.Tensor]) -> tuple[Sums, Sums]:
    """(of the other windows, of the held-out ones), divided by their numbers of tokens."""
    C, H = int(kept.sum()), weight.shape[0]
    both = [Sums(C, H, activations.device) for _ in range(2)]
    for i, held in enumerate(activations.held):
        out, h = with_input(block, weight, activations, i)
        D = targets[i].to(activations.device).float()
        h, out, D = (t.reshape(-1, t.shape[-1]) for t in (h, out, D))
        if activations.rows[i] is not None:
            h, out, D = (t[activations.rows[i]] for t in (h, out, D))
        w = 1 / D.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        both[held].add(h[:, kept], D - out, w)
    for part in both:
        distributed.add(part.G, part.B)
        part.n = sum(distributed.gathered(part.n))
        part.missing = sum(distributed.gathered(part.missing))
        part.G /= part.n
        part.B /= part.n
        part.missing /= part.n
    return both[0], both[1]


def with_input(block: Block, weight: Weight, activations: Activations, i: int,
               silenced: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(the block's output on batch i (B, T, H), the linear's input). silenced: the linear returns zeros instead."""
    seen = []

    def look(_, args, out):
        seen.append(args[0])
        return torch.zeros_like(out) if silenced else out
    handle = weight.owner.register_forward_hook(look)
    try:
        out = calibrate.forward(block.module, activations, block.number, i).float()
    finally:
        handle.remove()
    return out, seen[-1].float()


def writes_plainly(block: Block, weight: Weight, activations: Activations) -> bool:
    """Whether the block's output is that without the linear, plus the linear's own output, in float32."""
    with models.resident(block.module, activations.device, dtype=torch.float32):
        out, h = with_input(block, weight, activations, 0)
        without, _ = with_input(block, weight, activations, 0, silenced=True)
        own = weight.owner(h)
    return bool((out - without - own).norm() <= 1e-3 * own.norm() + 1e-5 * out.norm())


def choose(train: Sums, held: Sums, mask: torch.Tensor) -> tuple[float | None, tuple[torch.Tensor, float] | None]:
    """(change of the held-out error, (ΔW_K (H, C) float32, ridge)); Nones where no ridge lowers it.

    mask: bool (H, C), the weights that are not zero.
    """
    best, found = None, None
    mean = train.G.diagonal().mean()
    for ridge in RIDGES:
        A = train.G.clone()
        A.diagonal().add_(ridge * mean)
        if not (factor := cholesky.factor(A)):
            continue
        change = factor.solve(train.B) if bool(mask.all()) else on_mask(A, train.B, mask)
        gain = float(((change @ held.G) * change).sum() - 2 * (change * held.B).sum())
        if gain < (best or 0.0):
            best, found = gain, (change.float(), ridge)
    return best, found


def on_mask(A: torch.Tensor, B: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """X (H, C), zero off the mask, that minimises tr(X A Xᵀ) - 2 tr(X Bᵀ) row by row, by conjugate gradients."""
    X, keep = torch.zeros_like(B), mask.to(B)
    r = B * keep
    P, rr = r.clone(), r.square().sum(1)
    for _ in range(STEPS):
        AP = (P @ A) * keep
        curvature = (P * AP).sum(1)
        a = torch.where(curvature > 0, rr / curvature, 0).unsqueeze(1)
        X += a * P
        r = r - a * AP
        rr, last = r.square().sum(1), rr
        P = r + torch.where(last > 0, rr / last, 0).unsqueeze(1) * P
    return X
