"""Divergence: how far the pruned model's predictions have moved from the dense model's, token by token.

Perplexity depends on one outcome per position, so two models of equal perplexity may answer differently. Here whole
distributions and decisions are compared (KL and flips as in arXiv 2407.09141):

    p, q     the dense and the pruned model's distribution over the next token
    KL       sum_v p(v) (ln p(v) - ln q(v)), nats; exactly 0 where both agree
    top-1    the most likely token
    right    the text continues with the top-1 token
    flips    positions where exactly one of the two models is right
"""

import math
from dataclasses import dataclass

from ..runtime.flag import Settings, flag
from . import Found, Subject, needs_text
from .compared import Compared, mean_over_windows

compares = True
higher = ("top1_agreement",)


@dataclass(frozen=True)
class Config:
    divergence: bool = flag(False, "compare each token's prediction with the dense model's: KL, top-1, flips",
                            section="evaluation", bears_on="measuring", rows=("pruned", "rounded"))


def asked(cfg: Settings) -> bool:
    """Whether the flag is set."""
    return cfg.divergence


def refuse(cfg: Settings) -> None:
    """Raise ValueError naming `--divergence` if there is no text to compare on."""
    needs_text(cfg, "--divergence")


def measure(subject: Subject) -> Found:
    """The `metrics` of every text."""
    found = Found()
    for name in subject.beside_dense:
        found.add(Found(*metrics(subject.compare(name), name)))
    return found


def metrics(compared: Compared, name: str) -> tuple[dict[str, float], dict[str, dict]]:
    """({"NAME/kl": value, ...}, {"NAME/kl": how it was measured, ...}) of the text `name`.

    kl: mean in nats per token; its info holds the standard error over windows. kl_p99: the 99 % quantile of the KL.
    top1_agreement: share of positions with the same top-1. flips: share of flips; its info holds both directions.
    """
    real = compared.real
    n, windows = int(real.sum()), int(real.any(1).sum())
    kl = compared.kl[real].double()
    lost, gained = ((a & ~b)[real].sum().item() / n for a, b in ((compared.dense_right, compared.right),
                                                                (compared.right, compared.dense_right)))
    values = {"kl": kl.mean().item(), "kl_p99": kl.kthvalue(math.ceil(0.99 * n)).values.item(),
              "top1_agreement": compared.agree[real].sum().item() / n, "flips": lost + gained}
    how = {"window": real.shape[1] + 1, "windows": windows, "tokens": n}
    more = {"kl": {"stderr": mean_over_windows(compared.kl, real)[1]},
            "flips": {"right_to_wrong": lost, "wrong_to_right": gained}}
    return ({f"{name}/{key}": value for key, value in values.items()},
            {f"{name}/{key}": how | more.get(key, {}) for key in values})
