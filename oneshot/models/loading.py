"""Load a model and its tokenizer; identify its weights by a fingerprint."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..runtime.flag import flag as new_flag
from ..runtime.hub import hub_away
from ..runtime.inputs import reason
from . import gguf, intake
from .blocks import blocks, shares_weights
from .offload import OFFLOAD, OnDisk, on_disk
from .source import larger_class, settle

DEMO = Path(__file__).parent.parent / "demo" / "model"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """Flags of loading a model."""

    model: str = new_flag("demo", "local folder, GGUF file, name on the hub, demo (the tiny model shipped with "
                                  "oneshot), or smollm2 (a real one of 135M parameters, fetched once)",
                          section="what", bears_on="loading", shown=False, python=False)
    dtype: str = new_flag("auto", "dtype in which weights are kept and saved (that of computing: --compute)",
                          section="machine", bears_on="loading", python=False, choices=DTYPES)
    model_revision: str | None = new_flag(None, "revision of a hub model", section="machine", bears_on="loading",
                                          python=False)
    cache_dir: str | None = new_flag(None, "Hugging Face cache folder", section="machine", bears_on="output",
                                     python=True)
    offload: str = new_flag("none", "disk: for a model larger than memory; blocks are read one at a time from the "
                                    "safetensors files and written, pruned, as shards of --save; the results are the "
                                    "same", section="machine", bears_on="output", choices=OFFLOAD)
    trust_remote_code: bool = new_flag(False, "run code from the model's repository; off by default, as such code can "
                                              "do anything", section="machine", bears_on="loading", python=False,
                                       rows=("pruned",), trusts=True)

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        if not self.model:
            raise ValueError("--model: is empty")


def load(name: str | Path, *, dtype: str = "auto", revision: str | None = None, cache_dir: str | None = None,
         trust_remote_code: bool = False, flag: str = "--model", **how: Any) -> tuple[nn.Module, Tokenizer]:
    """(model, tokenizer) from a local folder, a GGUF file, a name on the hub, "demo" or "smollm2", on the CPU, in
    evaluation mode.

    dtype: "auto" (as stored) or the name of a torch dtype. revision, cache_dir, trust_remote_code: as for transformers'
    `from_pretrained`. how: `offload`, "disk" for a model whose blocks stay there (offload.py); `attn_implementation`,
    as for `from_pretrained`. Only safetensors files inside the folder are read. Weights that transformers can
    dequantise (block FP8, MXFP4) become bfloat16. `models.source_of(model)` then says what the files held.

    Raises ValueError naming `flag` when the model cannot be loaded, or when a part of the checkpoint would be lost.
    """
    said = f"{flag} {name}".strip()
    if not isinstance(name, str | Path):
        raise ValueError(f"{said}: give a folder, a file or a name, not a {type(name).__name__}")
    found = place_of(name, said)
    path = Path(found).expanduser()
    away = how.pop("offload", "none") == "disk"
    if gguf.is_gguf(path):
        if away:
            raise ValueError(f"{said}: is a GGUF file, which --offload disk cannot read; give a folder of safetensors")
        return gguf.load(path, dtype, said)
    intake.check_path(path, said)
    name = found
    local = path.is_dir()
    if not local and (str(name).count("/") > 1 or str(name).startswith((".", "/", "~")) or path.exists()):
        raise ValueError(f"{said}: no such folder")
    options = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    options |= {} if local else {"local_files_only": bool(hub_away())}
    source = str(path) if local else str(name)
    config = intake.check_folder(path, said) if local else intake.check_hub(source, options, said)
    how |= {"dtype": dtype} | ({"device_map": {"": "meta"}} if away else {})
    if away and (method := intake.quantisation(config)):
        raise ValueError(f"{said}: its weights are stored by {method}, which --offload disk cannot read; leave it out")
    model, tokenizer, info = from_pretrained(source, config, options, how, said)
    if info["missing_keys"]:  # transformers would initialise them at random
        missing, own = sorted(info["missing_keys"]), type(model).__name__
        if source_class := larger_class(config, model):
            raise ValueError(f"{said}: is a {source_class}, without {len(missing)} tensors of a {own}, such as "
                             f"{missing[0]}; give a causal language model")
        raise ValueError(f"{said}: its files lack {len(missing)} tensors, such as {missing[0]}; fetch it again")
    if info["mismatched_keys"]:
        key, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ValueError(f"{said}: {key} is {tuple(stored)} in its files, {tuple(wanted)} by its config; correct "
                         "config.json or fetch it again")
    folder = path if local else intake.hub_folder(source, options)
    if away:
        keep_on_disk(model, folder, said)
    settle(model, config, folder, said)
    gguf.recall(model, path if local else source)
    return model.eval().requires_grad_(False), tokenizer


def place_of(name: str | Path, said: str) -> str | Path:
    """The folder, file or name on the hub that a model's name stands for: "demo" and "smollm2" have other ones."""
    return {"demo": lambda: DEMO, gguf.SMOLLM2: lambda: gguf.smollm2(said)}.get(str(name), lambda: name)()


def absolute(name: str | Path) -> str:
    """The name of a model that finds it from any working directory: of a folder or file, its whole path."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() and str(name) not in ("demo", gguf.SMOLLM2) else str(name)


def from_pretrained(source: str, config: dict, options: dict, how: dict,
                    said: str) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, transformers' loading info: missing_keys, mismatched_keys, ...).

    source: folder or name on the hub. config: the checkpoint's. options: for model and tokenizer. how: for the model.

    Raises ValueError, its message starting with `said`, for whatever any library raises.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if intake.quantisation(config) in intake.DEQUANTISED:
            how["config"] = AutoConfig.from_pretrained(source, **options)
            how["config"].quantization_config = {**config["quantization_config"], "dequantize": True}
        model, info = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, ignore_mismatched_sizes=True,
                                                           output_loading_info=True, **how, **options)
    except Exception as error:  # a damaged checkpoint can raise anything in three libraries
        local = Path(source).is_dir()
        if local and not any(Path(source).glob("*token*")) and not any(Path(source).glob("*vocab*")):
            raise ValueError(f"{said}: no tokenizer in this folder; copy the tokenizer's files into it") from error
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            raise ValueError(f"{said}: needs Python code that lies beside its weights; look at it, then add "
                             "--trust-remote-code") from error
        why = f"KeyError: {reason(error)}" if isinstance(error, KeyError) else reason(error)  # else a name in quotes
        where = "" if local else "no such folder here, and as a hub name it "
        raise ValueError(f"{said}: {where}cannot be loaded ({why})") from error
    return model, tokenizer, info


def keep_on_disk(model: nn.Module, folder: Path | None, said: str) -> None:
    """Let the blocks of a model that was loaded onto the meta device stay in its files; read everything else.

    Raises ValueError for a model that cannot be read block by block.
    """
    if model.is_remote_code():
        raise ValueError(f"{said}: brings code of its own, and --offload disk does not know what that computes while "
                         "loading; leave it out")
    if shares_weights(model):
        raise ValueError(f"{said}: its blocks share weights, so --offload disk cannot drop one of them; leave it out")
    OnDisk(model, blocks(model)[0], intake.shards(folder, said) if folder else [], said)


def quiet() -> None:
    """Turn off transformers' progress bars and log messages; what matters in them oneshot reports by itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, parameter) of every parameter, each with its values; of a model on disk, those of one block at a time."""
    disk = on_disk(model)
    for name, p in model.named_parameters():
        if disk and p.is_meta:
            disk.fetch(disk.block_of(name))
        yield name, p
    if disk:
        disk.drop()


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over every parameter's name, dtype, shape and bytes: identifies the weights a run starts from."""
    digest = hashlib.sha256()
    for name, p in stored(model):
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
