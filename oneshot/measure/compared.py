"""Run the pruned and the dense model on the same windows and compare them token by token, for `divergence` and
`damage`.

Both models run block by block, and at any time only one slice of one batch's logits of each is in memory.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .. import calibrate, models
from ..calibrate import Activations
from ..data.windows import digest
from ..runtime import products
from .losses import GROUP_BYTES, at_head, block_bar, groups, head_steps, in_cache, predicted, through_blocks

KEPT = 2**30  # bytes of the dense model's hidden states that are kept from one comparison to the next
SLICE = 2**23  # logits of each model at a time; on a GPU in float64 and with their softmaxes these take 256 MiB
_kept: WeakKeyDictionary[nn.Module, dict[tuple, Activations]] = WeakKeyDictionary()


@dataclass
class Compared:
    """Values of every predicted token, each (n, T-1): a row per window, a column per token; 0 or False at padding.

    loss, dense_loss: float32, nats. kl: KL(dense ‖ pruned), float32, nats. agree: bool, both models have the same top-1
    token. right, dense_right: bool, the model's top-1 token is the text's. real: bool, False at padding.
    """

    loss: torch.Tensor
    dense_loss: torch.Tensor
    kl: torch.Tensor
    agree: torch.Tensor
    right: torch.Tensor
    dense_right: torch.Tensor
    real: torch.Tensor


@torch.no_grad()
def compare(model: nn.Module, dense: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None, *,
            batch_size: int = 8, device: str = "cpu", progress: str | None = None) -> Compared:
    """Compare two models with the same vocabulary on ids int64 (n, T) and mask bool (n, T) or None.

    batch_size: windows per batch. device: where blocks run. progress: label of a bar over the blocks of both, or None.

    Raises ValueError when both are the same object, which cannot be dense and pruned at once.
    """
    if model is dense:
        raise ValueError("dense: is the pruned model itself; load it a second time")
    parts, batches = groups(model, ids, batch_size, GROUP_BYTES // 2), []
    with products.float32(), block_bar([model, dense], parts, progress) as bar:
        for part in parts:
            own = ids[part], None if mask is None else mask[part], batch_size, device, bar
            both = (model, through_blocks(model, *own)), (dense, states(dense, *own))
            with at_head(model, device), at_head(dense, device):
                batches += [compare_batch(*both, i) for i in head_steps([model, dense], len(both[0][1]), bar)]
    real = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else predicted(mask)
    return Compared(*(torch.cat(t).where(real, torch.zeros((), dtype=t[0].dtype))
                      for t in zip(*batches, strict=True)), real)


def constant(model: nn.Module) -> None:
    """Say that a model will not change, so that its states after the blocks may be kept for the next comparison."""
    _kept.setdefault(model, {})


def states(dense: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, batch_size: int, device: str,
           bar: tqdm) -> Activations:
    """As `through_blocks`, of which the results are kept for a `constant` model, up to KEPT bytes in all."""
    kept = _kept.get(dense)
    if kept is None:
        return through_blocks(dense, ids, mask, batch_size, device, bar)
    key = digest(ids, mask), batch_size, device
    if key in kept:
        bar.update(len(models.blocks(dense)[1]))
        return kept[key].fork()
    found = through_blocks(dense, ids, mask, batch_size, device, bar)
    size = sum(h.nbytes for own in (found, *kept.values()) for h in own.hidden)
    if size <= KEPT:
        kept[key] = found.fork()
    return found


def compare_batch(pruned: tuple[nn.Module, Activations], dense: tuple[nn.Module, Activations],
                  i: int) -> list[torch.Tensor]:
    """All fields of Compared but `real`, for batch i, (B, T-1) on the CPU. pruned, dense: (model, its Activations)."""
    targets = pruned[1].inputs[i]["input_ids"][:, 1:]
    out = [torch.zeros(targets.shape, dtype=dtype) for dtype in (torch.float32,) * 3 + (torch.bool,) * 3]
    both = (calibrate.logits(*side, i, elements=SLICE) for side in (pruned, dense))
    for (positions, q), (_, p) in zip(*both, strict=True):  # strict: both are exhausted and so restore their blocks
        positions = positions[positions < targets.shape[1]]  # the last position predicts nothing
        q, p, target = q[:, : len(positions)], p[:, : len(positions)], targets[:, positions]
        for whole, part in zip(out, compare_logits(q, p, target), strict=True):
            whole[:, positions.cpu()] = part.cpu()
    return out


def compare_logits(q: torch.Tensor, p: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(loss, dense loss, KL, agree, right, dense right), each (B, P); see Compared.

    q, p: logits (B, P, V) of the pruned and the dense model. target: ids (B, P).
    """
    rows = (in_cache(t.flatten(0, 1), q) for t in (q, p, target))
    parts = zip(*(_compare(*part) for part in zip(*rows, strict=True)), strict=True)
    return tuple(torch.cat(field).view(target.shape) for field in parts)


def _compare(q: torch.Tensor, p: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`compare_logits` of rows: q, p (n, V), target (n,)."""
    q, p = q.float(), p.float()
    loss, dense_loss = (cross_entropy(x, target, reduction="none") for x in (q, p))
    top, dense_top = q.argmax(-1), p.argmax(-1)
    q, p = q.double().log_softmax(-1), p.double().log_softmax(-1)  # a KL below 1e-6 would be lost in float32
    kl = (p.exp() * (p - q)).sum(-1).float()
    return loss, dense_loss, kl, top == dense_top, top == target, dense_top == target


def mean_over_windows(values: torch.Tensor, member: torch.Tensor) -> tuple[float, float | None]:
    """(mean, standard error) of values (n, T-1) where member, bool (n, T-1), is True.

    Tokens of one window are correlated, so the windows are taken as the sample, and the standard error is that of a
    ratio of two sums over windows (Cochran, Sampling Techniques, 1977, section 6.4); None for fewer than two windows.
    """
    sums, counts = values.double().where(member, 0.0).sum(1), member.sum(1).double()
    sums, counts = sums[counts > 0], counts[counts > 0]
    n, W = counts.sum(), len(counts)
    mean = sums.sum() / n
    spread = (sums - mean * counts).square().sum() * (W / max(1, W - 1))
    return mean.item(), (spread.sqrt() / n).item() if W > 1 else None
