"""Perplexity as in the pruning papers: non-overlapping windows, exp of the mean loss over predicted tokens.

A number means nothing without its window, so the window is returned with it.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..data.choose import check_least
from ..runtime.flag import flag, listed
from . import Found, Subject
from .losses import predicted, token_losses


@dataclass(frozen=True)
class Config:
    evaluate: str = flag("builtin", "texts to measure perplexity on, as for --calibration, separated by commas; "
                                    "NAME=FILE gives one a name; none: skip", section="evaluation",
                         bears_on="measuring")
    robustness: bool = flag(False, "measure perplexity with typos, other case and other white space as well",
                            section="evaluation", bears_on="measuring")
    eval_seqlen: int | None = flag(None, "window of the evaluation (default: --seqlen)", section="evaluation",
                                   bears_on="measuring")
    eval_windows: int | None = flag(None, "measure on at most so many windows of each text", section="evaluation",
                                    bears_on="measuring")
    eval_batch_size: int | None = flag(None, "windows at a time (default: --batch-size)", section="evaluation",
                                       bears_on="measuring")

    def check(self):
        """Raise ValueError naming the flag whose value cannot be used."""
        check_least(self, {"eval_seqlen": 2, "eval_windows": 1, "eval_batch_size": 1})

    @property
    def evaluations(self) -> list[str]:
        """The texts to measure perplexity on."""
        return listed(self.evaluate)


def asked(cfg) -> bool:
    """Whether there is a text."""
    return bool(cfg.evaluations)


def identity(cfg, texts) -> list[str]:
    """The hash of every text's windows."""
    return [tokens.sha256 for tokens in texts.values()]


def measure(subject: Subject) -> Found:
    """NAME/ppl of every text; from the comparison with the dense model where there is one."""
    found = Found()
    for name, tokens in subject.texts.items():
        if name in subject.beside_dense:
            losses = subject.compare(name).loss
        else:
            losses = token_losses(subject.model, tokens.ids, tokens.mask, **subject.options,
                                  progress=subject.bar(name))
        value, n = of_losses(losses, tokens.mask)
        found.metrics[f"{name}/ppl"] = value
        found.info[f"{name}/ppl"] = {"window": tokens.ids.shape[1], "windows": len(tokens.ids), "tokens": n}
    return found


def perplexity(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None,
               **options) -> tuple[float, int]:
    """(perplexity, predicted tokens); inf when the model has broken down."""
    return of_losses(token_losses(model, ids, mask, **options), mask)


def of_losses(losses: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[float, int]:
    """(perplexity, predicted tokens) of what `token_losses` gives."""
    n = losses.numel() if mask is None else int(predicted(mask).sum())
    mean = (losses.double().sum() / n).item()
    return (math.exp(mean) if mean < 700 else math.inf), n
