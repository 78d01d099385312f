"""Outcome: compare a saved folder with the model and with the input, before it counts as finished."""

import fnmatch
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from ..models.intake import headers
from ..models.source import Source, lost, will_save
from ..runtime.proof import prove

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
          "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
SIDE_FILES = (  # files that belong to a model besides its weights, config and tokenizer.json
    "preprocessor_config.json", "*processor_config.json", "generation_config.json", "LICEN[CS]E*", "NOTICE*",
    "USE_POLICY*", "tokenizer.model", "*.spm", "*.tiktoken", "chat_template*", "added_tokens.json",
    "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt")


def check_saved(folder: Path, model: nn.Module, source: Source, replaced: Collection[str] = ()) -> None:
    """Prove that the safetensors files in `folder` are the model: the same names, shapes and dtypes.

    Every tensor of the input must be there as well, except those that loading left out with a warning, and those that
    were `replaced` by others of the model.

    Raises ProofError naming the first tensor that is missing or wrong.
    """
    found, expected = headers(sorted(folder.glob("*.safetensors")), str(folder)), will_save(model)
    where = f"{folder}: what was saved is not the model"
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    prove(not missing, f"{where}: {len(missing)} tensors are missing, such as {missing[:1]}")
    prove(not extra, f"{where}: {len(extra)} tensors are not the model's, such as {extra[:1]}")
    for name, (shape, dtype) in expected.items():
        entry = found[name]
        prove(entry.shape == shape and DTYPES.get(entry.dtype) == dtype,
              f"{where}: {name} is {entry.dtype} {entry.shape}, should be {dtype} {shape}")
    known, accepted = lost(source.entries, model, source.quantised).names, {*source.left, *replaced}
    new = [name for name in known if name not in accepted]
    prove(not new, f"{where}: {len(new)} tensors of the input are not in it, such as {new[:1]}")


def copy_side_files(folder: Path | None, to: Path) -> list[str]:
    """Copy the SIDE_FILES in `folder` that are not in `to` yet; returns their names."""
    copied = []
    for file in sorted(folder.iterdir()) if folder else ():
        wanted = any(fnmatch.fnmatchcase(file.name, pattern) for pattern in SIDE_FILES)
        if wanted and file.is_file() and not (to / file.name).exists():
            shutil.copyfile(file, to / file.name)
            copied.append(file.name)
    return copied
