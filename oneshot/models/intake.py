"""Intake: look at a checkpoint's files before they are loaded, and at what loading made of them.

What goes in must come out: a tensor of the input that the loaded class does not take would be missing in the output. So
the names, shapes and dtypes in the safetensors headers are held against those that the loaded model will save.
"""

import json
import math
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..runtime.hub import hub_away

INDEX = "model.safetensors.index.json"
DEQUANTISED = ("fp8", "mxfp4")  # what transformers turns into bfloat16 while it loads
PACKED = "oneshot_2of4"  # checkpoint/packed.py
RECOMPUTED = ("inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "position_ids")
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes that a weight may have, as safetensors calls them


@dataclass(frozen=True)
class Entry:
    """A tensor as a safetensors header has it. file: its file's name."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3"; "BOOL" takes a byte
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class Lost:
    """Tensors of the input that the loaded model does not save again. names: in order; bytes: of all."""

    names: tuple[str, ...]
    bytes: int

    def __str__(self):
        more = f", such as {self.names[0]}" if self.names else ""
        return f"{len(self.names)} tensors ({self.bytes / 1e6:.3g} MB){more}"


@dataclass(frozen=True)
class Source:
    """What a loaded model came from. folder: where its files are. quantised: by which method they were, or None.
    entries: its tensors there. left: names of those that are not in the model. warnings: what the reader of a record
    should know."""

    folder: Path | None = None
    quantised: str | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


_SOURCES: weakref.WeakKeyDictionary[nn.Module, Source] = weakref.WeakKeyDictionary()


def source_of(model: nn.Module) -> Source:
    """What `load` has found; nothing known of a model that was loaded elsewhere."""
    return _SOURCES.get(model, Source())


def remember(model: nn.Module, source: Source) -> None:
    """Keep what a model came from for `source_of`."""
    _SOURCES[model] = source


def settle(model: nn.Module, config: dict, folder: Path | None, said: str) -> None:
    """Make a loaded model one that saves as an ordinary checkpoint, and remember what it came from.

    Raises ValueError where its class takes only a part of the checkpoint, or a weight is no floating-point one.
    """
    method, warnings, entries = quantisation(config), [], headers(shards(folder, said), said) if folder else {}
    if method in DEQUANTISED:
        undo_quantisation(model)
        warnings.append(f"its weights came quantised ({method}) and are computed and saved as "
                        f"{str(model.dtype).removeprefix('torch.')}")
    check_parameters(model, said)
    if method is None:
        check_dtypes(entries, model, said)
    left = lost(entries, model) if entries else Lost((), 0)
    architecture = (config.get("architectures") or [None])[0]
    if left.names and architecture not in (None, type(model).__name__):
        raise ValueError(f"{said}: is a {architecture}, of which only {type(model).__name__} is loaded: {left} would "
                         "be lost; save the language model alone and give that")
    if left.names:
        warnings.insert(0, f"{said}: {left}, are in its files but not in {type(model).__name__}: they are not in what "
                           "is saved")
    remember(model, Source(folder, method, entries, left.names, tuple(warnings)))


def undo_quantisation(model: nn.Module) -> None:
    """Let a model whose weights were dequantised while loading save them as they are now: transformers would undo the
    conversion and write names that nothing loads."""
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def read_json(file: Path, said: str) -> dict:
    """The JSON object in a file. Raises ValueError beginning with `said` for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{said}: {file.name} cannot be read ({type(error).__name__}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{said}: {file.name} holds no JSON object; fetch it again")
    return found


def check_path(path: Path, said: str) -> None:
    """Raise ValueError for a file where a folder is due, saying what to do with its kind."""
    if not path.is_file():
        return
    kind = path.suffix.lower()
    hint = {".safetensors": "a single file lacks the config and the tokenizer; give the folder that holds it"}
    raise ValueError(f"{said}: {hint.get(kind, 'is a file; give a Hugging Face model folder or a .gguf file')}")


def check_folder(path: Path, said: str) -> dict:
    """The config of a local folder, once its files may be loaded: safetensors only, inside the folder, no adapter, no
    quantisation that would be lost. Raises ValueError beginning with `said`."""
    check_adapter(path, said)
    if not (path / "config.json").is_file():
        hint = "; it holds GGUF files: give one of them by its name" if any(path.glob("*.gguf")) else ""
        raise ValueError(f"{said}: no config.json in this folder, so it is no Hugging Face model{hint}")
    if not any(path.glob("*.safetensors")):
        pickles = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        raise ValueError(f"{said}: " + (
            "its weights are pickle files, which can run code when loaded; save it as safetensors first"
            if pickles else "no safetensors weights in this folder"))
    config = read_json(path / "config.json", said)
    check_config(config, said)
    shards(path, said)
    return config


def check_adapter(path: Path, said: str) -> None:
    """Raise ValueError for a LoRA adapter, alone or beside a model: nobody would apply it to what is saved."""
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{said}: holds a LoRA adapter; merge the adapter first (peft's merge_and_unload), save the "
                         "merged model and give that")


def check_config(config: dict, said: str) -> None:
    """Raise ValueError for a config that names weights elsewhere, or a quantisation that cannot be undone."""
    if config.get("transformers_weights"):
        raise ValueError(f"{said}: its config names other weights (transformers_weights); remove the entry and name "
                         "the weights model.safetensors")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{said}: is an encoder-decoder model; only decoder-only models can be pruned")
    method = quantisation(config)
    if method not in (None, *DEQUANTISED, PACKED):
        raise ValueError(f"{said}: its weights are quantised ({method}); give the unquantised checkpoint: pruning "
                         f"them is only possible where loading undoes it ({', '.join(DEQUANTISED)})")


def quantisation(config: dict) -> str | None:
    """The method that a config says its weights are quantised by; None for none."""
    quantised = config.get("quantization_config")
    if quantised in (None, {}):
        return None
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    return method if isinstance(method, str) else "by an unnamed method"


def check_hub(name: str, options: dict, said: str) -> dict:
    """The config of a model on the hub, once its index names nothing but safetensors; {} where the hub does not answer:
    loading then says why."""
    folder = hub_folder(name, options)
    if folder is None:
        return {}
    config = read_json(folder / "config.json", said)
    check_config(config, said)
    if index := cached(name, INDEX, options):
        shard_names(read_json(index, said), said)
    return config


def hub_folder(name: str, options: dict) -> Path | None:
    """The folder of the cache that holds a hub model's config; None where it cannot be had."""
    config = cached(name, "config.json", options)
    return config.parent if config else None


def cached(name: str, file: str, options: dict) -> Path | None:
    """A file of a hub model in the cache, fetched where it must be; None where it cannot be had."""
    from transformers.utils import cached_file

    where = {"revision": options["revision"], "cache_dir": options["cache_dir"], "local_files_only": bool(hub_away())}
    try:
        found = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
    except Exception:  # a repository that is not there, or closed: loading says so
        return None
    return Path(found) if found else None


def shards(path: Path, said: str) -> list[Path]:
    """The files that transformers will load from a folder. Raises ValueError for an index that names anything but plain
    safetensors files inside it."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not (path / INDEX).is_file():
        return sorted(path.glob("*.safetensors"))
    return [path / name for name in shard_names(read_json(path / INDEX, said), said)
            if (path / name).is_file() or missing(said, name)]


def missing(said: str, name: str) -> bool:
    """Raise ValueError: an index names a file that is not there."""
    raise ValueError(f"{said}: {name} is missing, which its index names; fetch it again")


def shard_names(index: dict, said: str) -> list[str]:
    """The files that an index names. Raises ValueError unless each is a plain safetensors file name."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{said}: {INDEX} is damaged (no weight_map of file names); fetch it again")
    names = sorted(set(found.values()))
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".safetensors"):
            raise ValueError(f"{said}: its index names {name}; only safetensors files inside the folder are read")
    return names


def headers(files: Iterable[Path], said: str) -> dict[str, Entry]:
    """{tensor name: Entry} of safetensors files, read off their headers. Raises ValueError naming a damaged file."""
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118
                    part = f.get_slice(name)
                    found[name] = Entry(part.get_dtype(), tuple(part.get_shape()), file.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{said}: {file.name} is damaged ({error}); fetch it again") from None
    return found


def will_save(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{tensor name: (shape, dtype)} that `save_pretrained` writes for a model, found on tensors without memory."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    saved = revert_weight_conversion(model, {name: t for name, t in state.items() if name not in tied})
    return {name: (tuple(t.shape), t.dtype) for name, t in saved.items()}


def lost(entries: dict[str, Entry], model: nn.Module) -> Lost:
    """What of the input the loaded model does not save again, but for what it computes anew (rotary tables, masks) and
    for tied weights."""
    kept, scales = will_save(model), quantised_parts(entries)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = tuple(name for name in entries if name not in kept and name not in scales and name not in tied
                  and not name.endswith(RECOMPUTED))
    return Lost(names, sum(entries[name].bytes for name in names))


def check_dtypes(entries: dict[str, Entry], model: nn.Module, said: str) -> None:
    """Raise ValueError naming a tensor whose file holds integers where the model has floating-point numbers: they were
    converted while loading, and are not the weights without their scales."""
    for name, (_, dtype) in will_save(model).items():
        if dtype.is_floating_point and name in entries and entries[name].dtype not in FLOATS:
            raise ValueError(f"{said}: {name} is stored as {entries[name].dtype}, no floating-point weight; give "
                             "the unquantised checkpoint")


def quantised_parts(entries: dict[str, Entry]) -> set[str]:
    """Names of what a dequantised weight was stored as beside its values: scales, and MXFP4's blocks."""
    return {name for name in entries if name.endswith(("_scale_inv", ".weight_scale", ".input_scale", "_blocks",
                                                       "_scales"))}


def check_parameters(model: nn.Module, said: str) -> None:
    """Raise ValueError naming a parameter that is no floating-point weight of 16 bits or more, or has no memory."""
    packed = {id(p) for m in model.modules() if hasattr(m, "packed") for p in m.parameters()}
    for name, p in model.named_parameters():
        if id(p) in packed:
            continue
        if p.is_meta:
            raise ValueError(f"{said}: {name} is offloaded (on the meta device); load the model without offload")
        if not p.is_floating_point() or p.element_size() < 2:
            raise ValueError(f"{said}: {name} is stored as {str(p.dtype).removeprefix('torch.')}, which is no "
                             "floating-point weight; give the unquantised checkpoint")
