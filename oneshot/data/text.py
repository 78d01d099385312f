"""Text: documents as they were read, and how they are to be read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Conversation = list[dict]  # messages in order, {"role": ..., "content": ...}
Document = str | Conversation | None


@dataclass(frozen=True)
class TextOptions:
    """How to read text.

    For wikitext2, c4 and ptb only `revision`, `cache_dir`, `documents` and `bos` have an effect, because these names
    stand for exactly what the papers used.
    """

    column: str | None = None  # of hub data sets and files; default: see columns.py
    config: str | None = None  # of hub data sets
    split: str | None = None  # of hub data sets; default: train for calibration, test for evaluation
    revision: str | None = None
    cache_dir: str | None = None
    per_line: bool = False  # each line of a .txt file is a document
    documents: str = "join"  # "join" or "separate", see windows.py
    bos: str = "auto"  # "auto": as the tokenizer does it; "each", "first" or "none", see encode.py


AS_IT_COMES = TextOptions()


@dataclass(frozen=True)
class Text:
    """Documents as they were read. Rows of a hub data set stay on disk until they are accessed, and may be None.

    chat: whether the documents are conversations, to be written out by the tokenizer's chat template.
    """

    documents: Sequence[Document]
    source: str
    glue: str = "\n\n"
    warnings: tuple[str, ...] = ()
    chat: bool = False

    def joined(self, limit: int | None = None) -> str:
        """All documents joined by `glue`, or the first `limit` characters; reads no more documents than needed."""
        parts, size = [], 0
        for document in self.documents:
            parts.append(document or "")
            size += len(parts[-1])
            if limit is not None and size >= limit:
                break
        return self.glue.join(parts)[:limit]


@dataclass(frozen=True)
class Stream:
    """A text that is read once, from its beginning, as far as somebody asks for the next document.

    documents: in the order of the source; they raise Unusable. source: what is read, without how much of it.
    parted: the documents are the consecutive parts of a single one.
    """

    documents: Iterator[Document]
    source: str
    warnings: tuple[str, ...] = ()
    chat: bool = False
    parted: bool = False


class Unusable(ValueError):
    """A text that cannot be used. The message says what is wrong and what to do; windows.py adds the flag in front."""
