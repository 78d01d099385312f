"""Data sets on the Hugging Face hub, and what else has to do with its network.

Calibration and evaluation read one split, or one file of it, from the cache that `datasets` keeps (`read`). Training
takes the rows as they come over the network, in the order of the whole split (`stream`), and keeps nothing of them.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..runtime.hub import hub_away, offline
from ..runtime.inputs import reason
from . import columns
from .columns import listed
from .files import holds
from .text import Stream, Text, TextOptions, Unusable


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub. files: {split: the one file of it that is read}; None = the whole split. all_files: the
    configuration that has these and all others, to stream from."""

    repo: str
    column: str | None
    config: str | None = None
    revision: str | None = None
    evaluation_split: str = "test"
    files: dict[str, str] | None = None
    all_files: str | None = None
    glue: str = "\n\n"
    evaluation_documents: int | None = None
    evaluation_windows: int | None = None


HUB_SETS = {
    "wikitext2": HubSet("Salesforce/wikitext", "text", "wikitext-2-raw-v1"),
    # The main branch is a script, which `datasets` no longer runs; this branch is the hub's own parquet copy.
    "ptb": HubSet("ptb-text-only/ptb_text_only", "sentence", None, "refs/convert/parquet", glue=" "),
    "c4": HubSet("allenai/c4", "text", evaluation_split="validation", glue=" ", evaluation_documents=1100,
                 evaluation_windows=256, all_files="en",
                 files={"train": "en/c4-train.00000-of-01024.json.gz",
                        "validation": "en/c4-validation.00000-of-00008.json.gz"}),
}


def read(spec: str, options: TextOptions, evaluate: bool) -> Text:
    """The rows of one column of a hub data set, from the cache if the hub does not answer."""
    hub, split = chosen(spec, options, evaluate)
    rows, away = load_dataset(hub, split, options.cache_dir, evaluate)
    column, chat = column_of(rows, hub.column, lambda: rows)
    documents = rows[column][: hub.evaluation_documents] if evaluate else rows[column]
    if chat:
        documents = list(columns.pick(({column: entry} for entry in documents), column)[0])
    said = f"{len(documents)} {'conversations' if chat else 'documents'}"
    return Text(documents, described(spec, hub, split, column, said), hub.glue,
                warnings(spec, hub, options, away, evaluate), chat)


def stream(spec: str, options: TextOptions) -> Stream:
    """The rows of one column of a hub data set as they come, or the cached copy if the hub does not answer.

    A part of a split ("train[:10%]"), which `datasets` cannot stream, is read as by `read`.
    """
    hub, split = chosen(spec, options, evaluate=False)
    if hub_away() or offline("HF_DATASETS_OFFLINE") or not re.fullmatch(r"\w+(\.\w+)*", split):
        text = read(spec, options, evaluate=False)
        return Stream(iter(text.documents), text.source, text.warnings, text.chat)
    hub = replace(hub, config=hub.all_files or hub.config, files=None)
    rows = load_dataset(hub, split, options.cache_dir, False, streaming=True)[0]
    column, chat = column_of(rows, hub.column, lambda: itertools.islice(following(rows), columns.LOOK))
    documents, _ = columns.pick(following(rows.select_columns([column])), column)
    return Stream(documents, described(spec, hub, split, column), warnings(spec, hub, options, None, False), chat)


def chosen(spec: str, options: TextOptions, evaluate: bool) -> tuple[HubSet, str]:
    """(the data set that `spec` and the options name, its split)."""
    if spec in HUB_SETS:
        hub, split = HUB_SETS[spec], None
    else:
        hub, split = HubSet(spec, options.column, options.config), options.split
    return replace(hub, revision=options.revision or hub.revision), split or (
        hub.evaluation_split if evaluate else "train")


def column_of(rows: Any, wanted: str | None, some: Callable[[], Iterable[dict]]) -> tuple[str, bool]:
    """(the column of a data set to use, whether it holds conversations). some(): its first rows. Raises Unusable."""
    if rows.features:
        kinds = {field.name: holds(field.type) or columns.kind_among(row.get(field.name) for row in some())
                 for field in rows.features.arrow_schema}
    else:
        kinds = columns.looked_at(iter(enumerate(some(), 1)), wanted)[1] or {}
    column = columns.choose(kinds, wanted)
    if kinds[column] not in (columns.TEXT, columns.CHAT):
        raise Unusable(f"column {column!r} does not hold text; --column must be one of {listed(kinds)}")
    return column, kinds[column] == columns.CHAT


def described(spec: str, hub: HubSet, split: str, column: str, *more: str) -> str:
    """What to say of a text as its source."""
    where = (hub.repo, hub.revision, hub.config, hub.files and hub.files[split], f"split {split}", f"column {column}")
    return f"{spec} ({listed(filter(None, (*where, *more)))})"


def warnings(spec: str, hub: HubSet, options: TextOptions, away: str | None, evaluate: bool) -> tuple[str, ...]:
    """That the hub does not answer; that options are ignored, as the papers' names stand for what they used."""
    found = [f"{spec}: the hub does not answer ({away}); used the cached copy, revision unchecked"] if away else []
    fixed = {"--column": options.column, "--data-config": options.config, "--split": options.split}
    ignored = [flag for flag, value in fixed.items() if value and spec in HUB_SETS]
    if ignored and not evaluate:  # evaluation often shares the options of another calibration text
        found.append(f"{spec}: {listed(ignored)} ignored; for another part of the set use {hub.repo}")
    return tuple(found)


def following(rows: Any) -> Iterator[dict]:
    """The rows of a data set as they come; whatever goes wrong meanwhile is an Unusable."""
    try:
        yield from rows
    except Exception as error:  # of the network, or of a file of the set
        raise Unusable(f"cannot be read on ({brief(error)}); give the command again, or use a local file") from error


def load_dataset(hub: HubSet, split: str, cache_dir: str | None, evaluate: bool,
                 streaming: bool = False) -> tuple[Any, str | None]:
    """(the datasets.Dataset, or if streaming the IterableDataset; why the hub did not answer, None if it did)."""
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
            rows = datasets.load_dataset(hub.repo, hub.config, split=split, revision=hub.revision, cache_dir=cache_dir,
                                         **{"streaming": True} if streaming else {})
        else:  # in two steps, as load_dataset(data_files=) misses its own cache when offline (datasets#6837)
            file = huggingface_hub.hf_hub_download(hub.repo, hub.files[split], repo_type="dataset",
                                                   revision=hub.revision, cache_dir=cache_dir,
                                                   local_files_only=away is not None)
            rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=cache_dir)
    except Exception as error:  # from any of the libraries underneath; reported as one line
        if away or isinstance(error, ConnectionError):
            why = away or brief(error)
            problem = f"not in the cache and the hub cannot be reached ({why}); use {instead}"
        else:
            problem = f"cannot be loaded ({brief(error)}); check name, --data-config, --split and --revision"
        raise Unusable(problem) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return rows, away


def brief(error: Exception) -> str:
    """An exception as one short line, with its type."""
    return f"{type(error).__name__}: {reason(error)}"


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Within the context, `datasets` reports nothing; by default it tells the hub even of local files."""
    import datasets

    before, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before
