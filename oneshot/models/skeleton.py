"""Skeleton: a model's modules and shapes, without its weights: for what has to be known before anything is read."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.inputs import reason
from . import gguf, intake
from .loading import Tokenizer, place_of


def skeleton(name: str | Path, *, dtype: str = "auto", flag: str = "--model",
             **options: Any) -> tuple[nn.Module, Tokenizer, list[Path]]:
    """(the model on the meta device, its tokenizer, its safetensors files; none of a hub model).

    dtype: as for `load`. options: revision, cache_dir, trust_remote_code, as for `load`. Only the config, the tokenizer
    and the headers of the safetensors files are read.

    Raises ValueError naming `flag` for what cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    said = f"{flag} {name}"
    name = place_of(name, said)
    path = Path(name).expanduser()
    if gguf.is_gguf(path):
        raise ValueError(f"{said}: is a GGUF file; give a folder of safetensors, or a name on the hub")
    intake.check_path(path, said)
    local = path.is_dir()
    options = {"revision": None, "cache_dir": None, "trust_remote_code": False} | options
    written = intake.check_folder(path, said) if local else intake.check_hub(str(name), options, said)
    if not written:
        raise ValueError(f"{said}: no such folder here, and the hub does not give its config; check the name")
    files, source = intake.shards(path, said) if local else [], str(path if local else name)
    entries = intake.headers(files, said)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=stored(written, entries, dtype),
                                                     trust_remote_code=options["trust_remote_code"])
    except Exception as error:  # a damaged config can raise anything in two libraries
        raise ValueError(f"{said}: cannot be loaded ({type(error).__name__}: {reason(error)})") from error
    return model.eval().requires_grad_(False), tokenizer, files


def stored(config: dict, entries: dict[str, intake.Entry], dtype: str) -> torch.dtype:
    """The dtype that `load` would keep the weights in."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    said = config.get("dtype") or config.get("torch_dtype")
    found = next((names[entry.dtype] for entry in entries.values() if entry.dtype in names), "float32")
    name = dtype if dtype != "auto" else "bfloat16" if intake.quantisation(config) else said or found
    return getattr(torch, name) if hasattr(torch, str(name)) else torch.float32
