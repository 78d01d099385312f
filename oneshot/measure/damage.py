"""Damage: where the loss increased, that is, which tokens, positions and texts were hurt more than average.

    increase    a predicted token's loss on the pruned model minus its loss on the dense model, nats
    slice       a subset of the predicted tokens, identified by a kind ("content") and a name ("numbers")
    half        half the width of the 95 % confidence interval of a slice's mean increase, by Student's t over windows
                (tokens of one window are correlated, so the windows are taken as the sample)
    verdict     "more" or "less" if the mean increase of all tokens is outside the slice's interval

Kinds of slices: `frequency`, tenths of the predicted tokens by how often they occur in the evaluation and calibration
text, with equally frequent tokens in the same tenth; `content`, by the kind of token; `position`, by the number of
tokens before it in its window; `text`, by evaluation text. Of twenty slices compared at 95 %, about one differs by
chance alone.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data import Tokens
from ..models import Tokenizer
from ..runtime.flag import Settings, flag
from . import Found, Subject, needs_text
from .compared import Compared, mean_over_windows

compares = True

MIN_WINDOWS = 5  # below this an interval would be meaningless
TOKENS, PASSAGES, PASSAGE = 20, 5, 32  # how many of the worst tokens and passages to report; tokens in a passage
WORD = re.compile(r"[^\W_]+(?:['’\-.,][^\W_]+)*")
RARE = "rare words (seen once)"
SENTENCE_END = set(".!?:;\"“”‘»…([\n")  # characters after which a word may begin a sentence
TENTHS = ("rarest tenth of the tokens", "2nd rarest tenth", "3rd rarest tenth",
          *(f"{i}th rarest tenth" for i in range(4, 10)), "commonest tenth")


@dataclass(frozen=True)
class Config:
    damage: bool = flag(False, "find the tokens and passages whose loss increased most over the dense model's; the "
                               "record quotes them", section="evaluation", bears_on="measuring",
                        rows=("pruned", "rounded"))


def asked(cfg: Settings) -> bool:
    """Whether the flag is set."""
    return cfg.damage


def refuse(cfg: Settings) -> None:
    """Raise ValueError naming `--damage` if there is no text to compare on."""
    needs_text(cfg, "--damage")


def measure(subject: Subject) -> Found:
    """The record's `damage`, over all texts."""
    names = subject.beside_dense
    if not names:
        return Found()
    return Found(parts={"damage": damage(subject.tokenizer, {name: subject.texts[name] for name in names},
                                         {name: subject.compare(name) for name in names}, subject.calibration)})


def damage(tokenizer: Tokenizer, texts: dict[str, Tokens], compared: dict[str, Compared],
           calibration: Tokens | None = None) -> dict[str, Any]:
    """The record's `damage`, plain values.

    texts: {name: Tokens}, all with windows of the same length. compared: {name: Compared} of the same texts.
    calibration: Tokens that contribute to the token frequencies, or None.

    Keys: overall (tokens, windows, increase, half), slices (kind, name, tokens, windows, increase, half, verdict),
    empty ({kind: names of slices without tokens}), found (the slices that lost more than the whole, in words), tokens
    and passages (those hurt most), frequency_from.
    """
    ids = torch.cat([t.ids for t in texts.values()])
    real = torch.cat([compared[name].real for name in texts])
    loss, dense_loss = (torch.cat([getattr(compared[name], key) for name in texts]).double()
                        for key in ("loss", "dense_loss"))
    increase = loss - dense_loss
    known = calibration.ids[calibration.mask] if calibration and calibration.mask is not None else \
        calibration.ids.reshape(-1) if calibration else ids.new_zeros(0)
    result = {"frequency_from": "the evaluation text" + (" and the calibration text" if calibration else ""),
              "overall": None, "slices": [], "empty": {}, "found": [], "tokens": [], "passages": []}
    if broken := int((~torch.isfinite(increase) & real).sum()):
        return result | {"found": [f"the loss of {broken} of {int(real.sum())} tokens is not finite, so nothing can be "
                                   "said of where the increase sits"]}
    pieces = Pieces(tokenizer)
    parts = {"text": by_text(texts) if len(texts) > 1 else {}, "content": by_content(ids, real, known, pieces),
             "frequency": by_frequency(ids, real, known), "position": by_position(ids)}
    overall = mean_increase(increase, real)
    slices = [{"kind": kind, "name": name} | mean_increase(increase, real & member, overall["increase"])
              for kind, members in parts.items() for name, member in members.items()]
    empty = {kind: [s["name"] for s in slices if s["kind"] == kind and not s["tokens"]] for kind in parts}
    slices = [s for s in slices if s["tokens"]]
    return result | {
        "overall": overall, "slices": slices, "empty": {kind: names for kind, names in empty.items() if names},
        "found": in_words(slices, overall), "tokens": worst_tokens(ids, increase, real, pieces, overall["increase"]),
        "passages": worst_passages(tokenizer, texts, increase, real)}


def mean_increase(increase: torch.Tensor, member: torch.Tensor, overall: float | None = None) -> dict[str, Any]:
    """{tokens, windows, increase, half} of the slice `member`, bool (n, T-1), and verdict if `overall` is given.

    increase: (n, T-1), nats. overall: mean increase of all tokens.
    """
    tokens, windows = int(member.sum()), int(member.any(1).sum())
    mean, stderr = mean_over_windows(increase, member) if tokens else (None, None)
    half = student(windows - 1) * stderr if windows >= MIN_WINDOWS else None
    found = {"tokens": tokens, "windows": windows, "increase": mean, "half": half}
    if overall is None:
        return found
    apart = half is not None and abs(mean - overall) > half
    return found | {"verdict": None if not apart else "more" if mean > overall else "less"}


def student(nu: int) -> float:
    """97.5 % quantile of Student's t with nu >= 4 degrees of freedom, to 0.002 (Abramowitz and Stegun 26.7.5)."""
    z = 1.959963985
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return z + sum(term / nu**i for i, term in enumerate(terms, 1))


def in_words(slices: list[dict[str, Any]], overall: dict[str, Any]) -> list[str]:
    """One sentence per slice that lost more than the whole, the worst first."""
    worse = sorted((s for s in slices if s["verdict"] == "more"), key=lambda s: -s["increase"])
    return [f"{'places ' * (s['kind'] == 'position')}{s['name']} lost {s['increase']:.3g} ± {s['half']:.2g} nats, "
            f"the text as a whole {overall['increase']:.3g}" for s in worse]


# ---------------------------------------------------------------- slices: {name: bool (n, T-1)}, a column per target

def by_text(texts: dict[str, Tokens]) -> dict[str, torch.Tensor]:
    """One slice per evaluation text."""
    marks = torch.cat([torch.full((len(t.ids),), i) for i, t in enumerate(texts.values())])
    T = next(iter(texts.values())).ids.shape[1]
    return {f"text {name}": (marks == i)[:, None].expand(-1, T - 1) for i, name in enumerate(texts)}


def by_position(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Slices by the number of tokens before the target in its window: 1-3, 4-15, 16-63, ... ids: (n, T)."""
    before, found = torch.arange(1, ids.shape[1]), {}
    start = 1
    while start < ids.shape[1]:
        end = min(4 * start, ids.shape[1])
        name = f"after {start}-{end - 1} tokens" if end - start > 1 else f"after {start} token{'s' * (start > 1)}"
        found[name] = ((before >= start) & (before < end)).expand(len(ids), -1)
        start *= 4
    return found


def by_frequency(ids: torch.Tensor, real: torch.Tensor, known: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tenths of the predicted tokens, the rarest first.

    ids: (n, T). real: bool (n, T-1), False at padding. known: ids of the calibration text (N,).
    """
    n = int(max(ids.max(), known.max() if len(known) else 0)) + 1
    counts = torch.bincount(ids[shown_of(real)], minlength=n) + torch.bincount(known, minlength=n)
    frequency = counts[ids[:, 1:]]
    levels, place = frequency[real].unique(return_inverse=True)
    here = torch.bincount(place, minlength=len(levels)).double()
    middle = here.cumsum(0) - here / 2  # equally frequent tokens go into the tenth that contains their middle
    tenth = (10 * middle / here.sum()).long().clamp(max=9)
    of_token = torch.full_like(frequency, -1)
    of_token[real] = tenth[place]
    return {name: of_token == i for i, name in enumerate(TENTHS)}


def by_content(ids: torch.Tensor, real: torch.Tensor, known: torch.Tensor, pieces: "Pieces") -> dict[str, torch.Tensor]:
    """Numbers, names, rare words, punctuation, and the rest. A name may also be a rare word.

    A number contains a digit. A name is a capitalised word that does not begin a sentence (except "I"). A rare word
    occurs exactly once in the evaluation and calibration text; words cut by a window's edge do not count. Punctuation
    contains no letter or digit and includes white space. Arguments as in `by_frequency`.
    """
    windows = [pieces.words(row[mark].tolist()) for row, mark in zip(ids, shown_of(real), strict=True)]
    counts = Counter(word.lower() for words in windows for word, *_ in words)
    counts.update(word.lower() for word, *_ in pieces.words(known.tolist()))
    found = {name: torch.zeros_like(real) for name in ("numbers", "names", RARE, "punctuation")}
    for row, words in enumerate(windows):
        for word, first, last, whole, inside in words:
            if first < 1:
                continue  # its first token is the window's first, which is not predicted
            span = slice(first - 1, last)
            if word[0].isupper() and inside and not re.match(r"I\b", word):
                found["names"][row, span] = True
            if whole and counts[word.lower()] == 1 and not any(c.isdigit() for c in word):
                found[RARE][row, span] = True
    targets = ids[:, 1:]
    present = targets.unique().tolist()
    found["numbers"] = torch.isin(targets, torch.tensor([i for i in present if any(c.isdigit() for c in pieces[i])],
                                                        dtype=ids.dtype))
    found["punctuation"] = torch.isin(targets, torch.tensor(
        [i for i in present if not any(c.isalnum() for c in pieces[i])], dtype=ids.dtype))
    found["names"] &= ~found["numbers"] & ~found["punctuation"]
    found[RARE] &= ~found["punctuation"]
    return found | {"all other words": ~torch.stack(list(found.values())).any(0)}


def shown_of(real: torch.Tensor) -> torch.Tensor:
    """bool (n, T), which tokens are text, from real (n, T-1), which targets are. Padding must be at the end."""
    return torch.cat([real.any(1, keepdim=True), real], 1)


class Pieces(dict[int, str]):
    """{token id: its text}, filled on access; a space that begins a word is kept, however the tokenizer encodes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __missing__(self, i: int) -> str:
        text = self.tokenizer.decode([i], clean_up_tokenization_spaces=False)
        raw = self.tokenizer.convert_ids_to_tokens(i)
        self[i] = " " + text if str(raw).startswith("▁") and not text.startswith(" ") else text
        return self[i]

    def words(self, ids: list[int]) -> list[tuple[str, int, int, bool, bool]]:
        """[(word, place of its first token, of its last, whether it is whole, whether it is inside a sentence)]."""
        texts = [self[i] for i in ids]
        owner = [n for n, text in enumerate(texts) for _ in text]
        text, found = "".join(texts), []
        for match in WORD.finditer(text):
            before = text[: match.start()].rstrip(" ")
            whole = match.start() > 0 and match.end() < len(text)
            inside = bool(before) and before[-1] not in SENTENCE_END
            found.append((match[0], owner[match.start()], owner[match.end() - 1], whole, inside))
        return found


# ---------------------------------------------------------------- the worst

def worst_tokens(ids: torch.Tensor, increase: torch.Tensor, real: torch.Tensor, pieces: Pieces,
                 overall: float) -> list[dict[str, Any]]:
    """The tokens that lost most in excess of the mean: [{token, count, increase, excess}], the worst first.

    excess: count · (the token's mean increase - that of all tokens), nats. So neither a single bad occurrence nor a
    large number of ordinary ones comes first.
    """
    targets = ids[:, 1:][real]
    counts = torch.bincount(targets)
    sums = torch.bincount(targets, weights=increase[real])
    excess = sums - overall * counts
    return [{"token": pieces[i], "count": int(counts[i]), "increase": (sums[i] / counts[i]).item(),
             "excess": excess[i].item()}
            for i in excess.argsort(descending=True, stable=True)[:TOKENS].tolist() if excess[i] > 0]


def worst_passages(tokenizer: Tokenizer, texts: Mapping[str, Tokens], increase: torch.Tensor,
                   real: torch.Tensor) -> list[dict[str, Any]]:
    """The passages of up to 32 tokens with the highest mean increase: [{text, window, position, increase, passage}]."""
    T = real.shape[1] + 1
    name_of = [(name, w) for name, t in texts.items() for w in range(len(t.ids))]
    found = []
    for start in range(0, T - 1, PASSAGE):
        part = slice(start, start + PASSAGE)
        counts = real[:, part].sum(1)
        mean = (increase[:, part] * real[:, part]).sum(1) / counts.clamp(min=1)
        full = counts >= min(PASSAGE, T - 1) / 2  # a passage of very few tokens could come first by chance
        found += [(mean[w].item(), w, start) for w in full.nonzero()[:, 0].tolist() if mean[w] > 0]
    chosen = []
    for mean, w, start in sorted(found, key=lambda item: (-item[0], *item[1:]))[:PASSAGES]:
        name, window = name_of[w]
        own = texts[name].ids[window, start + 1 : start + 1 + PASSAGE][real[w, start : start + PASSAGE]]
        chosen.append({"text": name, "window": window, "position": start + 1, "increase": mean,
                       "passage": tokenizer.decode(own.tolist())})
    return chosen
