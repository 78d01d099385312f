"""Intake: look at a checkpoint's files before anything is loaded: what is read, from where, and what is refused."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..runtime.hub import hub_away

INDEX = "model.safetensors.index.json"
DEQUANTISED = ("fp8", "mxfp4")  # what transformers turns into bfloat16 while it loads
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")  # their number in a config
PACKED = "oneshot_2of4"  # checkpoint/packed.py
ROUNDED = "scales.safetensors"  # checkpoint/rounded.py; no tensors of the model
UNEVEN = "oneshot_uneven"  # uneven.py


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
    hint = {".safetensors": "a single file lacks the config and the tokenizer; give the folder that holds it"}
    raise ValueError(f"{said}: {hint.get(kind, 'is a file; give a Hugging Face model folder or a .gguf file')}")


def check_folder(path: Path, said: str) -> dict:
    """The config in a local folder, after checking its files.

    Raises ValueError, its message starting with `said`, unless weights are safetensors files inside the folder, with no
    adapter and no quantisation that would be lost.
    """
    check_adapter(path, said)
    if not (path / "config.json").is_file():
        hint = "; it holds GGUF files: give one of them by its name" if any(path.glob("*.gguf")) else ""
        raise ValueError(f"{said}: no config.json in this folder, so it is not a Hugging Face model{hint}")
    if not any(path.glob("*.safetensors")):
        pickles = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        raise ValueError(f"{said}: " + (
            "its weights are pickle files, which can run code when loaded; save it as safetensors first"
            if pickles else "no safetensors weights in this folder"))
    config = read_json(path / "config.json", said)
    check_config(config, said)
    check_layers(config, shards(path, said), said)
    return config


def check_layers(config: dict, files: Iterable[Path], said: str) -> None:
    """Raise ValueError if the config asks for more layers than the files could fill: building them takes all memory."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    layers = max((n for part in parts for key in LAYERS if isinstance(n := part.get(key), int)), default=0)
    if layers > 1000 and layers > (tensors := len(headers(files, said))):
        raise ValueError(f"{said}: its config names {layers:g} layers, its files hold {tensors} tensors; correct "
                         "config.json or fetch it again")


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
    for key, value in config.items():  # transformers would build a part for each of them, for ever
        if isinstance(value, int) and abs(value) >= 2**40:
            raise ValueError(f"{said}: its config says that {key} is {str(value)[:30]}; correct it or fetch it again")
    method = quantisation(config)
    if method not in (None, *DEQUANTISED, PACKED, UNEVEN):
        raise ValueError(f"{said}: its weights are quantised ({method}); give the unquantised checkpoint, as only "
                         f"what loading can undo is read here ({', '.join(DEQUANTISED)})")


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

    where = {"revision": options["revision"], "cache_dir": options["cache_dir"], "local_files_only": bool(hub_away())}
    try:
        found = cached_file(name, file, **where, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False)
    except Exception:  # a repository that does not exist or is not accessible; loading reports that
        return None
    return Path(found) if found else None


def shards(path: Path, said: str) -> list[Path]:
    """The files that transformers will load from a folder. Raises ValueError for an index with any other files."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not (path / INDEX).is_file():
        return sorted(path.glob("*.safetensors"))
    files = [path / name for name in shard_names(read_json(path / INDEX, said), said)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{said}: {absent[0]} is missing, which its index names; fetch it again")
    return files


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
    """{tensor name: Entry} from the headers of safetensors files.

    Raises ValueError naming a damaged file, or a tensor that is in two files.
    """
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118
                    part = f.get_slice(name)
                    if name in found:
                        raise ValueError(f"{said}: {name} is in {found[name].file} and in {file.name}; fetch it again")
                    found[name] = Entry(part.get_dtype(), tuple(part.get_shape()), file.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{said}: {file.name} is damaged ({error}); fetch it again") from None
    return found
