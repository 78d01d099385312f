"""Pieces: the beginning of a training text, parted and tokenised, on disk.

A text is read once, from its beginning, until its pieces hold the tokens that are wanted; what lies behind is never
read, so that neither time nor memory nor disk grow with it. Which pieces there are follows from the text, the tokenizer
and the number of tokens alone. They are then drawn in random order, and again where a text has ended too early.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..models import Tokenizer
from .encode import Encoder
from .text import Document, Stream, Unusable

PIECE = 20_000  # characters, at most
PIECES = 40  # into so many a text of few documents is cut at least, so that some can be held out
SHORT = 100  # characters that a piece has at least


@dataclass(frozen=True)
class Pieces:
    """Piece i is ids[ends[i - 1] : ends[i]]; it may be empty. ids: uint32 (n,), on disk. ends: int64 (pieces,).

    documents: how many there are, in whole or in part. ended: whether the text holds no more.
    """

    ids: np.ndarray
    ends: np.ndarray
    documents: int
    ended: bool

    def __len__(self) -> int:
        """The number of pieces."""
        return len(self.ends)

    def __getitem__(self, i: int) -> np.ndarray:
        """The token ids of piece i, uint32."""
        return self.ids[self.ends[i - 1] if i else 0 : self.ends[i]]


class Sampled:
    """Takes the place of an Encoder for documents that are token ids already."""

    chat = True  # nothing is added

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def document(self, ids: list[int]) -> list[int]:
        """The document itself."""
        return ids


@dataclass
class Source:
    """One text of a mixture: its pieces in random order, again and again, each as token ids.

    holding: whether what is drawn now is held out, so that it never comes again. taken, passes: tokens drawn and passes
    begun since it is not.
    """

    name: str
    share: float
    text: Stream
    encoder: Encoder | Sampled
    draw: random.Random
    pieces: Pieces | None = None
    holding: bool = True
    taken: int = 0
    passes: int = 1
    _held: set[int] = field(default_factory=set, repr=False)
    _pieces: Iterator[np.ndarray] | None = field(default=None, repr=False)

    def next(self) -> np.ndarray:
        """The next piece. Raises Unusable where nothing is left to draw."""
        for _ in range(2):
            self._pieces = self._pieces or self._pass()
            for ids in self._pieces:
                if len(ids):
                    return ids
            self._pieces, self.passes = None, self.passes + 1
            if self.holding:
                break
        raise Unusable("holds too little text to train on some of it and to hold some out; add text")

    def _pass(self) -> Iterator[np.ndarray]:
        """One pass over all pieces that are not held out."""
        order = list(range(len(self.pieces)))
        self.draw.shuffle(order)
        for i in order:
            if i in self._held:
                continue
            if self.holding:
                self._held.add(i)
            yield self.pieces[i]

    def described(self) -> str:
        """What was read, for the record."""
        if isinstance(self.encoder, Sampled):
            return self.text.source
        what = "conversations" if self.text.chat else "documents"
        return f"{self.text.source}, {'' if self.pieces.ended else 'the first '}{self.pieces.documents} {what}"


def gather(text: Stream, encoder: Encoder | Sampled, file: Path, tokens: int, bar: tqdm) -> Pieces:
    """The first pieces of a text, written to `file`: so many that `tokens` can be drawn, in two parts of whole pieces.

    Every document ends with the tokenizer's end-of-text token. Raises Unusable for what cannot be read or encoded, and
    OSError where the disk is full.
    """
    eos, ends, longest, documents, ended = encoder.tokenizer.eos_token_id, [], 0, 0, True
    with bar, open(file, "wb") as out:
        for part, begins, last in parts(text):
            ids = encoder.document(part)
            if ids and last and eos is not None and not encoder.chat:
                ids = [*ids, eos]
            out.write(np.asarray(ids, np.uint32).tobytes())
            ends.append(len(ids) + (ends[-1] if ends else 0))
            longest, documents = max(longest, len(ids)), documents + begins
            bar.update(len(ids))
            if ends[-1] >= tokens + 2 * (longest + 1):  # of either part's last piece less than all may be used
                ended = False
                break
    size = ends[-1] if ends else 0
    ids = np.memmap(file, np.uint32, "r") if size else np.empty(0, np.uint32)
    return Pieces(ids, np.asarray(ends, np.int64), documents, ended)


def parts(text: Stream) -> Iterator[tuple[Document, bool, bool]]:
    """(a piece of a text, whether a document begins with it, whether one ends with it)."""
    first, characters = [], 0
    for document in text.documents:
        first.append(document)
        characters += len(document or "")
        if (len(first) >= PIECES and not text.parted) or characters >= PIECES * PIECE:
            break
    size = piece_size(1 if text.parted else len(first), characters)
    documents = itertools.chain(first, text.documents)
    for document in [documents] if text.parted else ([document] for document in documents):
        yield from cut(document, size)


def cut(document: Iterable[Document], size: int) -> Iterator[tuple[Document, bool, bool]]:
    """What `parts` gives of one document, which comes in parts itself. size: characters of a piece, at most."""
    held, begins = "", True
    for part in document:
        if not isinstance(part, str):
            if part is not None:
                yield part, True, True
            return
        held += part
        at = 0
        while len(held) - at > size:
            yield held[at : at + size], begins, False
            begins, at = False, at + size
        held = held[at:]
    yield held, begins, True


def piece_size(documents: int, characters: int) -> int:
    """Characters of a piece: fewer than PIECE in a text of few and short documents."""
    return PIECE if documents >= PIECES else min(PIECE, max(SHORT, characters // PIECES))
