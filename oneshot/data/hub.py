"""Data sets on the Hugging Face hub, and what else has to do with its network."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..runtime.hub import hub_away
from ..runtime.inputs import reason
from . import columns
from .columns import listed
from .files import holds
from .text import Text, TextOptions, Unusable


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


def read(spec: str, options: TextOptions, evaluate: bool) -> Text:
    """The rows of one column of a hub data set, from the cache if the hub does not answer."""
    if spec in HUB_SETS:
        hub, split, fixed = HUB_SETS[spec], None, ("column", "config", "split")
    else:
        hub, split, fixed = HubSet(spec, options.column, options.config), options.split, ()
    split = split or (hub.evaluation_split if evaluate else "train")
    revision = options.revision or hub.revision
    rows, away = load_dataset(hub, split, revision, options.cache_dir, evaluate)

    kinds = {field.name: holds(field.type) or columns.kind_among(rows[field.name])
             for field in rows.features.arrow_schema}
    column = columns.choose(kinds, hub.column)
    if kinds[column] not in (columns.TEXT, columns.CHAT):
        raise Unusable(f"column {column!r} does not hold text; --column must be one of {listed(kinds)}")
    documents, chat = rows[column][: hub.evaluation_documents] if evaluate else rows[column], False
    if kinds[column] == columns.CHAT:
        documents, chat = columns.pick(({column: entry} for entry in documents), column)

    warnings = []
    if away:
        warnings.append(f"{spec}: the hub does not answer ({away}); used the cached copy, revision unchecked")
    ignored = [f"--{name}" for name in fixed if getattr(options, name)]
    if ignored and not evaluate:  # evaluation often shares the options of another calibration text
        warnings.append(f"{spec}: {listed(ignored)} ignored; for another part of the set use {hub.repo}")
    file = hub.files and hub.files[split]
    where = filter(None, (hub.repo, revision, hub.config, file, f"split {split}", f"column {column}"))
    source = f"{spec} ({listed(where)}, {len(documents)} {'conversations' if chat else 'documents'})"
    return Text(documents, source, hub.glue, tuple(warnings), chat)


def load_dataset(hub: HubSet, split: str, revision: str | None, cache_dir: str | None,
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
