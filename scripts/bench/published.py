"""SparseGPT and Wanda the published way: the yardstick of `prune.py` and `best.py`. Plain torch, any device.

Structure and order of operations are those of the public repositories, and nothing is slower than there:

    SparseGPT  arXiv 2301.00774, github.com/IST-DASLab/sparsegpt (Apache-2.0) and lib/sparsegpt.py of wanda
    Wanda      arXiv 2306.11695, github.com/locuslab/wanda (MIT): lib/layerwrapper.py, lib/prune.py

One Hessian per LINEAR (q, k and v each gather their own), row-major weights with a Python loop over columns,
two forwards per block, one sample at a time. Kept with their faults: a threshold removes one weight more than
floor(n * s), and n * s is a product of floats. As there, N:M is given as `prune_n` of `prune_m` REMOVED
(`prune_n=0`: unstructured), unlike the rest of this project, where n of m are kept. Left out, being idle in
the runs compared: quantisers, Conv1D and Conv2d (nn.Linear only), given masks, prints. TF32 must be off, as
it is there (and as torch has it by default for matmul).

    W    (R, C)  a linear's weight, rows = outputs       H     (C, C)  mean of 2 x x^T per sequence
    x    (B, T, C) or (T, C)  its input                  Hinv  (C, C)  upper Cholesky factor of H^-1

`seconds` is a dict that every call adds to; its keys sum to the wall time inside `prune_block`:
    forward     the two passes over the samples, the statistics taken out
    statistics  `add_batch`
    factor      SparseGPT: dead inputs, damping and the three Cholesky steps
    columns     SparseGPT: masks, column loop, trailing updates. Wanda: scores, sort, mask, zeroing
    other       the rest: hooks, copies, write-back
On CUDA every measured part begins and ends with a synchronisation (a few per linear and sample).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

PARTS = ("forward", "statistics", "factor", "columns", "other")


@torch.no_grad()
def prune_block(block: nn.Module, inputs: list[torch.Tensor], call: Callable[[nn.Module, torch.Tensor], torch.Tensor],
                method: str, removed: tuple[float, int, int],
                seconds: dict[str, float] | None = None) -> list[torch.Tensor]:
    """Prune every nn.Linear of `block` in place and return the pruned block's outputs: the next one's inputs.

    inputs: samples, (1, T, H) each. call(block, x): runs the block on one of them, with its masks and rotary tables.
    method: "sparsegpt" or "wanda". removed: (sparsity, prune_n, prune_m); sparsity, the share removed, counts where
    prune_n is 0.
    """
    seconds = {} if seconds is None else seconds
    for part in PARTS:
        seconds.setdefault(part, 0.0)
    start, measured = now(inputs[0]), sum(seconds.values())
    pruners = {linear: METHODS[method](linear, seconds) for linear in linears(block)}
    hooks = [linear.register_forward_hook(statistics_hook(p)) for linear, p in pruners.items()]
    forward_all(block, inputs, call, seconds)
    for hook in hooks:
        hook.remove()
    for pruner in pruners.values():
        pruner.fasterprune(*removed)
        pruner.free()
    outputs = forward_all(block, inputs, call, seconds)
    seconds["other"] += now(inputs[0]) - start - (sum(seconds.values()) - measured)
    return outputs


def linears(block: nn.Module) -> list[nn.Linear]:
    """The nn.Linear modules of a block (exactly that class, as in the public `find_layers`)."""
    return [module for module in block.modules() if type(module) is nn.Linear]


def statistics_hook(pruner) -> Callable:
    """A forward hook that hands the linear's input to `pruner`."""
    def hook(module, args, output):
        pruner.add_batch(args[0])
    return hook


def forward_all(block: nn.Module, inputs: list[torch.Tensor], call: Callable, seconds: dict) -> list[torch.Tensor]:
    """Outputs of all samples, run one by one; what hooks spend on statistics is not counted as forward."""
    start, before = now(inputs[0]), seconds["statistics"]
    outputs = [call(block, x) for x in inputs]
    seconds["forward"] += now(inputs[0]) - start - (seconds["statistics"] - before)
    return outputs


class PublishedSparseGPT:
    """SparseGPT of one nn.Linear: `add_batch` per batch, then `fasterprune` once."""

    def __init__(self, layer: nn.Linear, seconds: dict[str, float] | None = None):
        self.layer = layer
        self.seconds = dict.fromkeys(PARTS, 0.0) if seconds is None else seconds
        self.columns = layer.weight.shape[1]
        self.H = torch.zeros(self.columns, self.columns, device=layer.weight.device)
        self.nsamples = 0

    def add_batch(self, x: torch.Tensor) -> None:
        """Running mean over sequences: H = H * n / (n + B) + 2 / (n + B) * X^T X; x (B, T, C) or (T, C)."""
        with timed(self.seconds, "statistics", x):
            batch = 1 if x.dim() == 2 else x.shape[0]
            columns_first = x.reshape(-1, self.columns).t()
            self.H *= self.nsamples / (self.nsamples + batch)
            self.nsamples += batch
            columns_first = math.sqrt(2 / self.nsamples) * columns_first.float()
            self.H += columns_first.matmul(columns_first.t())

    def fasterprune(self, sparsity: float, prune_n: int = 0, prune_m: int = 0, blocksize: int = 128,
                    percdamp: float = 0.01) -> torch.Tensor:
        """Prune the layer in place; returns the error per row, (R,). Uses up H."""
        W = self.layer.weight.data.clone().float()
        with timed(self.seconds, "factor", W):
            Hinv = self.factor(W, percdamp)
        with timed(self.seconds, "columns", W):
            losses = prune_columns(W, Hinv, sparsity, prune_n, prune_m, blocksize)
        self.layer.weight.data = W.to(self.layer.weight.dtype)
        return losses

    def factor(self, W: torch.Tensor, percdamp: float) -> torch.Tensor:
        """Hinv (C, C); zeroes the columns of W whose input is dead. H is given up on the way."""
        H, self.H = self.H, None
        dead = torch.diag(H) == 0
        H[dead, dead] = 1
        W[:, dead] = 0
        diag = torch.arange(self.columns, device=H.device)
        H[diag, diag] += percdamp * torch.mean(torch.diag(H))
        H = torch.linalg.cholesky(H)
        H = torch.cholesky_inverse(H)
        return torch.linalg.cholesky(H, upper=True)

    def free(self) -> None:
        """Drop the Hessian."""
        self.H = None


def prune_columns(W: torch.Tensor, Hinv: torch.Tensor, sparsity: float, prune_n: int, prune_m: int,
                  blocksize: int) -> torch.Tensor:
    """Prune W (R, C) in place, block of columns by block, the rest updated after each; losses (R,)."""
    losses = torch.zeros(W.shape[0], device=W.device)
    for i1 in range(0, W.shape[1], blocksize):
        i2 = min(i1 + blocksize, W.shape[1])
        W1, Hinv1 = W[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
        mask1 = torch.zeros_like(W1) == 1 if prune_n else threshold_mask(W1, Hinv1, sparsity)
        Q1, Err1, losses1 = prune_within_block(W1, Hinv1, mask1, prune_n, prune_m)
        W[:, i1:i2] = Q1
        losses += torch.sum(losses1, 1) / 2
        W[:, i2:] -= Err1.matmul(Hinv[i1:i2, i2:])
    return losses


def threshold_mask(W1: torch.Tensor, Hinv1: torch.Tensor, sparsity: float) -> torch.Tensor:
    """True = removed: all scores up to that of rank int(n * s), counted from 0: one more than int(n * s)."""
    score = saliency(W1, Hinv1)
    threshold = torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
    return score <= threshold


def saliency(W1: torch.Tensor, Hinv1: torch.Tensor) -> torch.Tensor:
    """(R, columns) w^2 / Hinv_jj^2."""
    return W1**2 / torch.diag(Hinv1).reshape(1, -1) ** 2


def prune_within_block(W1: torch.Tensor, Hinv1: torch.Tensor, mask1: torch.Tensor, prune_n: int,
                       prune_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The column loop; changes W1 and, for N:M, fills mask1. Returns Q1, Err1, losses1 (R, columns)."""
    Q1, Err1, losses1 = torch.zeros_like(W1), torch.zeros_like(W1), torch.zeros_like(W1)
    for i in range(W1.shape[1]):
        w, d = W1[:, i], Hinv1[i, i]
        if prune_n and i % prune_m == 0:
            group = slice(i, i + prune_m)
            lowest = torch.topk(saliency(W1[:, group], Hinv1[group, group]), prune_n, dim=1, largest=False)[1]
            mask1.scatter_(1, i + lowest, True)
        q = w.clone()
        q[mask1[:, i]] = 0
        Q1[:, i] = q
        losses1[:, i] = (w - q) ** 2 / d**2
        err1 = (w - q) / d
        W1[:, i:] -= err1.unsqueeze(1).matmul(Hinv1[i, i:].unsqueeze(0))
        Err1[:, i] = err1
    return Q1, Err1, losses1


class PublishedWanda:
    """Wanda of one nn.Linear, with SparseGPT's two calls."""

    def __init__(self, layer: nn.Linear, seconds: dict[str, float] | None = None):
        self.layer = layer
        self.seconds = dict.fromkeys(PARTS, 0.0) if seconds is None else seconds
        self.columns = layer.weight.shape[1]
        self.scaler_row = torch.zeros(self.columns, device=layer.weight.device)
        self.nsamples = 0

    def add_batch(self, x: torch.Tensor) -> None:
        """Running mean over sequences of each input's squared norm, over x (B, T, C) or (T, C)."""
        with timed(self.seconds, "statistics", x):
            batch = 1 if x.dim() == 2 else x.shape[0]
            columns_first = x.reshape(-1, self.columns).t()
            self.scaler_row *= self.nsamples / (self.nsamples + batch)
            self.nsamples += batch
            self.scaler_row += torch.norm(columns_first.float(), p=2, dim=1) ** 2 / self.nsamples

    def fasterprune(self, sparsity: float, prune_n: int = 0, prune_m: int = 0) -> None:
        """Zero the lowest |w| * norm of every row (or of every group of prune_m), in place."""
        with timed(self.seconds, "columns", self.scaler_row):
            metric = torch.abs(self.layer.weight.data) * torch.sqrt(self.scaler_row.reshape(1, -1))
            mask = torch.zeros_like(metric) == 1
            if prune_n:
                for i in range(0, self.columns, prune_m):
                    lowest = torch.topk(metric[:, i:i + prune_m].float(), prune_n, dim=1, largest=False)[1]
                    mask.scatter_(1, i + lowest, True)
            else:
                order = torch.sort(metric, dim=-1, stable=True)[1]
                mask.scatter_(1, order[:, :int(self.columns * sparsity)], True)
            self.layer.weight.data[mask] = 0

    def free(self) -> None:
        """Drop the norms."""
        self.scaler_row = None


METHODS = {"sparsegpt": PublishedSparseGPT, "wanda": PublishedWanda}


@contextmanager
def timed(seconds: dict[str, float], part: str, tensor: torch.Tensor) -> Iterator[None]:
    """Add the wall time of the body to seconds[part], synchronised with the tensor's device."""
    start = now(tensor)
    yield
    seconds[part] += now(tensor) - start


def now(tensor: torch.Tensor) -> float:
    """Seconds on the wall clock once the tensor's device has finished what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
