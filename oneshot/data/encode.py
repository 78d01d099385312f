"""Encode: documents become token ids, conversations by the tokenizer's chat template; and where a BOS token stands.

TextOptions.bos:
  auto    as the tokenizer does it by default, as in the papers: a BOS token, if it adds one, only at the start of what
          is tokenised together (all documents that are joined, or one document)
  each    one at the start of every window; the window's other tokens are text
  first   one at the start of what is tokenised together, whatever the tokenizer does by default
  none    none at the start of anything

A conversation has the special tokens that its template writes, and no others. A BOS token is never doubled.
"""

from dataclasses import dataclass

import torch

from ..models import Tokenizer
from ..runtime.inputs import SURROGATE, reason
from .text import Conversation, Document, Text, Unusable

MODES = ("auto", "each", "first", "none")


@dataclass(frozen=True)
class Encoder:
    """How the documents of one text become token ids. bos: one of MODES. chat: whether they are conversations."""

    tokenizer: Tokenizer
    bos: str = "auto"
    chat: bool = False

    def __post_init__(self) -> None:
        if self.bos not in MODES:
            raise Unusable(f"--bos is {self.bos}; it must be {', '.join(MODES)}")
        if self.bos in ("each", "first") and self.tokenizer.bos_token_id is None:
            raise Unusable(f"--bos {self.bos}: the tokenizer has no BOS token; use auto or none")

    @property
    def start(self) -> list[int]:
        """What every window starts with."""
        return [self.tokenizer.bos_token_id] if self.bos == "each" else []

    def document(self, document: Document, first: bool = True) -> list[int]:
        """A document's token ids. first: whether what is tokenised together starts with it."""
        if self.chat:
            ids = encode(self.tokenizer, template(self.tokenizer, document), special=False)
        else:
            ids = encode(self.tokenizer, document or "")
        if self.bos == "auto" or self.tokenizer.bos_token_id is None:
            return ids
        bos, start = self.tokenizer.bos_token_id, 0
        while ids[start : start + 1] == [bos]:
            start += 1
        return ([bos] if self.bos == "first" and first else []) + ids[start:]

    def together(self, text: Text, limit: int | None = None) -> tuple[list[int], bool]:
        """(token ids of all documents joined, whether only the first `limit` characters were taken)."""
        if not self.chat:
            joined = text.joined(None if limit is None else limit + 1)
            return self.document(joined[:limit]), limit is not None and len(joined) > limit
        ids, size = [], 0
        for document in text.documents:
            if limit is not None and size >= limit:
                return ids, True
            ids += self.document(document, first=not ids)
            size += sum(len(message["content"] or "") for message in document)
        return ids, False

    def cut(self, ids: list[int], seqlen: int) -> torch.Tensor:
        """Consecutive windows (n, seqlen) of token ids; an incomplete last one is dropped."""
        length = seqlen - len(self.start)
        n = len(ids) // length
        if n == 0:
            whole = len(ids) + len(self.start)
            raise Unusable(f"{whole} tokens, shorter than one window of {seqlen}; use --seqlen {whole} or less, or "
                           "more text")
        windows = torch.tensor(ids[: n * length]).view(n, length)
        return torch.cat([torch.tensor(self.start).expand(n, 1), windows], 1) if self.start else windows

    def described(self) -> str:
        """What to say of the BOS tokens; "" where they are as the tokenizer puts them."""
        token = self.tokenizer.bos_token
        return {"auto": "", "each": f", each after {token}", "first": f", {token} at the start",
                "none": f", without {token or 'a BOS token'}"}[self.bos]


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by default or without. Raises Unusable.

    verbose=False suppresses the warning that the text is longer than the model's context; it is cut afterwards.
    """
    try:
        return tokenizer(text, verbose=False, **({} if special else {"add_special_tokens": False}))["input_ids"]
    except Exception as error:  # of the tokenizers library, which raises plain Exceptions
        raise Unusable(f"the model's tokenizer cannot take its text ({reason(error)})") from error


def template(tokenizer: Tokenizer, conversation: Conversation, answer: bool = False) -> str:
    """A conversation as the model was trained to read it; with `answer`, up to where the model answers.

    Raises Unusable.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise Unusable("holds conversations, and the model's tokenizer has no chat template to write them out; give "
                       "text, or a model whose tokenizer has one")
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template can raise anything, and does so to refuse roles it does not know
        roles = ", ".join(message["role"] for message in conversation[:4])
        raise Unusable(f"the tokenizer's chat template refuses the conversation {roles} ... ({reason(error)}); correct "
                       "it or leave it out") from error
    if SURROGATE.search(text):
        raise Unusable("a conversation holds half of a surrogate pair (a cut emoji); correct it")
    return text
