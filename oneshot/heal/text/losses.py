"""Losses of healing on text, nats, mean over the predicted tokens.

    next     cross-entropy of the next token
    kl       KL(dense ‖ pruned) of the next token's distribution at temperature t, times t² (arXiv 1503.02531)
    hidden   Σ over the blocks of ‖h - h'‖² / ‖h‖² of their outputs, mean over tokens and blocks (SquareHead, arXiv
             2310.06927, for each token by itself, since one token can be a hundred times the others' size)

Several are added. `TopK` is the dense model's k most likely tokens: kl then counts these and, as one event, all others.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, kl_div

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
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def kl(logits: torch.Tensor, teacher: torch.Tensor | TopK, labels: torch.Tensor,
       temperature: float = 1.0) -> torch.Tensor:
    """KL of logits (B, T, V) from the teacher's logits (B, T, V), or its TopK, where a label follows."""
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != -100
    ours = (logits[counts].float() / temperature).log_softmax(-1)
    if isinstance(teacher, TopK):
        return temperature**2 * _top(ours, teacher.log_p[counts].float(), teacher.ids[counts]).mean()
    dense = (teacher[counts].float() / temperature).log_softmax(-1)
    return temperature**2 * kl_div(ours, dense, reduction="none", log_target=True).sum(-1).mean()


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
