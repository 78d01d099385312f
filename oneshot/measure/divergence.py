"""How far the pruned model's predictions have moved from the dense model's on the same text, token by token.

Perplexity is an average over one outcome a position; two models of equal perplexity may answer differently. Measured
on whole distributions and on decisions (KL and flips as in arXiv 2407.09141):

    p, q     the dense and the pruned model's distribution over the next token
    KL       sum_v p(v) (ln p(v) - ln q(v)), nats; 0 exactly where both agree
    top-1    the likeliest token
    right    the text goes on with the top-1
    flips    positions where exactly one of the two models is right
"""

import math
from dataclasses import dataclass

from ..runtime.flag import flag
from . import Found, Subject
from .compared import Compared, mean_over_windows

compares = True


@dataclass(frozen=True)
class Config:
    divergence: bool = flag(False, "compare each token's prediction with the dense model's: KL, top-1, flips",
                            section="evaluation", bears_on="measuring", rows=("pruned", "rounded"))


def asked(cfg) -> bool:
    """Not of the dense model, which would be compared with itself."""
    return cfg.divergence and cfg.method != "dense"


def refuse(cfg) -> None:
    """Raise ValueError without a text to compare on."""
    if not cfg.evaluations:
        raise ValueError("--divergence: needs a text to compare on; give --evaluate")


def measure(subject: Subject) -> Found:
    """What `metrics` says of every text."""
    found = Found()
    for name in subject.beside_dense:
        found.add(Found(*metrics(subject.compare(name), name)))
    return found


def metrics(compared: Compared, name: str) -> tuple[dict[str, float], dict[str, dict]]:
    """({"NAME/kl": ...}, {"NAME/kl": how it was measured}) of one text.

    kl: mean, nats a token, with its standard error over windows. kl_p99: the smallest KL that 99 % of the tokens do not
    exceed. top1_agreement: share of equal top-1. flips: share of flips, their two directions beside it.
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
