"""Intake: check a checkpoint's files before they are loaded, and the model after loading.

Nothing of the input may be lost: a tensor that the loaded class does not use would be missing from the output. So the
names, shapes and dtypes in the safetensors headers are compared with those that the loaded model will save.
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

INDEX = "model.safetensors.index.json"
DEQUANTISED = ("fp8", "mxfp4")  # quantisation methods that transformers undoes while loading, to bfloat16
PACKED = "oneshot_2of4"  # see checkpoint/packed.py
RECOMPUTED = ("inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "position_ids")
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes that a weight may have, by their safetensors names


@dataclass(frozen=True)
class Entry:
    """A tensor as described in a safetensors header. file: the name of its file."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3"; a "BOOL" takes one byte
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class Lost:
    """Tensors of the input that the loaded model will not save. names: in order. bytes: their total size."""

    names: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        more = f", such as {self.names[0]}" if self.names else ""
        return f"{len(self.names)} tensors ({self.bytes / 1e6:.3g} MB){more}"


@dataclass(frozen=True)
class Source:
    """What a model was loaded from.

    folder: where its files are, or None. quantised: their quantisation method, or None. entries: {tensor name: Entry}
    of the files. left: names of tensors that are not in the model. warnings: what a reader of the record should know.
    """

    folder: Path | None = None
    quantised: str | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


_SOURCES: weakref.WeakKeyDictionary[nn.Module, Source] = weakref.WeakKeyDictionary()


def source_of(model: nn.Module) -> Source:
    """What `load` found out about a model's files; an empty Source for a model that was loaded by other means."""
    return _SOURCES.get(model, Source())


def settle(model: nn.Module, config: dict, folder: Path | None, said: str) -> None:
    """Prepare a loaded model to be saved as an ordinary checkpoint, and remember what it came from (`source_of`).

    config: of the checkpoint. folder: its files, or None if unknown. said: the start of error messages. Raises
    ValueError if the model's class uses only a part of the checkpoint, or a weight is not floating-point.
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
    _SOURCES[model] = Source(folder, method, entries, left.names, tuple(warnings))


def undo_quantisation(model: nn.Module) -> None:
    """Make a model save dequantised weights as they are; transformers would convert them back to what nothing loads."""
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def read_json(file: Path, said: str) -> dict:
    """The JSON object in a file. Raises ValueError, its message starting with `said`, for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{said}: {file.name} cannot be read ({type(error).__name__}); fetch it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{said}: {file.name} holds no JSON object; fetch it again")
    return found


def check_path(path: Path, said: str) -> None:
    """Raise ValueError if `path` is a file instead of a folder, with advice for its kind of file."""
    if not path.is_file():
        return
    kind = path.suffix.lower()
    hint = {".gguf": "GGUF files are not read; give the safetensors checkpoint that it was made from",
            ".safetensors": "a single file lacks the config and the tokenizer; give the folder that holds it"}
    raise ValueError(f"{said}: {hint.get(kind, 'is a file; give a Hugging Face model folder')}")


def check_folder(path: Path, said: str) -> dict:
    """The config in a local folder, after checking its files.

    Raises ValueError, its message starting with `said`, unless weights are safetensors files inside the folder, with no
    adapter and no quantisation that would be lost.
    """
    check_adapter(path, said)
    if not (path / "config.json").is_file():
        hint = "; it holds GGUF files, which are not read" if any(path.glob("*.gguf")) else ""
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
    """Raise ValueError for a LoRA adapter, with or without a model: nothing would apply it to what is saved."""
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{said}: holds a LoRA adapter; merge the adapter first (peft's merge_and_unload), save the "
                         "merged model and give that")


def check_config(config: dict, said: str) -> None:
    """Raise ValueError for a config with weights elsewhere, an encoder, or a quantisation that cannot be undone."""
    if config.get("transformers_weights"):
        raise ValueError(f"{said}: its config names other weights (transformers_weights); remove the entry and rename "
                         "the weights to model.safetensors")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{said}: is an encoder-decoder model; only decoder-only models can be pruned")
    method = quantisation(config)
    if method not in (None, *DEQUANTISED, PACKED):
        raise ValueError(f"{said}: its weights are quantised ({method}); give the unquantised checkpoint: pruning "
                         f"them is only possible where loading undoes it ({', '.join(DEQUANTISED)})")


def quantisation(config: dict) -> str | None:
    """The method by which a config says that the weights are quantised; None if they are not."""
    quantised = config.get("quantization_config")
    if quantised in (None, {}):
        return None
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    return method if isinstance(method, str) else "by an unnamed method"


def check_hub(name: str, options: dict, said: str) -> dict:
    """The config of a model on the hub, checked like a folder's; {} if the hub does not answer: loading reports why."""
    folder = hub_folder(name, options)
    if folder is None:
        return {}
    config = read_json(folder / "config.json", said)
    check_config(config, said)
    if index := cached(name, INDEX, options):
        shard_names(read_json(index, said), said)
    return config


def hub_folder(name: str, options: dict) -> Path | None:
    """The folder of the cache that holds a hub model's config; None if it is not available."""
    config = cached(name, "config.json", options)
    return config.parent if config else None


def cached(name: str, file: str, options: dict) -> Path | None:
    """A file of a hub model in the cache, downloaded if necessary; None if it is not available."""
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file, revision=options["revision"], cache_dir=options["cache_dir"],
                            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    except Exception:  # a repository that does not exist or is not accessible; loading reports that
        return None
    return Path(found) if found else None


def shards(path: Path, said: str) -> list[Path]:
    """The files that transformers will load from a folder. Raises ValueError for an index with any other files."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not (path / INDEX).is_file():
        return sorted(path.glob("*.safetensors"))
    return [path / name for name in shard_names(read_json(path / INDEX, said), said)
            if (path / name).is_file() or missing(said, name)]


def missing(said: str, name: str) -> bool:
    """Raise ValueError, as the index names a file that does not exist."""
    raise ValueError(f"{said}: {name} is missing, which its index names; fetch it again")


def shard_names(index: dict, said: str) -> list[str]:
    """The names of the files in an index. Raises ValueError unless each is a safetensors file without a folder."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{said}: {INDEX} is damaged (no weight_map of file names); fetch it again")
    names = sorted(set(found.values()))
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".safetensors"):
            raise ValueError(f"{said}: its index names {name}; only safetensors files inside the folder are read")
    return names


def headers(files: Iterable[Path], said: str) -> dict[str, Entry]:
    """{tensor name: Entry} from the headers of safetensors files. Raises ValueError naming a damaged file."""
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
    """{tensor name: (shape, dtype)} that `save_pretrained` writes for a model, determined without using memory."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    saved = revert_weight_conversion(model, {name: t for name, t in state.items() if name not in tied})
    return {name: (tuple(t.shape), t.dtype) for name, t in saved.items()}


def lost(entries: dict[str, Entry], model: nn.Module) -> Lost:
    """The tensors of the input that the loaded model will not save, except tied weights and RECOMPUTED tables."""
    kept, scales = will_save(model), quantised_parts(entries)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = tuple(name for name in entries if name not in kept and name not in scales and name not in tied
                  and not name.endswith(RECOMPUTED))
    return Lost(names, sum(entries[name].bytes for name in names))


def check_dtypes(entries: dict[str, Entry], model: nn.Module, said: str) -> None:
    """Raise ValueError naming a tensor stored as integers but floating-point in the model: it would lack its scales."""
    for name, (_, dtype) in will_save(model).items():
        if dtype.is_floating_point and name in entries and entries[name].dtype not in FLOATS:
            raise ValueError(f"{said}: {name} is stored as {entries[name].dtype}, no floating-point weight; give "
                             "the unquantised checkpoint")


def quantised_parts(entries: dict[str, Entry]) -> set[str]:
    """Names of the tensors from which weights were dequantised, besides their values: scales, and MXFP4's blocks."""
    return {name for name in entries if name.endswith(("_scale_inv", ".weight_scale", ".input_scale", "_blocks",
                                                       "_scales"))}


def check_parameters(model: nn.Module, said: str) -> None:
    """Raise ValueError naming a parameter that is not a floating-point weight of at least 16 bits, or has no memory."""
    packed = {id(p) for m in model.modules() if hasattr(m, "packed") for p in m.parameters()}
    for name, p in model.named_parameters():
        if id(p) in packed:
            continue
        if p.is_meta:
            raise ValueError(f"{said}: {name} is offloaded (on the meta device); load the model without offload")
        if not p.is_floating_point() or p.element_size() < 2:
            raise ValueError(f"{said}: {name} is stored as {str(p.dtype).removeprefix('torch.')}, which is no "
                             "floating-point weight; give the unquantised checkpoint")
