"""Windows of tokens: how text becomes what a model is calibrated and measured on.

Where text comes from: sources.py; and `self`, calibration only: sampled from the model itself.

How it becomes windows of `seqlen` tokens (TextOptions.documents):
  join       All documents make one stream of tokens, glued by a blank line (ptb: by a space), cut into
             windows that do not overlap. Evaluation takes all but the incomplete last one, calibration draws
             some at random. (Wanda glues WikiText-2's training rows by a space, its windows may overlap.)
             c4 is done as in Wanda: calibration draws a document longer than the window and a window in it;
             evaluation takes 256 windows of the validation shard's first 1100 documents, glued by a space.
  separate   Each document is a window of its own, cut at `seqlen` or padded and masked.

What a user can get wrong is a ValueError of one line: the flag, what is wrong, what to do.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from .perturb import perturbed
from .sample_self import sample_from_model
from .sources import HUB_SETS, TextOptions, Unusable, read

AS_IT_COMES = TextOptions()
# Of C4's documents 3 % are longer than 9,000 characters (some 2048 tokens) and 0.1 % than 36,000.
MAX_DRAWS = 20_000
# Calibration text beyond this many characters is not joined: tokenising was measured to take 240 to 360 bytes
# of memory a token. The training rows of WikiText-2 are 11 million characters.
MAX_CHARACTERS = 20_000_000


@dataclass(frozen=True, eq=False)
class Tokens:
    """Windows of token ids, and which ones they are."""

    ids: torch.Tensor  # int64 (n, seqlen)
    mask: torch.Tensor | None  # bool (n, seqlen), False = padding; None = no padding
    source: str  # what was read and how it was cut; file names without their folders
    sha256: str  # of the shapes and bytes of ids and mask
    warnings: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Real tokens: padding does not count."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


@contextlib.contextmanager
def _naming(flag: str, spec: str):
    try:
        yield
    except Unusable as error:
        raise ValueError(f"{flag} {spec}: {error}") from error.__cause__


# ----------------------------------------------------------------------------------------------- entry points


def calibration(
    tokenizer,
    spec: str,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    options: TextOptions = AS_IT_COMES,
    model=None,
    batch_size: int = 8,
    progress: bool = True,
) -> Tokens:
    """`nsamples` windows of `seqlen` tokens, the same for the same seed on every machine; where the text
    holds fewer, all it holds, with a warning. `model` and `batch_size` serve spec `self`."""
    with _naming("--calibration", spec):
        _check_sizes(seqlen, nsamples, options)
        if spec == "self":
            ids, how = sample_from_model(model, tokenizer, nsamples, seqlen, seed, batch_size, progress)
            return _tokens(ids, None, how)
        text, mask, warnings = read(spec, options, evaluate=False), None, []
        draw = random.Random(seed)  # Python's generator gives the same stream on every machine
        if options.documents == "separate":
            order = draw.sample(range(len(text.documents)), len(text.documents))
            shuffled = (text.documents[i] for i in order)
            ids, mask, how = _document_windows(tokenizer, shuffled, seqlen, nsamples)
        elif spec == "c4":
            ids = _windows_in_documents(tokenizer, text.documents, nsamples, seqlen, draw, progress)
            how = f"{nsamples} random windows of {seqlen} in longer documents"
        else:
            limit = max(MAX_CHARACTERS, 10 * nsamples * seqlen)
            joined = text.joined(limit)
            if len(joined) == limit:
                warnings.append(f"{spec}: windows are drawn from its first {limit} characters only")
            windows = _cut(_tokenize(tokenizer, joined), seqlen)
            ids = windows[draw.sample(range(len(windows)), min(nsamples, len(windows)))]
            how = f"joined by {text.glue!r}, {len(ids)} random of {len(windows)} windows of {seqlen}"
        if len(ids) < nsamples:
            warnings.append(f"{spec}: {len(ids)} windows instead of {nsamples}, the text holds no more")
        return _tokens(ids, mask, f"{text.source}; {how}, seed {seed}", (*text.warnings, *warnings))


def evaluation(
    tokenizer,
    spec: str,
    *,
    seqlen: int,
    options: TextOptions = AS_IT_COMES,
    max_windows: int | None = None,
    perturbation: str | None = None,
) -> Tokens:
    """All windows of the text in order, or the first `max_windows`; first changed as in perturb.py, if so named."""
    with _naming("--evaluate", spec):
        _check_sizes(seqlen, 1, options)
        text, mask = read(spec, options, evaluate=True), None
        if perturbation:
            changed = [perturbed(document or "", perturbation) for document in text.documents]
            text = replace(text, documents=changed, source=f"{text.source}, with {perturbation} in a tenth of it")
        limits = (max_windows, HUB_SETS[spec].evaluation_windows if spec in HUB_SETS else None)
        limit = min((limit for limit in limits if limit is not None), default=None)
        if options.documents == "separate":
            ids, mask, how = _document_windows(tokenizer, text.documents, seqlen, limit)
        else:
            windows = _cut(_tokenize(tokenizer, text.joined()), seqlen)
            ids = windows[:limit]
            how = f"joined by {text.glue!r}, first {len(ids)} of {len(windows)} windows of {seqlen}"
        return _tokens(ids, mask, f"{text.source}; {how}", text.warnings)


def given(ids: torch.Tensor) -> Tokens:
    """Windows the caller has made himself: token ids, int64 (n, seqlen)."""
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"calibration: token ids must be integers (n, seqlen), these are {ids.dtype} "
                         f"{tuple(ids.shape)}")
    return _tokens(ids.long().cpu(), None, f"{ids.shape[0]} windows of {ids.shape[1]} given as token ids")


def token_warning(tokens: Tokens, width: int) -> str | None:
    """What to say when a layer of `width` inputs sees fewer tokens than that: E[x xᵀ] is then singular."""
    if tokens.n_tokens >= width:
        return None
    return (
        f"{tokens.n_tokens} calibration tokens are fewer than the {width} inputs of the widest layer: "
        "methods that invert its statistics lean on damping; raise --nsamples or --seqlen"
    )


def _check_sizes(seqlen: int, nsamples: int, options: TextOptions) -> None:
    if seqlen < 2:
        raise Unusable(f"--seqlen is {seqlen}; it must be at least 2, a token and the one it predicts")
    if nsamples < 1:
        raise Unusable(f"--nsamples is {nsamples}; it must be at least 1")
    if options.documents not in ("join", "separate"):
        raise Unusable(f"--documents is {options.documents}; it must be join or separate")


def _tokens(ids: torch.Tensor, mask: torch.Tensor | None, source: str, warnings=()) -> Tokens:
    digest = hashlib.sha256()
    for tensor in [ids] if mask is None else [ids, mask]:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return Tokens(ids, mask, source, digest.hexdigest(), warnings)


# ---------------------------------------------------------------------------------------------------- windows


def _tokenize(tokenizer, text: str | None) -> list[int]:
    """Ids with the tokenizer's default special tokens, as in the papers: a bos, if any, only at the start.
    verbose=False: no warning that the text is longer than the model's context, it is cut afterwards."""
    return tokenizer(text or "", verbose=False)["input_ids"]


def _cut(activations: list[int], seqlen: int) -> torch.Tensor:
    """(n, seqlen): consecutive windows of the stream, its tail dropped."""
    n = len(activations) // seqlen
    if n == 0:
        raise Unusable(
            f"{len(activations)} tokens, shorter than one window of {seqlen}; "
            f"use --seqlen {len(activations)} or less, or more text"
        )
    return torch.tensor(activations[: n * seqlen]).view(n, seqlen)


def _document_windows(tokenizer, documents: Iterable[str | None], seqlen: int, limit: int | None):
    """ids (n, seqlen), mask (n, seqlen) or None, and a description. A document of one token predicts nothing
    and is left out; reading stops after `limit` documents."""
    rows, n_cut = [], 0
    for document in documents:
        if len(rows) == limit:
            break
        row = _tokenize(tokenizer, document)
        if len(row) >= 2:
            rows.append(torch.tensor(row[:seqlen]))
            n_cut += len(row) > seqlen
    if not rows:
        raise Unusable("no document has two tokens or more; use another text")
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    ids = torch.full((len(rows), seqlen), next(token for token in candidates if token is not None))
    mask = torch.zeros(len(rows), seqlen, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    how = f"{len(rows)} documents, each a window of {seqlen} ({n_cut} of them cut)"
    return ids, None if mask.all() else mask, how


def _windows_in_documents(tokenizer, documents, nsamples, seqlen, draw, progress) -> torch.Tensor:
    """(nsamples, seqlen): the draws of Wanda's get_c4 after random.seed(seed), so its windows are ours."""
    windows = []
    for _ in tqdm(range(nsamples), desc="calibration windows", disable=not progress):
        for _ in range(MAX_DRAWS):
            row = _tokenize(tokenizer, documents[draw.randint(0, len(documents) - 1)])
            if len(row) > seqlen:
                break
        else:
            raise Unusable(f"no document longer than {seqlen} tokens in {MAX_DRAWS} draws; lower --seqlen")
        start = draw.randint(0, len(row) - seqlen - 1)
        windows.append(row[start : start + seqlen])
    return torch.tensor(windows)
