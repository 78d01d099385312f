"""Read text: from files, from data sets on the Hugging Face hub, and from what is shipped in `demo/`.

A text is named by its `spec`:
  wikitext2, c4, ptb   the papers' data sets, from the Hugging Face hub
  owner/name           any other data set on the hub (`column`, `config`, `split` in TextOptions)
  FILE                 .txt .jsonl .json .parquet .csv
  builtin              the text shipped in `demo/`; for evaluation also builtin:prose and builtin:sampled
  self                 calibration only: sampled from the model itself

Text that cannot be used raises `Unusable`: one line that says what is wrong and what to do, without the flag.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent.parent / "demo"
CALIBRATION_TEXT = {"builtin": ["calibration.txt"]}
EVALUATION_TEXT = {
    "builtin": ["evaluation_sampled.txt", "evaluation_prose.txt"],
    "builtin:sampled": ["evaluation_sampled.txt"],
    "builtin:prose": ["evaluation_prose.txt"],
}
STRING_TYPES = ("string", "large_string", "string_view")  # the names used by pyarrow and datasets
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub. files: {split: the one file of it that is used}; None = the whole split."""

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
    # The main branch is a script, which `datasets` no longer runs; this branch is the hub's own parquet copy.
    "ptb": HubSet("ptb-text-only/ptb_text_only", "sentence", None, "refs/convert/parquet", glue=" "),
    "c4": HubSet("allenai/c4", "text", evaluation_split="validation", glue=" ", evaluation_documents=1100,
                 evaluation_windows=256, files={"train": "en/c4-train.00000-of-01024.json.gz",
                                                "validation": "en/c4-validation.00000-of-00008.json.gz"}),
}


@dataclass(frozen=True)
class TextOptions:
    """How to read text.

    For wikitext2, c4 and ptb only `revision`, `cache_dir` and `documents` have an effect, because these names stand for
    exactly what the papers used.
    """

    column: str | None = None  # of hub data sets and files; default: "text", else the only column that holds text
    config: str | None = None  # of hub data sets
    split: str | None = None  # of hub data sets; default: train for calibration, test for evaluation
    revision: str | None = None
    cache_dir: str | None = None
    per_line: bool = False  # each line of a .txt file is a document
    documents: str = "join"  # "join" or "separate", see windows.py


@dataclass(frozen=True)
class Text:
    """Documents as they were read. Rows of a hub data set stay on disk until they are accessed, and may be None."""

    documents: Sequence[str | None]
    source: str
    glue: str = "\n\n"
    warnings: tuple[str, ...] = ()

    def joined(self, limit: int | None = None) -> str:
        """All documents joined by `glue`, or the first `limit` characters; reads no more documents than needed."""
        parts, size = [], 0
        for document in self.documents:
            parts.append(document or "")
            size += len(parts[-1])
            if limit is not None and size >= limit:
                break
        return self.glue.join(parts)[:limit]


class Unusable(ValueError):
    """A text that cannot be used. The message says what is wrong and what to do; windows.py adds the flag in front."""


# ----------------------------------------------------------------------------------------------- reading text


def read(spec: str, options: TextOptions, evaluate: bool) -> Text:
    """Read the text named `spec`, for evaluation or else for calibration. Raises Unusable."""
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
    # Whether there is enough text is checked in windows.py; this stops at the first document that is not empty.
    if not any(document and document.strip() for document in text.documents):
        raise Unusable("holds no text; use another one")
    return text


def _read_file(path: Path, options: TextOptions) -> list[str]:
    """The documents in a file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise Unusable(f"not a kind of file that can be read; use {_listed(SUFFIXES)}")
    if suffix == ".parquet":
        return _read_parquet(path, options.column)
    content = _decode(path)
    if suffix == ".txt":
        return content.split("\n") if options.per_line else [content]
    if suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
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
    """A file's text, with the same line endings on every machine."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"cannot read {path.name} ({_brief(error)}); check the path, use UTF-8") from error


def _parse_json(content: str, where: str = "") -> Any:
    """Parse JSON. where: the start of the error message, such as "line 3: "."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        hint = "correct it" if where else "correct it, or name it .jsonl if each line is a value"
        raise Unusable(f"{where}not JSON ({error}); {hint}") from error


def _texts(records: list, wanted: str | None) -> list[str]:
    """The texts of records: the records themselves if they are strings, else the chosen column; nulls are left out."""
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
    """The name of the column to use. columns: {name: whether it holds text}."""
    if wanted is not None and wanted not in columns:
        raise Unusable(f"no column {wanted!r}; --column must be one of {_listed(columns)}")
    with_text = [name for name, is_text in columns.items() if is_text]
    if wanted is None and "text" not in columns and len(with_text) != 1:
        raise Unusable(f"which column is the text? Name it with --column: one of {_listed(columns)}")
    return wanted or ("text" if "text" in columns else with_text[0])


def _listed(names: Iterable[str]) -> str:
    """Names joined by commas."""
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
    """The rows of one column of a hub data set, from the cache if the hub does not answer."""
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


def _load_dataset(hub: HubSet, split: str, revision: str | None, cache_dir: str | None,
                  evaluate: bool) -> tuple[Any, str | None]:
    """(the datasets.Dataset, why the hub did not answer or None if it did)."""
    instead = "a local file or `builtin`" if evaluate else "a local file, `builtin` or `self`"
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise Unusable(f"needs the package datasets: pip install datasets; or use {instead}") from error
    away, was_offline = hub_away(), datasets.config.HF_HUB_OFFLINE
    # By itself `datasets` would retry for half a minute before it looks into its cache.
    datasets.config.HF_HUB_OFFLINE = was_offline or away is not None
    try:
        if not hub.files:
            rows = datasets.load_dataset(hub.repo, hub.config, split=split, revision=revision, cache_dir=cache_dir)
        else:  # in two steps, as load_dataset(data_files=) misses its own cache when offline (datasets#6837)
            file = huggingface_hub.hf_hub_download(hub.repo, hub.files[split], repo_type="dataset", revision=revision,
                                                   cache_dir=cache_dir, local_files_only=away is not None)
            rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache_dir)
    except Exception as error:  # from any of the libraries underneath; reported as one line
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
    """Why the hub does not answer, or None if it does (with any status). One request of at most 5 seconds."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # from whichever HTTP library huggingface_hub uses
        return _brief(error)
    return None


def _brief(error: Exception) -> str:
    """An exception as one short line."""
    message = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"
