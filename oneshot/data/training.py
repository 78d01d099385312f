"""Training text: what `--heal-data` names, mixed, tokenised and packed into windows that lie on disk.

    source   a text as for `--calibration`, or WEIGHT*SOURCE; weights say how many tokens come from each. It is read
             from its beginning, as far as these need it (pieces.py)
    piece    a document, or a part of a longer one (of at most PIECE characters, fewer in a short text), which is then
             treated as a document
    window   `seqlen` consecutive tokens of the packed documents

Pieces come in random order, always from the source furthest behind its weight, and again once a source is used up.
Every document ends with the tokenizer's end-of-text token. Positions start at 0 with each document, from which
transformers builds an attention mask that keeps documents apart. With `--bos each` there is a BOS token wherever they
do: at the start of each piece (as with `first`), and of each window in place of what it would begin with. Of each
source, the first pieces are held out.

    FOLDER/train.npy, held.npy               token ids, uint32
    FOLDER/train_starts.npy, held_starts.npy where documents begin, int64
    FOLDER/text.json                         what was read, and the hashes of these files, written last
    FOLDER/pieces/                           the sources' pieces, until the others are written
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ..models import Tokenizer
from ..runtime import sealed
from ..runtime.files import array_on_disk
from .columns import has_text
from .encode import Encoder
from .pieces import PIECE, PIECES, Sampled, Source, gather
from .sources import Stream, TextOptions, Unusable, stream

GRAM = 13  # tokens; text is taken to be the same where so many agree, as in arXiv 2005.14165, appendix C
Sampler = Callable[[int], list[list[int]]]
IGNORED = -100  # the label of a token that is not predicted: the first of a document


class Windows(Dataset):
    """Windows of packed documents. ids: integers (n·T,). starts: ascending positions in ids where documents begin."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, seqlen: int) -> None:
        self.ids, self.starts, self.seqlen = ids, starts, seqlen

    def __len__(self) -> int:
        """The number of complete windows."""
        return len(self.ids) // self.seqlen

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Window i: `input_ids`, `position_ids`, `labels`, int64 (T,), and its number, `index`."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        at = np.arange(i * self.seqlen, (i + 1) * self.seqlen)
        ids = self.ids[at].astype(np.int64)
        begins = np.concatenate([[0], self.starts])[np.searchsorted(self.starts, at, side="right")]
        labels = np.where(at == begins, IGNORED, ids)
        return {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(at - np.maximum(begins, at[0])),
                "labels": torch.from_numpy(labels), "index": torch.tensor(i)}

    @property
    def sha256(self) -> str:
        """Of the ids and of where documents begin, hex."""
        found = hashlib.sha256()
        for array in (self.ids, self.starts):
            found.update(f"{array.shape}".encode() + np.ascontiguousarray(array).data)
        return found.hexdigest()


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and windows held out. about: what was read, plain values, with `warnings`."""

    train: Windows
    held: Windows
    about: dict


def mixture(text: str) -> list[tuple[float, str]]:
    """[(weight, source)] of `--heal-data`, files by their whole path. Raises ValueError naming the flag."""
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d*\.?\d+)\*(.+)", entry)
        weight, source = (float(match[1]), match[2]) if match else (1.0, entry)
        source = os.path.expanduser(source)  # the shell does that only at the start of a word
        if not 0 < weight < math.inf or source in [name for _, name in found]:
            raise ValueError(f"--heal-data {entry}: give each text once, with a weight above 0, such as "
                             "0.7*c4,0.3*a.txt")
        found.append((weight, source))
    if not found:
        raise ValueError("--heal-data: nothing given; name a text such as c4 or a file")
    return found


def prepare(spec: str, tokenizer: Tokenizer, folder: Path, *, tokens: int, held: int, seqlen: int, seed: int,
            options: TextOptions, held_out: str | None = None, sample: Sampler | None = None,
            progress: bool = True) -> TrainingText:
    """The text of `--heal-data`, read from `folder` if it lies there already.

    tokens, held: how many tokens to train on and to hold out, both rounded up to windows. held_out: a text to take the
    held-out windows from instead. options: as for calibration. sample(n): n windows of token ids sampled from the dense
    model, for the text `self`.

    Raises ValueError naming `--heal-data` (or `--heal-held-out`) when a text cannot be used.
    """
    sizes = {"train": -(-tokens // seqlen) * seqlen, "held": -(-held // seqlen) * seqlen}
    asked = {"spec": spec, "held_out": held_out, "sizes": sizes, "seqlen": seqlen, "seed": seed,
             "options": str(options), "tokenizer": fingerprint(tokenizer), "files": _files(spec, held_out)}
    done = folder / "text.json"
    about = sealed.kept(done)
    if about.get("asked") != asked:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (done, *(folder / f"{name}.npy" for name in sizes)):
            old.unlink(missing_ok=True)
        need, free = 2 * 4 * sum(sizes.values()), shutil.disk_usage(folder).free
        if need > free:
            raise ValueError(f"--heal-tokens {tokens}: takes {need / 2**30:.3g} GiB in {folder}, the disk has "
                             f"{free / 2**30:.3g} left; ask for fewer, or save elsewhere")

        def drawn(share: float) -> list[list[int]]:
            return sample(math.ceil(share * sum(sizes.values()) / seqlen) + 1)
        sources = _open("--heal-data", spec, tokenizer, options, seed, drawn)
        others = _open("--heal-held-out", held_out, tokenizer, options, seed, drawn) if held_out else sources
        texts = {"--heal-data": sources} | ({"--heal-held-out": others} if held_out else {})
        with _beside(folder / "pieces") as place:
            for flag, mixed in texts.items():
                size = sum(sizes.values()) if len(texts) == 1 else sizes["train" if mixed is sources else "held"]
                for number, source in enumerate(mixed):
                    _gather(flag, source, place / f"{flag}-{number}", math.ceil(source.share * size), progress)
            for name, mixed in (("held", others), ("train", sources)):
                for source in mixed:
                    source.holding, source.taken = name == "held", 0
                _write(folder / name, mixed, sizes[name], "--heal-data" if mixed is sources else "--heal-held-out")
                if options.bos == "each":
                    _begin_windows(folder / f"{name}.npy", seqlen, tokenizer.bos_token_id)
        about = {"asked": asked, **_described(sources, sizes["train"]), "sha256": sealed.digest(folder / "train.npy"),
                 "warnings": [warning for flag, mixed in texts.items() for warning in _warnings(flag, mixed)]}
        sealed.keep(about, done, [f"{name}{part}.npy" for name in sizes for part in ("", "_starts")])
    windows = {name: Windows(np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}_starts.npy"),
                             seqlen) for name in sizes}
    return TrainingText(windows["train"], windows["held"], {key: about[key] for key in about if key != "asked"})


def check(spec: str, tokenizer: Tokenizer, options: TextOptions, held_out: str | None = None) -> None:
    """Raise what `prepare` would, as far as that shows at the beginning of the texts."""
    for flag, text in (("--heal-data", spec), ("--heal-held-out", held_out)):
        for source in _open(flag, text, tokenizer, options, 0, lambda share: []) if text else []:
            with _naming(flag, source):
                characters, found = 0, isinstance(source.encoder, Sampled)
                for document in source.text.documents:
                    characters, found = characters + len(document or ""), found or has_text(document)
                    if found and characters >= PIECES * PIECE:
                        break
                if not found:
                    raise Unusable("holds no text; use another one")


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells two tokenizers apart, short."""
    whole = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template],
                       default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def files_of(*specs: str | None) -> list[Path]:
    """The files among the texts, in order."""
    names = [os.path.expanduser(name) for spec in specs if spec for _, name in mixture(spec)]
    return [Path(name) for name in names if os.path.isfile(name)]


def _files(spec: str, held_out: str | None) -> list[list]:
    """[path, size, time of change] of every file among the texts, to see that none was changed."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(spec, held_out)]


def _open(flag: str, spec: str, tokenizer: Tokenizer, options: TextOptions, seed: int,
          sample: Callable[[float], list[list[int]]]) -> list[Source]:
    """The sources of a mixture. sample(share): documents sampled from the model, for a text of that share."""
    parts, found = mixture(spec), []
    whole = sum(weight for weight, _ in parts)
    for number, (weight, name) in enumerate(parts):
        if name == "self":
            text = Stream(iter(sample(weight / whole)), "sampled from the dense model", chat=True)
            found.append(Source(name, weight / whole, text, Sampled(tokenizer), random.Random(f"{seed}/self")))
            continue
        try:
            text = stream(name, options)
            encoder = Encoder(tokenizer, "first" if options.bos == "each" else options.bos, text.chat)
        except Unusable as error:
            raise ValueError(f"{flag} {name}: {error}") from error.__cause__
        draw = random.Random(f"{seed}/{number}")  # not its name: a text may lie anywhere
        found.append(Source(name, weight / whole, text, encoder, draw))
    return found


@contextlib.contextmanager
def _naming(flag: str, source: Source) -> Iterator[None]:
    """Turn an Unusable into a ValueError that starts with the flag and the source."""
    try:
        yield
    except Unusable as error:
        raise ValueError(f"{flag} {source.name}: {error}") from error.__cause__


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder, which is there within the context; what a killed process has left of it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gather(flag: str, source: Source, file: Path, tokens: int, progress: bool) -> None:
    """Read so much of a source that `tokens` can be drawn."""
    bar = tqdm(total=tokens, desc=f"text of {flag}", unit=" tokens", disable=not progress, leave=False)
    with _naming(flag, source):
        source.pieces = gather(source.text, source.encoder, file, tokens, bar)


def _write(path: Path, sources: list[Source], size: int, flag: str) -> None:
    """Fill PATH.npy with `size` tokens of the sources, and note in PATH_starts.npy where documents begin.

    Raises OSError where the disk is full, before anything is written.
    """
    ids = array_on_disk(path.with_suffix(".npy"), np.uint32, (size,))
    starts, at = [], 0
    while at < size:
        source = max(sources, key=lambda s: s.share * at - s.taken)
        with _naming(flag, source):
            piece = source.next()[: size - at]
        starts.append(at)
        ids[at : at + len(piece)] = piece
        at, source.taken = at + len(piece), source.taken + len(piece)
    ids.flush()
    np.save(path.with_name(f"{path.name}_starts.npy"), np.asarray(starts, np.int64))


def _begin_windows(file: Path, seqlen: int, token: int) -> None:
    """Let each window of a file of token ids begin with a token, in place of its first."""
    ids = np.load(file, mmap_mode="r+")
    ids[::seqlen] = token
    ids.flush()


def _described(sources: list[Source], tokens: int) -> dict[str, Any]:
    """Plain values for the record."""
    return {"tokens": tokens, "sources": [{"source": s.described(), "share": s.share, "tokens": s.taken,
                                           "passes": s.passes} for s in sources]}


def _warnings(flag: str, sources: list[Source]) -> list[str]:
    """What a reader of the run's numbers should know of its texts, one line each."""
    again = [f"{flag} {s.name}: read {s.passes} times, it holds fewer tokens than were asked for; lower --heal-tokens "
             "or add text" for s in sources if s.passes > 1]
    return [*(f"{flag} {warning}" for s in sources for warning in s.text.warnings), *again]


def overlap(train: np.ndarray, other: np.ndarray, chunk: int = 2**22) -> float:
    """The share of the 13-grams of `other`, integers (m, T), that occur in `train`, integers (n,)."""
    wanted = np.unique(np.concatenate([_grams(row) for row in other])) if other.size else np.empty(0, np.uint64)
    seen = np.zeros(len(wanted), bool)
    for begin in range(0, max(len(train) - GRAM + 1, 0), chunk):
        seen |= np.isin(wanted, _grams(np.asarray(train[begin : begin + chunk + GRAM - 1])))
    return float(seen.mean()) if len(seen) else 0.0


def _grams(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each run of GRAM ids."""
    n = len(ids) - GRAM + 1
    if n < 1:
        return np.empty(0, np.uint64)
    found, ids = np.zeros(n, np.uint64), ids.astype(np.uint64) + np.uint64(1)
    for k in range(GRAM):
        found = found * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + n] * np.uint64(0xBF58476D1CE4E5B9)
    return found ^ (found >> np.uint64(31))
