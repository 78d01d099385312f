"""Perturbed text, to measure robustness: the same words with typos, in another case, or with other white space.

The changes are deterministic, so the dense model and every pruned model are evaluated on the same tokens.
"""

import random
import re

SHARE = 0.1  # of the words, or of the spaces between them, that are changed


def perturbed(text: str, kind: str) -> str:
    """`text` with a tenth of its words (kind "typos" or "casing") or of its spaces ("whitespace") changed."""
    pattern, change = KINDS[kind]
    draw = random.Random(f"{kind} {len(text)}")  # seeded by a string: the same on every machine
    return re.sub(pattern, lambda found: change(found[0], draw) if draw.random() < SHARE else found[0], text)


def typo(word: str, draw: random.Random) -> str:
    """The word with two neighbouring letters swapped, one dropped, or one doubled; the first letter stays."""
    i = draw.randrange(1, len(word) - 1)
    return draw.choice((word[:i] + word[i + 1] + word[i] + word[i + 2 :], word[:i] + word[i + 1 :],
                        word[: i + 1] + word[i:]))


def other_case(word: str, draw: random.Random) -> str:
    """The word in capitals, or in lower case if it contains a capital."""
    return word.upper() if word == word.lower() else word.lower()


def other_space(space: str, draw: random.Random) -> str:
    """Two spaces, a line break, a tab, or nothing, at random."""
    return draw.choice(("  ", "\n", "\t", ""))


KINDS = {
    "typos": (r"[^\W\d_]{4,}", typo),
    "casing": (r"[^\W\d_]+", other_case),
    "whitespace": (r"(?<=\S) (?=\S)", other_space),
}
