"""Prompts: how often the model continues the user's own prompts as expected.

The file has one JSON object per line: {"prompt": "The capital of France is", "expected": "Paris"}. Both are strings.
With "choices", a list of strings that contains `expected`, the model chooses instead of generating.

    starts_with   share of the continuations that begin with `expected`, ignoring surrounding white space
    contains      share of the continuations that contain `expected`
    chosen        share of the prompts with choices where `expected` is the most likely choice: the highest sum of its
                  tokens' log-probabilities after the prompt and a space, as lm-eval's `acc`; the first in case of ties

Continuations are greedy, NEW_TOKENS tokens long (more if the longest `expected` needs more), and computed one prompt at
a time, so that neither a checkpoint's generation settings nor other prompts in a batch can affect them.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import models
from ..data import Tokens, embedding, encode
from ..models import Tokenizer
from ..runtime.flag import Settings, flag
from ..runtime.inputs import parse_object, read_text
from . import Found, Subject
from .greedy import greedy

NEW_TOKENS = 32
higher = ("starts_with", "contains", "chosen")


@dataclass(frozen=True)
class Config:
    prompts: str | None = flag(None, "file of prompts, one {\"prompt\": ..., \"expected\": ...} per line, optionally "
                                     "with \"choices\": [...]: measure how often the model answers as expected",
                               section="evaluation", bears_on="measuring")


def asked(cfg: Settings) -> bool:
    """Whether there is a file of prompts."""
    return bool(cfg.prompts)


def refuse(cfg: Settings) -> None:
    """Raise ValueError naming the line of the file that is wrong."""
    read(cfg.prompts)


def prepare(cfg: Settings, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Raise ValueError naming the line of the file that does not fit the model."""
    encoded(cfg.prompts, model, tokenizer)


def identity(cfg: Settings, texts: dict[str, Tokens]) -> list[str]:
    """The hash of the prompts."""
    return [digest(cfg.prompts)]


def measure(subject: Subject) -> Found:
    """The shares of `evaluate`; the answers become the record's `prompts`."""
    shares, how, answers = evaluate(subject.model, subject.tokenizer, subject.cfg.prompts, device=subject.cfg.device)
    return Found(shares, how, {"prompts": answers})


@dataclass(frozen=True)
class Prompt:
    """One line of the file. line: its number, from 1. choices: empty if there are none."""

    line: int
    prompt: str
    expected: str
    choices: tuple[str, ...] = ()


def read(path: str) -> list[Prompt]:
    """The prompts in a file. Raises ValueError naming `--prompts` and the line that is wrong."""
    try:
        content = read_text(path)
    except ValueError as error:
        raise ValueError(f"--prompts {path}: {error}") from None
    lines = content.split("\n")
    suite = [parse(line, n, f"--prompts {path}: line {n}: ") for n, line in enumerate(lines, 1) if line.strip()]
    if not suite:
        raise ValueError(f'--prompts {path}: holds no prompt; give lines like {{"prompt": "...", "expected": "..."}}')
    return suite


def parse(line: str, number: int, where: str) -> Prompt:
    """The Prompt on one line. where: the start of the error message."""
    try:
        row = parse_object(line)
    except ValueError as error:
        raise ValueError(f'{where}{error}; give {{"prompt": "...", "expected": "..."}}') from None
    for key in ("prompt", "expected"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'{where}"{key}" must be text that is not empty')
    if unknown := sorted(set(row) - {"prompt", "expected", "choices"}):
        raise ValueError(f'{where}"{unknown[0]}" is not known; there are "prompt", "expected" and "choices"')
    choices = row.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f'{where}"choices" must be a list of texts that are not empty')
    if "choices" in row and row["expected"] not in choices:
        raise ValueError(f'{where}"expected" must be one of the "choices"')
    return Prompt(number, row["prompt"], row["expected"], tuple(choices))


def digest(path: str) -> str:
    """sha256 (hex) of the prompts in a file."""
    return hashlib.sha256(repr(read(path)).encode()).hexdigest()


def encoded(path: str, model: nn.Module, tokenizer: Tokenizer) -> tuple[list[tuple[Prompt, list[int]]], int]:
    """([(Prompt, its token ids)], number of tokens to generate).

    Raises ValueError naming `--prompts` and the line whose prompt and continuation do not fit the model.
    """
    suite = read(path)
    new = max([NEW_TOKENS, *(len(ids_of(tokenizer, " " + p.expected, False)) for p in suite if not p.choices)])
    made, most = [], models.max_positions(model)
    for p in suite:
        ids = ids_of(tokenizer, p.prompt.rstrip() if p.choices else p.prompt)
        for text in (ids, *(ids_of(tokenizer, f"{p.prompt.rstrip()} {choice}") for choice in p.choices)):
            embedding.check(torch.tensor(text, dtype=torch.long), model, tokenizer, f"--prompts {path}: line {p.line}")
        room = max((len(ids_of(tokenizer, " " + c, False)) for c in p.choices), default=new)
        if most and len(ids) + room > most:
            raise ValueError(f"--prompts {path}: line {p.line}: {len(ids)} tokens and {room} new ones are more than "
                             f"the {most} positions of the model; shorten the prompt")
        made.append((p, ids))
    return made, new


def ids_of(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """The token ids of a text, by default with special tokens. Raises ValueError naming `--prompts`."""
    try:
        return encode.encode(tokenizer, text, special)
    except encode.Unusable as error:
        raise ValueError(f"--prompts: {error}") from error


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Tokenizer, path: str, *,
             device: str = "cpu") -> tuple[dict[str, float], dict[str, dict], list[dict]]:
    """({"NAME/starts_with": share, ...}, {"NAME/starts_with": how it was measured, ...}, answers).

    NAME: the file's stem. answers: one {"line", "answer", "right"} per prompt; right: whether the answer begins with
    `expected`, or `expected` was chosen.
    """
    made, new = encoded(path, model, tokenizer)
    marks, answers = {"starts_with": [], "contains": [], "chosen": []}, []
    with models.resident(model, device), \
            models.own_code(f"--prompts {path}: {type(model).__name__} cannot be run on them"):
        for p, ids in made:
            ids = torch.tensor([ids], device=device)
            if p.choices:
                answer = max(p.choices, key=lambda c: likelihood(model, tokenizer, p, c, device))  # the first of equals
                right = answer == p.expected
                marks["chosen"].append(right)
            else:
                answer = tokenizer.decode(greedy(model, ids, new), skip_special_tokens=True)
                right = answer.strip().startswith(p.expected.strip())
                marks["starts_with"].append(right)
                marks["contains"].append(p.expected.strip() in answer)
            answers.append({"line": p.line, "answer": answer, "right": right})
    name = Path(path).stem
    shares = {f"{name}/{key}": sum(found) / len(found) for key, found in marks.items() if found}
    how = {f"{name}/{key}": {"samples": len(found)} | ({} if key == "chosen" else {"new_tokens": new})
           for key, found in marks.items() if found}
    return shares, how, answers


def likelihood(model: nn.Module, tokenizer: Tokenizer, p: Prompt, choice: str, device: str) -> float:
    """Sum of the log-probabilities of a choice's tokens after the prompt and a space."""
    context = p.prompt.rstrip()
    start, whole = len(ids_of(tokenizer, context)), ids_of(tokenizer, f"{context} {choice}")
    ids = torch.tensor([whole], device=device)
    log_p = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].double().log_softmax(-1)
    return log_p.gather(1, ids[0, start:, None]).sum().item()
