"""Shards: the checkpoint of a model whose blocks are on disk, one file a block and one for all that is outside them.

The file of a finished block, which an interrupted run resumes from, is a shard as it is: it gets a second name (a hard
link), so that saving takes neither time nor space, and a kill loses nothing.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..models import OnDisk
from ..models.intake import INDEX, headers
from ..runtime import together
from ..runtime.files import write_json
from ..runtime.proof import prove

LARGE = 2**62  # bytes: what is outside the blocks goes into one file


def check_links(folder: Path) -> None:
    """Raise OSError where the folder's file system has no hard links."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (Path(place) / "a").touch()
        try:
            os.link(Path(place) / "a", Path(place) / "b")
        except OSError as error:
            raise OSError(f"its file system has no hard links ({error.strerror}), which --offload disk needs") from None


def names(number: int) -> list[str]:
    """The names of that many shards, as transformers gives them."""
    return [f"model-{i + 1:05d}-of-{number:05d}.safetensors" for i in range(number)]


def write(folder: Path, model: nn.Module, disk: OnDisk, blocks: Sequence[Path]) -> None:
    """Write config and shards of a model into a folder, with the index that says which tensor is where.

    blocks: the file of each block. Raises OSError when writing fails, ProofError where a block has no file.
    """
    lacking = [file.name for file in blocks if not file.is_file()]
    prove(not lacking, f"{folder}: {len(lacking)} blocks were not saved, such as {lacking[:1]}")
    rest = {name: t for name, t in model.state_dict().items() if disk.block_of(name) is None}
    model.save_pretrained(folder, state_dict=rest, max_shard_size=LARGE)
    first, *others = names(1 + len(blocks))
    (folder / "model.safetensors").rename(folder / first)
    for file, name in zip(blocks, others, strict=True):
        os.link(file, folder / name)
    found = headers([folder / name for name in (first, *others)], str(folder))
    size = sum(entry.bytes for entry in found.values())
    write_json({"metadata": {"total_parameters": model.num_parameters(), "total_size": size},
                "weight_map": {name: found[name].file for name in sorted(found)}}, folder / INDEX)


def moved(disk: OnDisk, folder: Path) -> None:
    """From now on, blocks are read from the shards in a folder, by this process alone: the others of torchrun know the
    work files, which are to be removed."""
    together.release()
    for number, name in enumerate(names(1 + disk.blocks)[1:]):
        disk.moved(number, folder / name)
