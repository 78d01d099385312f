"""Where the loss increase sits: which tokens, which places, which texts lost more than the whole.

    increase    a predicted token's loss on the pruned model minus that on the dense one, nats
    slice       some of the predicted tokens; one is named by its kind ("content") and its name ("numbers")
    half        half the width of the 95 % interval of a slice's mean increase. Tokens of one window hang together, so
                windows are what is drawn: Student's t over windows
    verdict     "more" or "less" where the interval leaves the mean of all tokens outside

Kinds: `frequency` tenths of the predicted tokens by how often they occur in the evaluation and calibration text,
equally frequent ones together; `content` by what stands there; `position` by the tokens before it in its
window; `text` by the named text. Twenty slices compared at 95 % show about one that differs by chance alone.
"""

import re
from collections import Counter
from dataclasses import dataclass

import torch

from ..data import Tokens
from ..runtime.flag import flag
from . import Found, Subject
from .compared import Compared, mean_over_windows

compares = True

MIN_WINDOWS = 5  # with fewer the interval would say nothing
TOKENS, PASSAGES, PASSAGE = 20, 5, 32  # shown; length of a passage
WORD = re.compile(r"[^\W_]+(?:['’\-.,][^\W_]+)*")
RARE = "rare words (seen once)"
SENTENCE_END = set(".!?:;\"“”‘»…([\n")  # what a word that begins a sentence may stand behind
TENTHS = ("rarest tenth of the tokens", "2nd rarest tenth", "3rd rarest tenth",
          *(f"{i}th rarest tenth" for i in range(4, 10)), "commonest tenth")


@dataclass(frozen=True)
class Config:
    damage: bool = flag(False, "find the tokens and passages that lost most against the dense model; the record quotes "
                               "them", section="evaluation", bears_on="measuring", rows=("pruned", "rounded"))


def asked(cfg) -> bool:
    """Not of the dense model, which would be compared with itself."""
    return cfg.damage and cfg.method != "dense"


def refuse(cfg) -> None:
    """Raise ValueError without a text to compare on."""
    if not cfg.evaluations:
        raise ValueError("--damage: needs a text to compare on; give --evaluate")


def measure(subject: Subject) -> Found:
    """The record's `damage`."""
    names = subject.beside_dense
    if not names:
        return Found()
    return Found(parts={"damage": damage(subject.tokenizer, {name: subject.texts[name] for name in names},
                                         {name: subject.compare(name) for name in names}, subject.calibration)})


def damage(tokenizer, texts: dict[str, Tokens], compared: dict[str, Compared],
           calibration: Tokens | None = None) -> dict:
    """The record's `damage`, plain values.

    texts: {name: data.Tokens}, all of one window length; compared: {name: Compared} of the same. calibration:
    data.Tokens that tell frequencies, or None.

    Keys: overall (tokens, windows, increase, half), slices (kind, name, tokens, windows, increase, half, verdict),
    empty (kind: names of slices without tokens), found (what lost more than the whole, in words), tokens and passages
    (those hurt most), frequency_from.
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


def mean_increase(increase, member, overall=None):
    """{tokens, windows, increase, half, verdict} of the slice `member`, bool (n, T-1); the last where `overall` is
    given."""
    tokens, windows = int(member.sum()), int(member.any(1).sum())
    mean, stderr = mean_over_windows(increase, member) if tokens else (None, None)
    half = student(windows - 1) * stderr if windows >= MIN_WINDOWS else None
    found = {"tokens": tokens, "windows": windows, "increase": mean, "half": half}
    if overall is None:
        return found
    apart = half is not None and abs(mean - overall) > half
    return found | {"verdict": None if not apart else "more" if mean > overall else "less"}


def student(nu):
    """97.5 % quantile of Student's t with nu >= 4 degrees of freedom, to 0.002 (Abramowitz and Stegun 26.7.5)."""
    z = 1.959963985
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return z + sum(term / nu**i for i, term in enumerate(terms, 1))


def in_words(slices, overall):
    """One sentence for each slice that lost more than the whole, the worst first."""
    worse = sorted((s for s in slices if s["verdict"] == "more"), key=lambda s: -s["increase"])
    return [f"{'places ' * (s['kind'] == 'position')}{s['name']} lost {s['increase']:.3g} ± {s['half']:.2g} nats, "
            f"the text as a whole {overall['increase']:.3g}" for s in worse]


# ---------------------------------------------------------------- slices: {name: bool (n, T-1)}, a column a target

def by_text(texts):
    """One slice a named text."""
    marks = torch.cat([torch.full((len(t.ids),), i) for i, t in enumerate(texts.values())])
    T = next(iter(texts.values())).ids.shape[1]
    return {f"text {name}": (marks == i)[:, None].expand(-1, T - 1) for i, name in enumerate(texts)}


def by_position(ids):
    """1-3, 4-15, 16-63, ... tokens before the target in its window."""
    before, found = torch.arange(1, ids.shape[1]), {}
    start = 1
    while start < ids.shape[1]:
        end = min(4 * start, ids.shape[1])
        name = f"after {start}-{end - 1} tokens" if end - start > 1 else f"after {start} token{'s' * (start > 1)}"
        found[name] = ((before >= start) & (before < end)).expand(len(ids), -1)
        start *= 4
    return found


def by_frequency(ids, real, known):
    """Tenths of the predicted tokens, the rarest first. known: calibration ids."""
    n = int(max(ids.max(), known.max() if len(known) else 0)) + 1
    counts = torch.bincount(ids[shown_of(real)], minlength=n) + torch.bincount(known, minlength=n)
    frequency = counts[ids[:, 1:]]
    levels, place = frequency[real].unique(return_inverse=True)
    here = torch.bincount(place, minlength=len(levels)).double()
    middle = here.cumsum(0) - here / 2  # equally frequent tokens go to the tenth where the middle of them lies
    tenth = (10 * middle / here.sum()).long().clamp(max=9)
    of_token = torch.full_like(frequency, -1)
    of_token[real] = tenth[place]
    return {name: of_token == i for i, name in enumerate(TENTHS)}


def by_content(ids, real, known, pieces):
    """Numbers, names, rare words, punctuation, and the rest. A name may be a rare word as well.

    A number holds a digit. A name is a word with a capital that does not begin a sentence ("I" left out). A rare word
    occurs once in evaluation and calibration text; words cut by a window's edge do not count. Punctuation holds no
    letter or digit, white space included.
    """
    windows = [pieces.words(row[mark].tolist()) for row, mark in zip(ids, shown_of(real), strict=True)]
    counts = Counter(word.lower() for words in windows for word, *_ in words)
    counts.update(word.lower() for word, *_ in pieces.words(known.tolist()))
    found = {name: torch.zeros_like(real) for name in ("numbers", "names", RARE, "punctuation")}
    for row, words in enumerate(windows):
        for word, first, last, whole, inside in words:
            if first < 1:
                continue  # its first token is the window's first, which nothing predicts
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


def shown_of(real):
    """bool (n, T) of the text in windows whose padding, if any, stands at the end."""
    return torch.cat([real.any(1, keepdim=True), real], 1)


class Pieces(dict):
    """{token id: its text}, with the space that begins a word, whatever the tokenizer's way to write it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, i):
        text = self.tokenizer.decode([i], clean_up_tokenization_spaces=False)
        raw = self.tokenizer.convert_ids_to_tokens(i)
        self[i] = " " + text if str(raw).startswith("▁") and not text.startswith(" ") else text
        return self[i]

    def words(self, ids):
        """[(word, first token, last token, whether whole, whether inside a sentence)] of a list of token ids."""
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

def worst_tokens(ids, increase, real, pieces, overall):
    """The tokens whose occurrences together lost most beyond the mean: [{token, count, increase, excess}].

    excess: count · (their mean increase - that of all), nats; so neither one bad occurrence nor many usual ones lead.
    """
    targets = ids[:, 1:][real]
    counts = torch.bincount(targets)
    sums = torch.bincount(targets, weights=increase[real])
    excess = sums - overall * counts
    return [{"token": pieces[i], "count": int(counts[i]), "increase": (sums[i] / counts[i]).item(),
             "excess": excess[i].item()}
            for i in excess.argsort(descending=True, stable=True)[:TOKENS].tolist() if excess[i] > 0]


def worst_passages(tokenizer, texts, increase, real):
    """The passages of up to 32 tokens with the highest mean increase: [{text, window, position, increase, passage}]."""
    T = real.shape[1] + 1
    name_of = [(name, w) for name, t in texts.items() for w in range(len(t.ids))]
    found = []
    for start in range(0, T - 1, PASSAGE):
        part = slice(start, start + PASSAGE)
        counts = real[:, part].sum(1)
        mean = (increase[:, part] * real[:, part]).sum(1) / counts.clamp(min=1)
        full = counts >= min(PASSAGE, T - 1) / 2  # a few tokens at an end would lead by chance
        found += [(mean[w].item(), w, start) for w in full.nonzero()[:, 0].tolist() if mean[w] > 0]
    chosen = []
    for mean, w, start in sorted(found, key=lambda item: (-item[0], *item[1:]))[:PASSAGES]:
        name, window = name_of[w]
        own = texts[name].ids[window, start + 1 : start + 1 + PASSAGE][real[w, start : start + PASSAGE]]
        chosen.append({"text": name, "window": window, "position": start + 1, "increase": mean,
                       "passage": tokenizer.decode(own.tolist())})
    return chosen
