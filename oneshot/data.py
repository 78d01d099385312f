"""Calibration and evaluation tokens.

Where text comes from (`spec`):
  wikitext2, c4, ptb   the papers' data sets, from the Hugging Face hub
  owner/name           any other data set on the hub (`column`, `config`, `split` in TextOptions)
  FILE                 .txt .jsonl .json .parquet .csv
  builtin              the text shipped in `demo/`; evaluation also knows builtin:prose and builtin:sampled
  self                 calibration only: sampled from the model itself

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
import csv
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .perturb import perturbed

DEMO = Path(__file__).parent / "demo"
CALIBRATION_TEXT = {"builtin": ["calibration.txt"]}
EVALUATION_TEXT = {
    "builtin": ["evaluation_sampled.txt", "evaluation_prose.txt"],
    "builtin:sampled": ["evaluation_sampled.txt"],
    "builtin:prose": ["evaluation_prose.txt"],
}
STRING_TYPES = ("string", "large_string", "string_view")  # as pyarrow and datasets name them
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")
# Of C4's documents 3 % are longer than 9,000 characters (some 2048 tokens) and 0.1 % than 36,000.
MAX_DRAWS = 20_000
# Calibration text beyond this many characters is not joined: tokenising was measured to take 240 to 360 bytes
# of memory a token. The training rows of WikiText-2 are 11 million characters.
MAX_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class HubSet:
    """Text on the hub. `files`: the one file of each split that is used; None = all of the split."""

    repo: str
    column: str | None
    config: str | None = None
    revision: str | None = None
    evaluation_split: str = "test"
    files: dict[str, str] | None = None
    glue: str = "\n\n"
    evaluation_documents: int | None = None
    evaluation_windows: int | None = None


HUB_SETS = {
    "wikitext2": HubSet("Salesforce/wikitext", "text", "wikitext-2-raw-v1"),
    # Its main branch is a script, which `datasets` no longer runs; this one the hub's own parquet copy.
    "ptb": HubSet("ptb-text-only/ptb_text_only", "sentence", None, "refs/convert/parquet", glue=" "),
    "c4": HubSet(
        "allenai/c4",
        "text",
        evaluation_split="validation",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        glue=" ",
        evaluation_documents=1100,
        evaluation_windows=256,
    ),
}


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


@dataclass(frozen=True)
class TextOptions:
    """How to read text. wikitext2, c4 and ptb heed only `revision`, `cache_dir` and `documents`: these names
    stand for what the papers measured on."""

    column: str | None = None  # hub data sets and files; default "text", else the only column with text
    config: str | None = None  # hub data sets
    split: str | None = None  # hub data sets; default train for calibration, test for evaluation
    revision: str | None = None
    cache_dir: str | None = None
    per_line: bool = False  # each line of a .txt file is a document
    documents: str = "join"  # join | separate


@dataclass(frozen=True)
class Text:
    """Documents as read. Rows from the hub stay on disk until asked for, and may be None."""

    documents: Sequence[str | None]
    source: str
    glue: str = "\n\n"
    warnings: tuple[str, ...] = ()

    def joined(self, limit: int | None = None) -> str:
        """All documents, or the first `limit` characters of them; reads no more than it returns."""
        parts, size = [], 0
        for document in self.documents:
            parts.append(document or "")
            size += len(parts[-1])
            if limit is not None and size >= limit:
                break
        return self.glue.join(parts)[:limit]


class Unusable(ValueError):
    """What is wrong and what to do; `_naming` puts the flag in front."""


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
    options: TextOptions = TextOptions(),
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
        text, mask, warnings = _read(spec, options, evaluate=False), None, []
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
    options: TextOptions = TextOptions(),
    max_windows: int | None = None,
    perturbation: str | None = None,
) -> Tokens:
    """All windows of the text in order, or the first `max_windows`; first changed as in perturb.py, if so named."""
    with _naming("--evaluate", spec):
        _check_sizes(seqlen, 1, options)
        text, mask = _read(spec, options, evaluate=True), None
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


def _cut(stream: list[int], seqlen: int) -> torch.Tensor:
    """(n, seqlen): consecutive windows of the stream, its tail dropped."""
    n = len(stream) // seqlen
    if n == 0:
        raise Unusable(
            f"{len(stream)} tokens, shorter than one window of {seqlen}; "
            f"use --seqlen {len(stream)} or less, or more text"
        )
    return torch.tensor(stream[: n * seqlen]).view(n, seqlen)


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


# ---------------------------------------------------------------------------------------- text from the model


@torch.no_grad()
def sample_from_model(model, tokenizer, nsamples, seqlen, seed, batch_size=8, progress=True):
    """ids (nsamples, seqlen) on the CPU and a description: sampled from the model at temperature 1. A third
    more is drawn than asked for, and the quarter that the model itself finds least likely is dropped.

    Not with `model.generate`: a checkpoint's generation config (temperature, top-k, stop at eos) bends the
    distribution, and here the log-probabilities come for free. Global random state stays untouched.
    """
    if model is None:
        raise Unusable("needs a model to sample from; pass model=")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and seqlen > positions:
        raise Unusable(f"the model has {positions} positions; use --seqlen {positions} or less")
    total = math.ceil(nsamples * 4 / 3)
    batches = _first_tokens(tokenizer, total, seed).to(model.device).split(batch_size)
    drawn, was_training = [], model.training
    model.eval()
    try:
        with tqdm(total=total * (seqlen - 1), desc="sampling", unit=" tokens", disable=not progress) as bar:
            for number, first in enumerate(batches):
                # Seeded by a hash: with seed + number, seeds 0 and 1 would have most batches in common.
                stream = random.Random(f"{seed}/{number}").getrandbits(63)
                generator = torch.Generator(model.device).manual_seed(stream)
                drawn.append(_sample_batch(model, first, seqlen, generator, bar))
    finally:
        model.train(was_training)
    ids, surprise = (torch.cat(parts).cpu() for parts in zip(*drawn, strict=True))
    likeliest = surprise.argsort(stable=True)[:nsamples].sort().values
    how = f"self: sampled from the model, likeliest {nsamples} of {total} windows of {seqlen}, seed {seed}"
    return ids[likeliest], how


def _first_tokens(tokenizer, n: int, seed: int) -> torch.Tensor:
    """(n, 1): bos, or eos (in models without a bos it stands between documents), or else random tokens."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.full((n, 1), token)
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    return torch.tensor(random.Random(seed).choices(ordinary, k=n)).view(n, 1)


def _sample_batch(model, first, seqlen, generator, bar):
    """first (b, 1) -> ids (b, seqlen) and -log p of each row (b,)."""
    columns, cache, surprise = [first], None, 0.0
    for _ in range(seqlen - 1):
        output = model(input_ids=columns[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_p = output.logits[:, -1].float().log_softmax(-1)
        if log_p.isnan().any():
            raise Unusable("the model's outputs are not finite; check its weights")
        columns.append(torch.multinomial(log_p.exp(), 1, generator=generator))
        surprise = surprise - log_p.gather(1, columns[-1]).squeeze(1)
        bar.update(len(first))
    return torch.cat(columns, 1), surprise


# ----------------------------------------------------------------------------------------------- reading text


def _read(spec: str, options: TextOptions, evaluate: bool) -> Text:
    builtin, path = EVALUATION_TEXT if evaluate else CALIBRATION_TEXT, Path(spec).expanduser()
    if spec in builtin:
        text = Text([_decode(DEMO / name) for name in builtin[spec]], f"{spec} ({', '.join(builtin[spec])})")
    elif path.suffix.lower() in SUFFIXES or (path.exists() and spec not in HUB_SETS):
        documents = _read_file(path, options)
        text = Text(documents, f"{path.name} ({len(documents)} documents)")
    elif spec in HUB_SETS or re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        text = _read_hub(spec, options, evaluate)
    else:
        names = _listed([*HUB_SETS, *builtin] + ["self"] * (not evaluate))
        raise Unusable(f"unknown; use {names}, a hub data set owner/name, or a file {_listed(SUFFIXES)}")
    # How much text is needed is for the windows to say; this stops at the first document that holds any.
    if not any(document and document.strip() for document in text.documents):
        raise Unusable("holds no text; use another one")
    return text


def _read_file(path: Path, options: TextOptions) -> list[str]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise Unusable(f"not a kind of file that can be read; use {_listed(SUFFIXES)}")
    if suffix == ".parquet":
        return _read_parquet(path, options.column)
    content = _decode(path)
    if suffix == ".txt":
        return content.split("\n") if options.per_line else [content]
    if suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # by default documents above 128 KiB are refused
        records = list(csv.DictReader(io.StringIO(content, newline="")))
        if long := [number for number, record in enumerate(records, 1) if None in record]:
            raise Unusable(f"record {long[0]} has more fields than there are columns; quote the text")
    elif suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        records = [_parse_json(line, f"line {number}: ") for number, line in lines if line.strip()]
    else:
        records = _parse_json(content)
        if not isinstance(records, list):
            raise Unusable(f"holds one {type(records).__name__}; it must be a list of strings or of objects")
    return _texts(records, options.column)


def _decode(path: Path) -> str:
    """The file's text, with the same line ends on every machine."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"cannot read {path.name} ({_brief(error)}); check the path, use UTF-8") from error


def _parse_json(content: str, where: str = ""):
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        hint = "correct it" if where else "correct it, or name it .jsonl if each line is a value"
        raise Unusable(f"{where}not JSON ({error}); {hint}") from error


def _texts(records: list, wanted: str | None) -> list[str]:
    """Of strings themselves, of objects the chosen column; nulls are left out."""
    first = next((record for record in records if isinstance(record, dict)), None)
    if first is not None:
        column = _choose_column({name: isinstance(value, str) for name, value in first.items()}, wanted)
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or column not in record:
                raise Unusable(f"record {number} has no column {column!r}; correct it or change --column")
        records = [record[column] for record in records]
    for number, text in enumerate(records, 1):
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise Unusable(f"record {number} is of type {kind}, not text; correct it or change --column")
    return [text for text in records if text is not None]


def _choose_column(columns: dict[str, bool], wanted: str | None) -> str:
    """`columns`: name -> whether it holds text."""
    if wanted is not None and wanted not in columns:
        raise Unusable(f"no column {wanted!r}; --column must be one of {_listed(columns)}")
    with_text = [name for name, is_text in columns.items() if is_text]
    if wanted is None and "text" not in columns and len(with_text) != 1:
        raise Unusable(f"which column is the text? Name it with --column: one of {_listed(columns)}")
    return wanted or ("text" if "text" in columns else with_text[0])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "(none)"


def _read_parquet(path: Path, wanted: str | None) -> list[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise Unusable("parquet needs pyarrow: pip install pyarrow") from error
    try:
        columns = {field.name: str(field.type) in STRING_TYPES for field in parquet.read_schema(path)}
        column = _choose_column(columns, wanted)
        return _texts(parquet.read_table(path, columns=[column]).column(column).to_pylist(), None)
    except (pyarrow.ArrowException, OSError) as error:
        raise Unusable(f"cannot read {path.name} ({_brief(error)}); check path and file") from error


# ---------------------------------------------------------------------------------------------------- the hub


def _read_hub(spec: str, options: TextOptions, evaluate: bool) -> Text:
    """The rows of one column, from the cache if the hub does not answer."""
    if spec in HUB_SETS:
        hub, split, fixed = HUB_SETS[spec], None, ("column", "config", "split")
    else:
        hub, split, fixed = HubSet(spec, options.column, options.config), options.split, ()
    split = split or (hub.evaluation_split if evaluate else "train")
    revision = options.revision or hub.revision
    rows, away = _load_dataset(hub, split, revision, options.cache_dir, evaluate)

    columns = {name: getattr(kind, "dtype", "") in STRING_TYPES for name, kind in rows.features.items()}
    column = _choose_column(columns, hub.column)
    if not columns[column]:
        raise Unusable(f"column {column!r} does not hold text; --column must be one of {_listed(columns)}")
    documents = rows[column][: hub.evaluation_documents] if evaluate else rows[column]

    warnings = []
    if away:
        warnings.append(f"{spec}: the hub does not answer ({away}); used the cached copy, revision unchecked")
    ignored = [f"--{name}" for name in fixed if getattr(options, name)]
    if ignored and not evaluate:  # evaluation often shares the options of another calibration text
        warnings.append(f"{spec}: {_listed(ignored)} ignored; for another part of the set use {hub.repo}")
    file = hub.files and hub.files[split]
    where = filter(None, (hub.repo, revision, hub.config, file, f"split {split}", f"column {column}"))
    source = f"{spec} ({_listed(where)}, {len(documents)} documents)"
    return Text(documents, source, hub.glue, tuple(warnings))


def _load_dataset(hub: HubSet, split: str, revision: str | None, cache_dir: str | None, evaluate: bool):
    """The datasets.Dataset, and why the hub did not answer (None if it did)."""
    instead = "a local file or `builtin`" if evaluate else "a local file, `builtin` or `self`"
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise Unusable(f"needs the package datasets: pip install datasets; or use {instead}") from error
    away, was_offline = hub_away(), datasets.config.HF_HUB_OFFLINE
    # `datasets` itself would retry for half a minute before it looks into its cache.
    datasets.config.HF_HUB_OFFLINE = was_offline or away is not None
    try:
        if not hub.files:
            rows = datasets.load_dataset(
                hub.repo, hub.config, split=split, revision=revision, cache_dir=cache_dir
            )
        else:  # in two steps, as load_dataset(data_files=) misses its own cache when offline (datasets#6837)
            file = huggingface_hub.hf_hub_download(
                hub.repo,
                hub.files[split],
                repo_type="dataset",
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=away is not None,
            )
            rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache_dir)
    except Exception as error:  # of the many libraries below; whatever it is ends as one line
        if away or isinstance(error, ConnectionError):
            reason = away or _brief(error)
            problem = f"not in the cache and the hub cannot be reached ({reason}); use {instead}"
        else:
            problem = f"cannot be loaded ({_brief(error)}); check name, --data-config, --split and --revision"
        raise Unusable(problem) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return rows, away


def hub_away() -> str | None:
    """Why the hub does not answer, or None if it does, whatever it says. One request of at most 5 seconds."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        return _brief(error)
    return None


def _brief(error: Exception) -> str:
    message = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"
