"""Vocabulary: the model's tokenizer as llama.cpp reads it, or a refusal where llama.cpp would cut text otherwise.

Byte-level BPE ("gpt2"): tokens, merges, and the name of the way text is cut before merging. llama.cpp's converter finds
that name by the hash of an encoded test string, which knows published vocabularies only; here it is read off the
tokenizer's own rules, so that it holds for any vocabulary.

BPE with byte fallback, as SentencePiece makes it ("llama"): llama.cpp merges whatever pair has the best score, so
merges become scores. That is the same only if every merge of two tokens to a third is in the list and all merges to one
token stand side by side, which is checked.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = ("ByteLevel", True)
PRE = {  # the parts of a pre-tokenizer: (llama.cpp's name, whether whole words in the vocabulary are taken unmerged)
    (BYTES,): ("gpt-2", False),
    (("Digits", True), BYTES): ("smollm", False),
    (("Split", WORDS + r"\p{N}{1,3}" + REST), ("ByteLevel", False)): ("llama-bpe", True),
    (("Split", WORDS + r"\p{N}" + REST), ("ByteLevel", False)): ("qwen2", False),
}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "\u2581"  # SentencePiece's


@dataclass
class Vocabulary:
    """What the file says of the tokenizer.

    model: "gpt2", with pre and merges, or "llama", with scores and prefix (whether a space is put before the text).
    types: of the tokens. warnings: what llama.cpp does otherwise.
    """

    model: str
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    prefix: bool = False
    warnings: list[str] = field(default_factory=list)


def describe(tokenizer: Any, size: int) -> Vocabulary:
    """The Vocabulary of a fast tokenizer, padded to the model's `size`.

    Raises ValueError naming `--format` for a tokenizer that llama.cpp would not follow.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise refused("is written in Python, without a tokenizer.json")
    spec = json.loads(core.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise refused(f"is of type {model['type']}, not BPE")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise refused("marks parts of words")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens = listed(model["vocab"] | {token["content"]: i for i, token in added.items()}, size)
    found = sentencepiece(spec, tokens, merges) if model.get("byte_fallback") else byte_level(spec, tokens, merges)
    for i, token in enumerate(tokens):
        if token is None:
            found.tokens[i], found.types[i] = f"[PAD{i}]", UNUSED
        elif i in added:
            found.types[i] = CONTROL if added[i]["special"] else USER
            if found.model == "llama" and found.types[i] == USER:
                found.tokens[i] = token.replace(SPACE, " ")
    if found.model == "llama" and model.get("unk_token") in model["vocab"]:
        found.types[model["vocab"][model["unk_token"]]] = UNKNOWN
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added.values()):
        found.warnings.append("model.gguf: some added tokens take the spaces beside them or want to stand alone, which "
                              "llama.cpp ignores")
    return found


def refused(why: str) -> ValueError:
    """The error for a tokenizer that cannot be written."""
    return ValueError(f"--format gguf: llama.cpp cannot follow this model's tokenizer (it {why}); use another format")


def listed(vocab: dict[str, int], size: int) -> list[str | None]:
    """The tokens by their ids; None where there is none."""
    tokens: list[str | None] = [None] * size
    for token, i in vocab.items():
        if i >= size:
            raise refused(f"has a token {i}, the model only {size}")
        tokens[i] = token
    return tokens


def parts(spec: dict | None, inner: str) -> list[dict]:
    """The parts of a normalizer or pre-tokenizer; inner: what its list is called in a Sequence."""
    return [] if spec is None else spec[inner] if spec["type"] == "Sequence" else [spec]


def byte_level(spec: dict, tokens: list, merges: list[tuple]) -> Vocabulary:
    """Of a byte-level BPE."""
    cuts, warnings = [], []
    for part in parts(spec["pre_tokenizer"], "pretokenizers"):
        cuts.append({"ByteLevel": lambda p: ("ByteLevel", p["use_regex"] and not p["add_prefix_space"]),
                     "Digits": lambda p: ("Digits", p["individual_digits"]),
                     "Split": lambda p: ("Split", p["pattern"].get("Regex") if p["behavior"] == "Isolated" and not
                                         p["invert"] else None)}.get(part["type"], lambda p: (p["type"],))(part))
        if part.get("add_prefix_space"):
            raise refused("puts a space before the text")
    pre, whole = PRE.get(tuple(cuts), (None, None))
    if pre is None:
        raise refused("cuts text into words by rules that it has no name for")
    if whole != spec["model"].get("ignore_merges", False):
        raise refused(f"has ignore_merges {not whole}, {pre} in llama.cpp {whole}")
    normal = [part["type"] for part in parts(spec["normalizer"], "normalizers")]
    if normal == ["NFC"]:
        warnings.append("model.gguf: the tokenizer composes characters first (NFC), llama.cpp takes them as they are")
    elif normal:
        raise refused(f"normalises text ({', '.join(normal)})")
    return Vocabulary("gpt2", list(tokens), [NORMAL] * len(tokens), pre=pre, merges=[" ".join(m) for m in merges],
                      warnings=warnings)


def sentencepiece(spec: dict, tokens: list, merges: list[tuple]) -> Vocabulary:
    """Of a BPE with byte fallback."""
    prefix, warnings = space_rules(spec)
    known = {token for token in tokens if token is not None}
    if not {f"<0x{byte:02X}>" for byte in range(256)} <= known:
        raise refused("lacks some of the 256 bytes")
    made = [left + right for left, right in merges]
    order = [token for token, _ in groupby(made)]
    added = {token["content"] for token in spec["added_tokens"]}
    every = sum(token[:i] in known and token[i:] in known for token in known - added for i in range(1, len(token)))
    if len(order) != len(set(order)) or every != len(set(merges)):
        raise refused("merges by a list that is no order of scores")
    rank = {token: i for i, token in enumerate(order)}
    scores = [-float(rank.get(token, len(rank))) for token in tokens]
    types = [BYTE if token and re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL for token in tokens]
    return Vocabulary("llama", list(tokens), types, scores=scores, prefix=prefix, warnings=warnings)


def space_rules(spec: dict) -> tuple[bool, list[str]]:
    """(whether a space is put before the text, warnings) of a tokenizer that writes spaces as SPACE."""
    prefix, spaces, warnings = False, False, []
    for part in (*parts(spec["normalizer"], "normalizers"), *parts(spec["pre_tokenizer"], "pretokenizers")):
        kind = part["type"]
        if kind == "Prepend" and part["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE:
            spaces = True
        elif kind == "Metaspace" and part["replacement"] == SPACE and not part["split"]:
            spaces, prefix = True, part["prepend_scheme"] != "never"
            if prefix:
                warnings.append("model.gguf: llama.cpp puts a space also before text that begins with one, which the "
                                "tokenizer does not")
            if part["prepend_scheme"] == "first":
                warnings.append("model.gguf: llama.cpp puts a space before the text after a special token as well, the "
                                "tokenizer only at the very beginning")
        elif not (kind == "Split" and spaces and part["pattern"] == {"String": " "}):  # no spaces are left
            raise refused(f"treats spaces by rules ({kind}) that it does not have")
    if not spaces:
        raise refused(f"does not write spaces as {SPACE}")
    return prefix, warnings


def write(out: Any, tokenizer: Any, config: Any, found: Vocabulary) -> None:
    """Write tokens, merges or scores, special tokens and the chat template. out: a gguf.GGUFWriter."""
    out.add_tokenizer_model(found.model)
    out.add_tokenizer_pre(found.pre)
    out.add_token_list(found.tokens)
    out.add_token_types(found.types)
    if found.model == "llama":
        out.add_token_scores(found.scores)
        out.add_add_space_prefix(found.prefix)
    else:
        out.add_token_merges(found.merges)
    for name, add in {"bos": out.add_bos_token_id, "eos": out.add_eos_token_id, "unk": out.add_unk_token_id,
                      "pad": out.add_pad_token_id}.items():
        if getattr(tokenizer, f"{name}_token_id", None) is not None:
            add(getattr(tokenizer, f"{name}_token_id"))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if others := [i for i in ends if i is not None and i != tokenizer.eos_token_id]:
        out.add_eot_token_id(others[-1])
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    out.add_add_bos_token(whole[:1] != bare[:1] and whole[0] == tokenizer.bos_token_id)
    out.add_add_eos_token(whole[-1:] != bare[-1:] and whole[-1] == tokenizer.eos_token_id)
    if template := getattr(tokenizer, "chat_template", None):
        out.add_chat_template(template if isinstance(template, str) else
                              [{"name": name, "template": text} for name, text in template.items()])
