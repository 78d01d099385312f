"""Contents: hashes of every file in a folder, and of every tensor in its safetensors files.

Tensors are hashed where they lie in their file, so that whatever dtype or name they have, they are what was written.
sha256 takes 0.55 s a GB on one core with the processor's SHA instructions; files and tensors are shared out among as
many threads as torch may use.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

MANIFEST, WORK = "oneshot.json", ".oneshot"
PIECE = 2**22  # bytes read at a time


@dataclass(frozen=True)
class Fault:
    """What is not as it was written. name: of a tensor or a file; tensor: whether it is one."""

    name: str
    text: str
    tensor: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass(frozen=True)
class Part:
    """A tensor where it lies in a safetensors file: bytes `begin` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, also in a folder below it; None for whatever lies elsewhere: `..`, absolute
    paths, folders that are links, work files."""
    parts = PurePosixPath(name).parts
    odd = not parts or "\\" in name or PurePosixPath(name).is_absolute() or ".." in parts or parts[0] == WORK
    if odd or any(folder.joinpath(*parts[:n]).is_symlink() for n in range(1, len(parts))):
        return None
    return folder.joinpath(*parts)


def files_of(folder: Path) -> list[str]:
    """Names of all files below a folder but the manifest's and the work files', with /; links are named, not
    followed."""
    found = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        found += [(here / name).relative_to(folder).as_posix() for name in (*files, *links)]
        folders[:] = [name for name in folders if name not in links and (here / name) != folder / WORK]
    return sorted(name for name in found if name not in (MANIFEST, WORK))


def describe(folder: Path) -> dict[str, dict]:
    """{"files": {name: {"bytes", "sha256"}}, "stored_tensors": {name: {"file", "dtype", "shape", "sha256"}}} of all
    files in a folder. Raises ValueError naming a safetensors file that is damaged."""
    names = files_of(folder)
    parts = {tensor: part for name in names if name.endswith(".safetensors")
             for tensor, part in parts_of(folder / name).items()}
    hashes = iter(in_threads([*((folder / name, 0, None) for name in names),
                              *((part.file, part.begin, part.end) for part in parts.values())]))
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": next(hashes)} for name in names}
    tensors = {tensor: {"file": part.file.relative_to(folder).as_posix(), "dtype": part.dtype,
                        "shape": list(part.shape), "sha256": next(hashes)} for tensor, part in parts.items()}
    return {"files": files, "stored_tensors": tensors}


def differences(folder: Path, recorded: dict) -> list[Fault]:
    """What of a folder's files is not as the manifest `recorded` has it; [] also where an old one has nothing.

    A safetensors file that has changed is named by its changed tensors, or itself where those are all the same.
    """
    files, tensors = recorded.get("files", {}), recorded.get("stored_tensors", {})
    try:
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        by_file = {name: {} for name in files}
        for tensor, entry in tensors.items():
            by_file.setdefault(entry["file"], {})[tensor] = (entry["dtype"], tuple(entry["shape"]), entry["sha256"])
    except (AttributeError, KeyError, TypeError):
        return [Fault(MANIFEST, "its list of files is damaged")]
    faults, whole = [], []
    for name, (size, _) in wanted.items():
        file = inside(folder, name)
        if file is None:
            faults.append(Fault(name, "is no name of a file in this folder"))
        elif not file.is_file():
            faults.append(Fault(name, "is missing"))
        elif (there := file.stat().st_size) != size and not by_file[name]:
            faults.append(Fault(name, f"{there} bytes, recorded {size}"))
        else:
            whole.append((name, file))
    for (name, file), sha in zip(whole, in_threads((file, 0, None) for _, file in whole), strict=True):
        if sha != wanted[name][1] or file.stat().st_size != wanted[name][0]:
            faults += changes(name, file, by_file[name])
    return faults


def absent(folder: Path) -> list[Fault]:
    """What is missing or cut off of a folder's config and weights, as far as that shows without hashes."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return [Fault(index.name, "is damaged")]
    faults = []
    for name in ["config.json", *map(str, names)]:
        file = inside(folder, name)
        if file is None or not file.is_file():
            faults.append(Fault(name, "is missing"))
        elif file.suffix == ".safetensors":
            try:
                parts_of(file)
            except ValueError as error:
                faults.append(Fault(name, str(error).removeprefix(f"{file}: ")))
    return faults


def changes(name: str, file: Path, wanted: dict[str, tuple]) -> list[Fault]:
    """What has changed in a file whose bytes are not the recorded ones. wanted: {tensor: (dtype, shape, sha256)}."""
    if not wanted:
        return [Fault(name, "its bytes are not the recorded ones")]
    try:
        parts = parts_of(file)
    except ValueError as error:
        return [Fault(name, str(error).removeprefix(f"{file}: "))]
    faults, shared = [], [tensor for tensor in wanted if tensor in parts]
    hashes = in_threads((file, parts[tensor].begin, parts[tensor].end) for tensor in shared)
    for tensor, sha in zip(shared, hashes, strict=True):
        dtype, shape, recorded = wanted[tensor]
        if (parts[tensor].dtype, parts[tensor].shape) != (dtype, shape):
            faults.append(Fault(tensor, f"is {parts[tensor].dtype} {parts[tensor].shape} in {name}, recorded {dtype} "
                                        f"{shape}", True))
        elif sha != recorded:
            faults.append(Fault(tensor, f"its bytes in {name} are not the recorded ones", True))
    faults += [Fault(tensor, f"is missing in {name}", True) for tensor in wanted if tensor not in parts]
    faults += [Fault(tensor, f"is in {name} but not in the manifest", True) for tensor in parts if tensor not in wanted]
    return faults or [Fault(name, "its header is not the recorded one")]


def parts_of(file: Path) -> dict[str, Part]:
    """{tensor: where it lies} of a safetensors file, read off its header.

    Raises ValueError naming a file that is damaged, cut off or too long.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        parts = {tensor: Part(file, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]),
                              *(8 + length + int(at) for at in entry["data_offsets"]))
                 for tensor, entry in header.items()}
        end = 8 + length
        for part in sorted(parts.values(), key=lambda part: (part.begin, part.end)):
            if part.begin != end or part.end < part.begin:
                raise ValueError("its tensors do not lie side by side")
            end = part.end
        if end != size:
            raise ValueError(f"{size} bytes, its header describes {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else f"its header cannot be read ({type(error).__name__})"
        raise ValueError(f"{file}: {why}") from None
    return parts


def changed_tensors(files: Iterable[str | Path], recorded: dict) -> list[str]:
    """Names of the tensors in safetensors files that are not as the manifest `recorded` has them."""
    parts = {tensor: part for file in files for tensor, part in parts_of(Path(file)).items()}
    hashes = in_threads((part.file, part.begin, part.end) for part in parts.values())
    there = {tensor: {"dtype": part.dtype, "shape": list(part.shape), "sha256": sha}
             for (tensor, part), sha in zip(parts.items(), hashes, strict=True)}
    entries = {tensor: entry for tensor, entry in recorded["stored_tensors"].items() if isinstance(entry, dict)}
    return [tensor for tensor, found in there.items()
            if {key: entries.get(tensor, {}).get(key) for key in found} != found]


def in_threads(ranges: Iterable[tuple[Path, int, int | None]]) -> Iterator[str]:
    """sha256 of each (file, begin, end) in their order; end None: to the end of the file."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        yield from pool.map(lambda of: sha256(*of), ranges)


def sha256(file: Path, begin: int = 0, end: int | None = None) -> str:
    """sha256 of a file, or of the bytes `begin` to `end` in it."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        opened.seek(begin)
        left = None if end is None else end - begin
        while piece := opened.read(PIECE if left is None else min(PIECE, left)):
            digest.update(piece)
            left = None if left is None else left - len(piece)
    return digest.hexdigest()
