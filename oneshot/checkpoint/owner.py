"""Owner: whose a folder is, and which files in it are the program's own. Nothing else is ever removed or replaced."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..runtime import sealed
from .contents import MANIFEST, WORK, inside
from .manifest import READABLE

RUN = "run.json"  # among the work files: which run is at work here, which files are its own, which plan it follows
WRITTEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json"
                     r"|generation_config\.json|report\.html|oneshot\.json")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
             "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
             "spiece.model", "sentencepiece.bpe.model"}
WORK_FILES = re.compile(r"final|parts|heal|block_\d{5}\.(safetensors|part)|run\.json|\.run\.json\.\d+\.part")


@dataclass(frozen=True)
class Own:
    """Names of the files in a folder that are the program's. removable: when it writes anew; replaceable: these, and
    others by a new file of the same name. nameless: an older version wrote there, which noted no names.
    """

    removable: frozenset[str] = frozenset()
    replaceable: frozenset[str] = frozenset()
    nameless: bool = False


def check_work(path: Path) -> None:
    """Raise ValueError unless the work files' place is free or a folder: a link would lead elsewhere."""
    work = path / WORK
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise ValueError(f"--save {path}: {WORK} in it is {'a link' if work.is_symlink() else 'no folder'}; remove it, "
                         "or choose another folder")


def owner_of(path: str | Path) -> str | None:
    """run_id of the run that a folder belongs to, finished or not; None when it is empty or absent.

    Raises ValueError when the path is a file, or the folder holds something else.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--save {path}: is a file; give a folder")
    check_work(path)
    for _ in range(2):  # the second time, what another process has finished in between is there
        for read in (of_manifest, of_run):
            if (found := read(path)) is not None:
                return found
        if not path.is_dir() or not strangers(path):
            return None
    raise ValueError(f"--save {path}: this folder holds files that are not oneshot's; choose another")


def strangers(path: Path) -> bool:
    """Whether a folder that nobody owns holds anything."""
    return any(entry.name != WORK for entry in path.iterdir())


def of_manifest(path: Path) -> str | None:
    """run_id in the manifest; None where there is none. Raises ValueError for a damaged one."""
    with damaged(path, path / MANIFEST):
        if (text := text_of(path / MANIFEST)) is None:
            return None
        data = json.loads(text)
        found, schema = data["record"]["run_id"], data["schema"]
    if schema not in READABLE:
        raise ValueError(f"--save {path}: {MANIFEST} is of another version of oneshot; choose another folder")
    return found


def of_run(path: Path) -> str | None:
    """run_id among the work files; None where there is none. Raises ValueError for a damaged one."""
    noted = read_run(path)
    return noted["run_id"] if noted else None


def read_run(path: Path) -> dict:
    """What the work files say of the run at work; {} where they say nothing. Raises ValueError when damaged."""
    file = path / WORK / RUN
    with damaged(path, file):
        if not file.is_file():
            return {}
        try:
            data, whole = sealed.read(file)
        except FileNotFoundError:
            return {}
        if not whole and set(data) != {"run_id"}:  # until schema 2 nothing else stood there, without a seal
            raise ValueError
        if not isinstance(data["run_id"], str):
            raise TypeError
        return data


def text_of(file: Path) -> str | None:
    """A file's text; None when it is not there (any more)."""
    with contextlib.suppress(FileNotFoundError):
        return file.read_text(encoding="utf-8") if file.is_file() else None
    return None


@contextlib.contextmanager
def damaged(path: Path, file: Path) -> Iterator[None]:
    """Within the context, whatever reading raises becomes one ValueError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"--save {path}: {file.name} is damaged; remove the folder, or choose another") from None


def own_files(path: Path) -> Own:
    """The files in a folder that are the program's, as its manifest and its work files name them; where an older
    version wrote them: those that have the names it writes."""
    listed, nameless = set(), False
    if (text := text_of(path / MANIFEST)) is not None:
        files = json.loads(text).get("files")
        nameless |= files is None
        listed |= {MANIFEST, *(files if isinstance(files, dict) else ())}
    if noted := read_run(path):
        nameless |= noted.get("nameless", True)  # until schema 2 nothing but the run_id stood there
        listed |= set(noted.get("files", ()))
    here = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    removable = {name for name in listed if isinstance(name, str) and inside(path, name)}
    if nameless:
        removable |= {name for name in here if WRITTEN.fullmatch(name)}
    replaceable = removable | (here & TOKENIZER if nameless else set())  # a user may have put a tokenizer there
    return Own(frozenset(removable), frozenset(replaceable), nameless)


def check_foreign(path: Path, own: Own) -> None:
    """Raise ValueError for a file that is not the program's where one of its own will be, or would be loaded in place
    of its own."""
    here = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    refuse_foreign(path, sorted([*(name for name in here if WRITTEN.fullmatch(name) and name not in own.replaceable),
                                 *(name for name in own.replaceable if (path / name).is_dir())]))


def refuse_foreign(path: Path, names: list[str]) -> None:
    """Raise ValueError naming files that are not the program's, and in its way; nothing for none."""
    if names:
        raise ValueError(f"--save {path}: holds {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}, which "
                         "oneshot did not put there and would replace; move it away and repeat the same command")


def clear(path: Path, names: frozenset[str]) -> None:
    """Remove files of an earlier checkpoint, first what makes it look finished, then what makes it load."""
    for name in sorted(names, key=lambda name: (name != MANIFEST, name != "config.json", name)):
        if file := inside(path, name):
            if file.is_file() or file.is_symlink():
                file.unlink()
            if file.parent != path:
                with contextlib.suppress(OSError):  # something else is in it
                    file.parent.rmdir()
