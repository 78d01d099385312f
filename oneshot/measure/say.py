"""Say: what the model answers to prompts of the user's own, word for word. It shows what a perplexity does not: whether
the text still makes sense.

A prompt becomes the user's turn of the tokenizer's chat template where there is one, else text to continue. Answers are
greedy, at most NEW_TOKENS tokens long, and computed one prompt at a time.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from .. import models
from ..data import Tokens, embedding, encode
from ..models import Tokenizer
from ..runtime.flag import Settings, flag
from . import Found, Subject
from .greedy import greedy

NEW_TOKENS = 48


@dataclass(frozen=True)
class Config:
    say: str | None = flag(None, "a prompt to show each model's answer to; give the flag once for each prompt",
                           section="evaluation", bears_on="measuring", added=True, repeated=True)


def asked(cfg: Settings) -> bool:
    """Whether there are prompts."""
    return bool(cfg.say)


def refuse(cfg: Settings) -> None:
    """Raise ValueError if there is no prompt."""
    prompts(cfg.say)


def prepare(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise ValueError naming the prompt that does not fit the model."""
    encoded(cfg.say, model, tokenizer)


def identity(cfg: Settings, texts: dict[str, Tokens]) -> list[str]:
    """The hash of the prompts."""
    return [hashlib.sha256(cfg.say.encode()).hexdigest()]


@torch.no_grad()
def measure(subject: Subject) -> Found:
    """The answers become the record's `say`: [{"prompt", "answer"}]."""
    model, device, answers = subject.model, subject.cfg.device, []
    with models.resident(model, device), \
            models.own_code(f"--say: {type(model).__name__} cannot be run on the prompts"):
        for prompt, ids in encoded(subject.cfg.say, model, subject.tokenizer):
            written = greedy(model, torch.tensor([ids], device=device), NEW_TOKENS)
            answers.append({"prompt": prompt, "answer": subject.tokenizer.decode(written, skip_special_tokens=True)})
    return Found(parts={"say": answers})


def prompts(text: str) -> list[str]:
    """The prompts, one a line. Raises ValueError naming `--say` if there are none."""
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise ValueError("--say: is empty; give a prompt")
    return found


def encoded(text: str, model: nn.Module, tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """[(prompt, its token ids)]. Raises ValueError naming `--say` and the prompt that does not fit the model."""
    made, most = [], models.max_positions(model)
    for prompt in prompts(text):
        said = f"--say {prompt[:40]!r}"
        try:
            chat = getattr(tokenizer, "chat_template", None)
            whole = encode.template(tokenizer, [{"role": "user", "content": prompt}], answer=True) if chat else prompt
            ids = encode.encode(tokenizer, whole, special=not chat)  # a template writes the special tokens itself
        except encode.Unusable as error:
            raise ValueError(f"{said}: {error}") from error
        if not ids:
            raise ValueError(f"{said}: has no token; give some text")
        embedding.check(torch.tensor(ids), model, tokenizer, said)
        if most and len(ids) + NEW_TOKENS > most:
            raise ValueError(f"{said}: {len(ids)} tokens and {NEW_TOKENS} new ones are more than the {most} positions "
                             "of the model; shorten it")
        made.append((prompt, ids))
    return made
