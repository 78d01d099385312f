"""Windows of tokens: from text to what a model is calibrated and evaluated on.

Text comes from sources.py; for calibration also from the model itself (`self`). TextOptions.documents says how it
becomes windows of `seqlen` tokens:

  join       All documents, joined by a blank line (ptb: by a space), are one sequence of tokens, which is cut into
             windows that do not overlap. Evaluation uses all complete windows, calibration a random selection. (Wanda
             joins WikiText-2's training rows by a space, and its windows may overlap.) c4 is treated as in Wanda:
             calibration draws a document longer than the window, then a window within it; evaluation uses 256 windows
             of the first 1100 documents of the validation shard, joined by a space.
  separate   Each document is a window of its own, truncated at `seqlen` or padded and masked.

Where a BOS token stands, and how conversations are written out: encode.py.

Every user error is a ValueError of one line: the flag, what is wrong, what to do.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm import tqdm

from ..models import Tokenizer
from .encode import Encoder
from .perturb import perturbed
from .sample_self import sample_from_model
from .sources import AS_IT_COMES, HUB_SETS, TextOptions, Unusable, read
from .text import Document, Text

# In C4, 3 % of the documents are longer than 9,000 characters (about 2048 tokens), and 0.1 % longer than 36,000.
MAX_DRAWS = 20_000
# Calibration text beyond this many characters is not joined: tokenising takes 240 to 360 bytes of memory per token
# (measured). The training rows of WikiText-2 have 11 million characters.
MAX_CHARACTERS = 20_000_000


@dataclass(frozen=True, eq=False)
class Tokens:
    """Windows of token ids, with a description and a hash that identify them."""

    ids: torch.Tensor  # int64 (n, seqlen)
    mask: torch.Tensor | None  # bool (n, seqlen), False = padding; None = no padding
    source: str  # what was read and how it was cut; file names without their folders
    sha256: str  # of the shapes and bytes of ids and mask
    warnings: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """The number of tokens, without padding."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


@contextlib.contextmanager
def _naming(flag: str, spec: str) -> Iterator[None]:
    """Turn an Unusable into a ValueError that starts with the flag and its value."""
    try:
        yield
    except Unusable as error:
        raise ValueError(f"{flag} {spec}: {error}") from error.__cause__


# ----------------------------------------------------------------------------------------------- entry points


def calibration(tokenizer: Tokenizer, spec: str, *, nsamples: int, seqlen: int, seed: int,
                options: TextOptions = AS_IT_COMES, model: nn.Module | None = None, batch_size: int = 8,
                progress: bool = True) -> Tokens:
    """`nsamples` calibration windows of `seqlen` tokens; the same seed gives the same windows on every machine.

    If the text has fewer windows, all of them, with a warning. spec: as for `--calibration`. model, batch_size: used
    with spec "self" only. progress: whether to show a bar.

    Raises ValueError naming `--calibration` when the text cannot be used.
    """
    with _naming("--calibration", spec):
        _check_sizes(seqlen, nsamples, options)
        if spec == "self":
            ids, how = sample_from_model(model, tokenizer, nsamples, seqlen, seed, batch_size, progress)
            return _tokens(ids, None, how)
        text, mask, warnings = read(spec, options, evaluate=False), None, []
        encoder = Encoder(tokenizer, options.bos, text.chat)
        draw = random.Random(seed)  # Python's generator gives the same numbers on every machine
        if options.documents == "separate":
            order = draw.sample(range(len(text.documents)), len(text.documents))
            shuffled = (text.documents[i] for i in order)
            ids, mask, how = _document_windows(encoder, shuffled, seqlen, nsamples)
        elif spec == "c4":
            ids = _windows_in_documents(encoder, text.documents, nsamples, seqlen, draw, progress)
            how = f"{nsamples} random windows of {seqlen} in longer documents"
        else:
            limit = max(MAX_CHARACTERS, 10 * nsamples * seqlen)
            joined, cut_off = encoder.together(text, limit)
            if cut_off:
                warnings.append(f"{spec}: windows are drawn from its first {limit} characters only")
            windows = encoder.cut(joined, seqlen)
            ids = windows[draw.sample(range(len(windows)), min(nsamples, len(windows)))]
            how = f"joined by {_glue(text)!r}, {len(ids)} random of {len(windows)} windows of {seqlen}"
        if len(ids) < nsamples:
            warnings.append(f"{spec}: {len(ids)} windows instead of {nsamples}, the text holds no more")
        return _tokens(ids, mask, f"{text.source}; {how}{encoder.described()}, seed {seed}",
                       (*text.warnings, *warnings))


def evaluation(tokenizer: Tokenizer, spec: str, *, seqlen: int, options: TextOptions = AS_IT_COMES,
               max_windows: int | None = None, perturbation: str | None = None) -> Tokens:
    """All windows of an evaluation text in order, or the first `max_windows`.

    spec: as for `--evaluate`. perturbation: a kind from perturb.KINDS, applied to the text first; None: unchanged.

    Raises ValueError naming `--evaluate` when the text cannot be used.
    """
    with _naming("--evaluate", spec):
        _check_sizes(seqlen, 1, options)
        text, mask = read(spec, options, evaluate=True), None
        encoder = Encoder(tokenizer, options.bos, text.chat)
        if perturbation:
            changed = [_perturbed(document, perturbation) for document in text.documents]
            text = replace(text, documents=changed, source=f"{text.source}, with {perturbation} in a tenth of it")
        limits = (max_windows, HUB_SETS[spec].evaluation_windows if spec in HUB_SETS else None)
        limit = min((limit for limit in limits if limit is not None), default=None)
        if options.documents == "separate":
            ids, mask, how = _document_windows(encoder, text.documents, seqlen, limit)
        else:
            windows = encoder.cut(encoder.together(text)[0], seqlen)
            ids = windows[:limit]
            how = f"joined by {_glue(text)!r}, first {len(ids)} of {len(windows)} windows of {seqlen}"
        return _tokens(ids, mask, f"{text.source}; {how}{encoder.described()}", text.warnings)


def given(ids: torch.Tensor) -> Tokens:
    """Tokens from ids made by the caller, integers (n, seqlen). Raises ValueError for another shape or dtype."""
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integers or ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        raise ValueError("calibration: token ids must be integers (n, seqlen), at least one window of two; these are "
                         f"{ids.dtype} {tuple(ids.shape)}")
    return _tokens(ids.long().cpu(), None, f"{ids.shape[0]} windows of {ids.shape[1]} given as token ids")


def token_warning(tokens: Tokens, width: int) -> str | None:
    """A warning if there are fewer tokens than `width`, the inputs of the widest layer: E[x xᵀ] is then singular."""
    if tokens.n_tokens >= width:
        return None
    return (
        f"{tokens.n_tokens} calibration tokens are fewer than the {width} inputs of the widest layer: "
        "methods that invert its statistics lean on damping; raise --nsamples or --seqlen"
    )


def _check_sizes(seqlen: int, nsamples: int, options: TextOptions) -> None:
    """Raise Unusable for a number that is too small."""
    if seqlen < 2:
        raise Unusable(f"--seqlen is {seqlen}; it must be at least 2, a token and the one it predicts")
    if nsamples < 1:
        raise Unusable(f"--nsamples is {nsamples}; it must be at least 1")
    if options.documents not in ("join", "separate"):
        raise Unusable(f"--documents is {options.documents}; it must be join or separate")


def _tokens(ids: torch.Tensor, mask: torch.Tensor | None, source: str, warnings: tuple[str, ...] = ()) -> Tokens:
    """Tokens with their hash."""
    return Tokens(ids, mask, source, digest(ids, mask), warnings)


def digest(ids: torch.Tensor, mask: torch.Tensor | None) -> str:
    """sha256 of the shapes and bytes of ids (n, seqlen) and mask (n, seqlen) or None."""
    found = hashlib.sha256()
    for tensor in [ids] if mask is None else [ids, mask]:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------- windows


def _glue(text: Text) -> str:
    """What stands between joined documents: nothing between conversations, which end as their template says."""
    return "" if text.chat else text.glue


def _perturbed(document: Document, kind: str) -> Document:
    """A document changed as perturb.py does; of a conversation, what the messages say."""
    if not isinstance(document, list):
        return perturbed(document or "", kind)
    return [message | {"content": perturbed(message["content"] or "", kind)} for message in document]


def padding(tokenizer: Tokenizer, known: int | None = None) -> int:
    """The token that stands where a window has no text: the tokenizer's, else eos, else 0; among the `known` first."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None and (known is None or token < known))


def _document_windows(encoder: Encoder, documents: Iterable[Document], seqlen: int,
                      limit: int | None) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """(ids (n, seqlen), mask (n, seqlen) or None, description) with one window per document, at most `limit`.

    A document of a single token predicts nothing and is left out.
    """
    rows, n_cut = [], 0
    for document in documents:
        if len(rows) == limit:
            break
        row = encoder.start + encoder.document(document)
        if len(row) >= 2:
            rows.append(torch.tensor(row[:seqlen]))
            n_cut += len(row) > seqlen
    if not rows:
        raise Unusable("no document has two tokens or more; use another text")
    ids = torch.full((len(rows), seqlen), padding(encoder.tokenizer))
    mask = torch.zeros(len(rows), seqlen, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    how = f"{len(rows)} documents, each a window of {seqlen} ({n_cut} of them cut)"
    return ids, None if mask.all() else mask, how


def _windows_in_documents(encoder: Encoder, documents: Sequence[Document], nsamples: int, seqlen: int,
                          draw: random.Random, progress: bool) -> torch.Tensor:
    """Ids (nsamples, seqlen), drawn exactly as Wanda's get_c4 does after random.seed(seed), so they are the same."""
    windows, length = [], seqlen - len(encoder.start)
    for _ in tqdm(range(nsamples), desc="calibration windows", disable=not progress):
        for _ in range(MAX_DRAWS):
            row = encoder.document(documents[draw.randint(0, len(documents) - 1)])
            if len(row) > length:
                break
        else:
            raise Unusable(f"no document longer than {seqlen} tokens in {MAX_DRAWS} draws; lower --seqlen")
        start = draw.randint(0, len(row) - length - 1)
        windows.append(encoder.start + row[start : start + length])
    return torch.tensor(windows)
