"""Losses of healing on text, nats, mean over the predicted tokens.

    next     cross-entropy of the next token
    kl       KL(dense ‖ pruned) of the next token's distribution at temperature t, times t² (arXiv 1503.02531)
    hidden   Σ over the blocks of ‖h - h'‖² / ‖h‖² of their outputs, mean over tokens and blocks (SquareHead, arXiv
             2310.06927, for each token by itself, since one token can be a hundred times the others' size)

Several are added. `TopK` is the dense model's k most likely tokens: kl then counts these and, as one event, all others.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from .. import sliced

LEAST = 1e-8  # probability of all other tokens, at least, so that its logarithm exists


@dataclass(frozen=True)
class TopK:
    """The dense model's most likely tokens. log_p: (B, T, k), at the temperature of the loss. ids: int64 (B, T, k)."""

    log_p: torch.Tensor
    ids: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float = 1.0) -> "TopK":
        """The k most likely tokens of logits (B, T, V)."""
        found = (logits.float() / temperature).log_softmax(-1).topk(min(k, logits.shape[-1]), -1)
        return cls(found.values, found.indices)


def next_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, T, V) for labels (B, T), each predicted by the position before; -100: not counted."""
    after = following(labels).flatten()
    return sliced.mean(lambda z, part: cross_entropy(z, after[part], reduction="none"), logits,
                       (after != -100).nonzero()[:, 0])


def following(labels: torch.Tensor) -> torch.Tensor:
    """The label that each position of labels (B, T) predicts; -100 for the last of a window."""
    return torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), -100)), 1)


def kl(logits: torch.Tensor, teacher: torch.Tensor | TopK, labels: torch.Tensor,
       temperature: float = 1.0) -> torch.Tensor:
    """KL of logits (B, T, V) from the teacher's logits (B, T, V), or its TopK, where a label follows."""
    rows = (following(labels).flatten() != -100).nonzero()[:, 0]
    if isinstance(teacher, TopK):
        log_p, ids = teacher.log_p.flatten(0, 1), teacher.ids.flatten(0, 1)

        def some(z: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            return temperature**2 * _top(sliced.log_softmax(z, temperature), log_p[part].float(), ids[part])
    else:
        dense = teacher.flatten(0, 1)

        def some(z: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
            return temperature**2 * sliced.divergence(z, dense[part].to(z), temperature)
    return sliced.mean(some, logits, rows)


def _top(ours: torch.Tensor, log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(n,) KL over k tokens and the rest as one event. ours: (n, V) log-probabilities. log_p, ids: (n, k)."""
    log_q = ours.gather(-1, ids)
    found = (log_p.exp() * (log_p - log_q)).sum(-1)
    if ids.shape[-1] == ours.shape[-1]:
        return found
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp(min=LEAST) for log in (log_p, log_q))
    return found + rest_p * (rest_p.log() - rest_q.log())


def hidden(ours: tuple[torch.Tensor, ...], dense: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The distance of the blocks' outputs, each (B, T, H), the first of them the embedding, which is left out."""
    if len(ours) != len(dense):
        raise ValueError(f"--heal-loss hidden: the dense model has {len(dense) - 1} blocks and this one "
                         f"{len(ours) - 1}; use kl")
    each = [((h.float() - d.float()).square().sum(-1) / d.float().square().sum(-1).clamp(min=1e-12)).mean()
            for h, d in zip(ours[1:], dense[1:], strict=True)]
    return torch.stack(each).mean()
