"""Compressed checkpoints: rounded linears as `compressed-tensors` stores them, which transformers and vLLM load.

    model = AutoModelForCausalLM.from_pretrained("llama-int4")     # needs compressed-tensors, not oneshot

A linear has `...weight_packed`, int32 words of its codes (zeros included), `...weight_scale` (R, groups) and
`...weight_shape`. The scales are stored in float16, as they are; a loader casts them to the model's dtype, so that a
model in bfloat16 computes with weights that are off by a rounding to bfloat16. `verify` reads the files themselves.

Where linears differ, the config has a group for each grid, with the linears' full names; those without a grid are
stored as they are. vLLM joins the linears of JOINED and asks for one grid there, which is a warning.
"""

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import models
from ..quantise import grids, mixed
from . import rounded
from .contents import Fault

METHOD = "compressed-tensors"
PARTS = ("weight_packed", "weight_scale", "weight_shape")
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Compressed(nn.Module):
    """What a rounded nn.Linear is in such a checkpoint: its tensors, to be saved. It computes nothing."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: int,
                 bias: torch.Tensor | None) -> None:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        super().__init__()
        tensors = pack_to_int32(codes.to(torch.int8), bits), scales.half(), torch.tensor(codes.shape)
        for name, tensor in zip(PARTS, tensors, strict=True):
            self.register_buffer(name, tensor)
        self.bias = bias


def check_flags(own: mixed.Grids | None) -> None:
    """Raise ValueError naming `--format` where the format or its library cannot be used for these grids."""
    if not own or not own.kinds or any(not isinstance(grid, grids.Integers) or grid.bits > 8 for grid in own.kinds):
        raise ValueError(f"--format {METHOD}: goes with --quantise int2 to int8, such as int4:64, and --save")
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ValueError(f"--format {METHOD}: needs its library: pip install 'oneshot[compressed]'")


def check_model(model: nn.Module, own: mixed.Grids) -> None:
    """Raise ValueError naming `--format` and the first linear that the format cannot hold."""
    for weight in models.all_weights(model):
        if (grid := own.of(weight.name)) is None:
            continue
        if weight.transposed or weight.expert is not None:
            raise ValueError(f"--format {METHOD}: {weight.name} is no nn.Linear; use --format dense")
        C = weight.shape[1]
        if C % grid.width(C):
            raise ValueError(f"--format {METHOD}: {weight.name} has {C} inputs, no whole groups of {grid.group}; use "
                             f"--quantise int{grid.bits}:32 or :row")


def pack_checkpoint(model: nn.Module, tensors: dict[str, dict], scales: dict[str, torch.Tensor]) -> dict:
    """Replace, in place, every linear in a manifest's `tensors` by what is saved; returns entries for the manifest.

    scales: {linear: (R, groups)}, taken out as they are packed. The model can only be saved afterwards.
    """
    found, dense = {name: entry["grid"] for name, entry in tensors.items() if "grid" in entry}, 0
    for name, text in found.items():
        linear, grid = model.get_submodule(name), grids.parse(text)
        W = linear.weight.data
        made = Compressed(rounded.codes_of(W, grid, scales[name]), scales.pop(name), grid.bits, linear.bias)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
        dense += W.numel() * W.element_size()
    ignored = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    model.config.quantization_config = config_of(found, ignored)
    stored = sum(t.numel() * t.element_size() for name in found
                 for t in model.get_submodule(name).buffers())
    return {"format": METHOD, "left_dense": {}, "warnings": torn(tensors),
            "packed": {"linears": len(found), "bytes": stored, "dense_bytes": dense}}


def torn(tensors: dict[str, dict]) -> list[str]:
    """A warning about linears that vLLM joins and that differ in their grids. tensors: the manifest's."""
    found = []
    for name in tensors:
        owner, _, first = name.rpartition(".")
        group = next((own for own in JOINED if own[0] == first), ())
        own = {(tensors.get(f"{owner}.{part}") or {}).get("grid") for part in group}
        found += [f"{owner} ({', '.join(group)})"] if len(own) > 1 else []
    return [f"{METHOD}: vLLM joins {found[0]} and asks for one grid there, so it does not load this folder; "
            f"transformers does ({len(found)} such groups)"] if found else []


def replaced(model: nn.Module) -> set[str]:
    """Names of the weights in whose place `pack_checkpoint` has put others."""
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Compressed)}


def config_of(found: dict[str, str], ignored: list[str]) -> dict:
    """The `quantization_config`. found: {linear: its grid}. ignored: names of the nn.Linear that are not rounded.

    Linears of a single grid are targeted by their class, others by name: a class comes before names in vLLM.
    """
    kinds = list(dict.fromkeys(found.values()))
    targets = {text: [name for name, own in found.items() if own == text] for text in kinds}
    return {"quant_method": METHOD, "format": "pack-quantized", "quantization_status": "compressed", "ignore": ignored,
            "config_groups": {f"group_{i}": {"targets": targets[text] if kinds[1:] else ["Linear"], "weights": scheme(
                grids.parse(text))} for i, text in enumerate(kinds)}}


def scheme(grid: grids.Integers) -> dict:
    """The part of the config that says how a grid's weights are stored."""
    strategy = {"strategy": "channel"} if grid.group is None else {"strategy": "group", "group_size": grid.group}
    return {"num_bits": grid.bits, "type": "int", "symmetric": True, **strategy}


@contextlib.contextmanager
def unpacked(folder: Path, data: dict) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """(an ordinary folder that holds the same model dense, {linear: its scales}), removed at the end.

    data: the manifest. Raises ValueError naming a linear whose tensors are missing or do not fit.
    """
    files = sorted(folder.glob("model*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    scales = {}
    for name, entry in data["tensors"].items():
        if "grid" not in entry:
            continue
        try:
            words, s, _ = (tensors.pop(f"{name}.{part}") for part in PARTS)
            tensors[f"{name}.weight"] = dense(words, s, entry)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{name}: its tensors in {folder} are damaged ({type(error).__name__})") from None
        scales[name] = s
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, Path(place) / file.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        (Path(place) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, Path(place) / "model.safetensors", metadata={"format": "pt"})
        yield Path(place), scales


def dense(words: torch.Tensor, scales: torch.Tensor, entry: dict) -> torch.Tensor:
    """The stored weight (R, C) of a linear with this entry in the manifest."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    grid = grids.parse(entry["grid"])
    codes = unpack_from_int32(words, grid.bits, torch.Size(entry["shape"]))
    return grid.value(codes.float(), scales.float()).to(getattr(torch, entry["dtype"]))


def faults(folder: Path, data: dict) -> list[Fault]:
    """What of the config does not agree with the manifest."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    found = {name: entry["grid"] for name, entry in data["tensors"].items() if "grid" in entry}
    want, ignored = config_of(found, config.get("ignore", [])), config.get("ignore") or []
    wrong = [key for key in ("quant_method", "format", "config_groups") if config.get(key) != want[key]]
    wrong += ["ignore"] if set(ignored) & set(found) else []
    kinds = " and ".join(dict.fromkeys(found.values()))
    return [Fault("config.json", f"its quantization_config has another {key} than {kinds} needs") for key in wrong]
