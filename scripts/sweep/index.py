"""Which runs of a sweep are finished, without loading their models.

A run's identity is its run_id: a hash of its settings, of the model's weights and of the token windows. Computing it
takes loading the model, so RESULTS/.sweep/KEY keeps it for later, where

    KEY   a hash of everything a run_id follows from: settings, the content of the model's and the texts' files (the
          commit of what comes from the hub), this package's source, and the versions of the libraries that read them

The index is a cache: a missing entry costs a model load, never a wrong answer, and the folder may be deleted.
"""

import functools
import hashlib
import json
import re
from pathlib import Path

import oneshot
from oneshot.data import sources
from oneshot.pipeline.attempt import stored
from oneshot.runtime import environment
from oneshot.runtime.files import write_text
from oneshot.settings import RunConfig

FOLDER = ".sweep"
READERS = ("torch", "transformers", "tokenizers", "datasets", "pyarrow")  # what turns files into weights and tokens
Content = str | list[tuple[str, str]] | None


def finished(cfg: RunConfig) -> str | None:
    """run_id of the finished record of this configuration, or None when that is not known for certain."""
    key = key_of(cfg)
    try:
        run_id = (Path(cfg.results) / FOLDER / key).read_text().strip() if key else None
    except OSError:
        return None
    record = stored(Path(cfg.results) / f"{run_id}.json") if run_id else None
    return run_id if record and record["run_id"] == run_id else None


def remember(cfg: RunConfig, run_id: str, key: str | None) -> None:
    """Note that `cfg` gave `run_id`. key: `key_of(cfg)` from before the run; files that changed since void it."""
    if key and key == key_of(cfg):
        write_text(run_id + "\n", Path(cfg.results) / FOLDER / key)


def key_of(cfg: RunConfig) -> str | None:
    """The KEY of one configuration, or None when a source cannot be told apart from its later versions."""
    specs = [(cfg.calibration, cfg.revision)] if cfg.method != "dense" else []
    specs += [(spec, cfg.revision if spec == cfg.calibration else None) for spec in cfg.evaluations]
    contents = [model_content(cfg), *(text_content(spec, revision) for spec, revision in specs)]
    if None in contents:
        return None
    whole = [cfg.settings(), contents, package(), [environment.version(name) for name in READERS]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:32]


def model_content(cfg: RunConfig) -> Content:
    """What stands for the model's weights and tokenizer; None if nothing does."""
    if cfg.model == "demo":
        return "demo"  # part of the package
    if Path(cfg.model).is_dir():
        return folder_content(Path(cfg.model))
    return None if cfg.trust_remote_code else commit(cfg.model, "model", cfg.model_revision, cfg.cache_dir)


def text_content(spec: str, revision: str | None) -> Content:
    """What stands for a text; None if nothing does."""
    if spec == "self" or spec in {**sources.CALIBRATION_TEXT, **sources.EVALUATION_TEXT}:
        return spec  # follows from the model and the settings, or is part of the package
    path = Path(spec).expanduser()
    if path.is_file():
        return file_content(path)
    hub = sources.HUB_SETS.get(spec)
    return commit(hub.repo, "dataset", revision or hub.revision) if hub else commit(spec, "dataset", revision)


def folder_content(folder: Path) -> list[tuple[str, str]]:
    """[(path within the folder, hash)] of all of its files."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return [(str(f.relative_to(folder)), file_content(f)) for f in files]


def file_content(path: Path) -> str:
    """sha256 of a file."""
    about = path.stat()
    return sha256(path.resolve(), about.st_size, about.st_mtime_ns, about.st_ino)


@functools.cache
def sha256(path: Path, *stamp: int) -> str:
    """sha256 of a file, read again when its stamp (size, time, inode) changes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


@functools.cache
def package() -> Content:
    """What this program is: every file of the package, code, texts and demo model."""
    return folder_content(Path(oneshot.__file__).parent)


@functools.cache
def commit(repo: str, kind: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """The commit that a hub repository's revision (default: main) names now; None when that cannot be learnt."""
    if re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return revision
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        if not constants.HF_HUB_OFFLINE:
            return HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=10).sha
        # offline transformers takes the cached copy; data sets have another cache
        file = try_to_load_from_cache(repo, "config.json", cache_dir, revision) if kind == "model" else None
        return Path(file).parent.name if isinstance(file, str) else None
    except Exception:  # whatever the client raises for no network, no such repository, no access: the run will say it
        return None
