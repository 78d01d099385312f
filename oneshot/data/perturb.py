"""Text as people really type it: the same words with typos, in another case, with other white space.

Always the same changes to the same text, so the dense and every pruned model meet the same tokens.
"""

import random
import re

SHARE = 0.1  # of the words, or of the spaces between them, that are changed


def perturbed(text, kind):
    """`text` with a tenth of its words (kind "typos", "casing") or of its spaces ("whitespace") changed."""
    pattern, change = KINDS[kind]
    draw = random.Random(f"{kind} {len(text)}")  # seeded by a text: the same on every machine
    return re.sub(pattern, lambda found: change(found[0], draw) if draw.random() < SHARE else found[0], text)


def typo(word, draw):
    """Two neighbouring letters swapped, one left out, or one doubled; never the first."""
    i = draw.randrange(1, len(word) - 1)
    return draw.choice((word[:i] + word[i + 1] + word[i] + word[i + 2 :], word[:i] + word[i + 1 :],
                        word[: i + 1] + word[i:]))


def other_case(word, draw):
    """All capitals; none, if there is one already."""
    return word.upper() if word == word.lower() else word.lower()


def other_space(space, draw):
    """Two spaces, a line break, a tab, or nothing."""
    return draw.choice(("  ", "\n", "\t", ""))


KINDS = {
    "typos": (r"[^\W\d_]{4,}", typo),
    "casing": (r"[^\W\d_]+", other_case),
    "whitespace": (r"(?<=\S) (?=\S)", other_space),
}
