"""Perplexity as in the pruning papers: exp of the mean loss over the predicted tokens of non-overlapping windows.

A perplexity is meaningless without the length of its windows, so that is recorded with it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..data import Tokens
from ..data.choose import check_least
from ..runtime.flag import Settings, flag, listed
from . import Found, Subject
from .losses import predicted, token_losses


@dataclass(frozen=True)
class Config:
    evaluate: str = flag("builtin", "texts to measure perplexity on, as for --calibration, separated by commas; "
                                    "NAME=FILE names one; none: skip", section="evaluation", bears_on="measuring")
    robustness: bool = flag(False, "also measure perplexity with typos, other case and other white space",
                            section="evaluation", bears_on="measuring")
    eval_seqlen: int | None = flag(None, "tokens per evaluation window (default: --seqlen)", section="evaluation",
                                   bears_on="measuring")
    eval_windows: int | None = flag(None, "maximum number of windows of each text", section="evaluation",
                                    bears_on="measuring")
    eval_batch_size: int | None = flag(None, "windows per batch (default: --batch-size)", section="evaluation",
                                       bears_on="measuring")

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        check_least(self, {"eval_seqlen": 2, "eval_windows": 1, "eval_batch_size": 1})

    @property
    def evaluations(self) -> list[str]:
        """The texts to measure perplexity on."""
        return listed(self.evaluate)


def asked(cfg: Settings) -> bool:
    """Whether there is a text to evaluate on."""
    return bool(cfg.evaluations)


def identity(cfg: Settings, texts: dict[str, Tokens]) -> list[str]:
    """The hash of every text's windows."""
    return [tokens.sha256 for tokens in texts.values()]


def measure(subject: Subject) -> Found:
    """NAME/ppl of every text; taken from the comparison with the dense model if there is one."""
    found = Found()
    for name, tokens in subject.texts.items():
        if name in subject.beside_dense:
            losses = subject.compare(name).loss
        else:
            losses = token_losses(subject.model, tokens.ids, tokens.mask, **subject.options,
                                  progress=subject.bar(name))
        value, n = of_losses(losses, tokens.mask)
        found.metrics[f"{name}/ppl"] = value
        found.info[f"{name}/ppl"] = {"window": tokens.ids.shape[1], "windows": len(tokens.ids), "tokens": n,
                                     "by_window": by_window(losses, tokens.mask)}
    return found


def by_window(losses: torch.Tensor, mask: torch.Tensor | None = None) -> list[float]:
    """The mean loss of each window that predicts any token, nats: what two models can be compared by, in pairs."""
    counts = torch.full((len(losses),), losses.shape[1]) if mask is None else predicted(mask).sum(1)
    return [round(x, 6) for x in (losses.double().sum(1) / counts)[counts > 0].tolist()]


def perplexity(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None,
               **options: Any) -> tuple[float, int]:
    """(perplexity, number of predicted tokens) on ids int64 (n, T), mask bool (n, T) or None; inf beyond exp(700).

    options: batch_size, device, progress, as for `losses.token_losses`.
    """
    return of_losses(token_losses(model, ids, mask, **options), mask)


def of_losses(losses: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[float, int]:
    """(perplexity, number of predicted tokens) from the result of `token_losses` (n, T-1) and the same mask."""
    n = losses.numel() if mask is None else int(predicted(mask).sum())
    mean = (losses.double().sum() / n).item()
    return (math.exp(mean) if mean < 700 else math.inf), n
