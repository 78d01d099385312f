"""Compressed checkpoints: rounded linears as `compressed-tensors` stores them, which transformers and vLLM load.

    model = AutoModelForCausalLM.from_pretrained("llama-int4")     # needs compressed-tensors, not oneshot

A linear has `...weight_packed`, int32 words of its codes (zeros included), `...weight_scale` (R, groups) and
`...weight_shape`. The scales are stored in float16, as they are; a loader casts them to the model's dtype, so that a
model in bfloat16 computes with weights that are off by a rounding to bfloat16. `verify` reads the files themselves.
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
from ..quantise import grids
from . import rounded
from .contents import Fault

METHOD = "compressed-tensors"
PARTS = ("weight_packed", "weight_scale", "weight_shape")


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


def check_flags(grid: grids.Grid | None) -> None:
    """Raise ValueError naming `--format` where the format or its library cannot be used for a grid."""
    if not isinstance(grid, grids.Integers) or grid.bits > 8:
        raise ValueError(f"--format {METHOD}: goes with --quantise int2 to int8, such as int4:64, and --save")
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ValueError(f"--format {METHOD}: needs its library: pip install 'oneshot[compressed]'")


def check_model(model: nn.Module, grid: grids.Grid) -> None:
    """Raise ValueError naming `--format` and the first linear that the format cannot hold."""
    for weight in models.all_weights(model):
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
    grid, dense = grids.parse(next(iter(tensors.values()))["grid"]), 0
    for name in tensors:
        linear = model.get_submodule(name)
        W = linear.weight.data
        made = Compressed(rounded.codes_of(W, grid, scales[name]), scales.pop(name), grid.bits, linear.bias)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
        dense += W.numel() * W.element_size()
    ignored = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    model.config.quantization_config = config_of(grid, ignored)
    stored = sum(t.numel() * t.element_size() for name in tensors
                 for t in model.get_submodule(name).buffers())
    return {"format": METHOD, "left_dense": {},
            "packed": {"linears": len(tensors), "bytes": stored, "dense_bytes": dense}}


def replaced(model: nn.Module) -> set[str]:
    """Names of the weights in whose place `pack_checkpoint` has put others."""
    return {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Compressed)}


def config_of(grid: grids.Integers, ignored: list[str]) -> dict:
    """The `quantization_config`. ignored: names of the nn.Linear that are not rounded."""
    strategy = {"strategy": "channel"} if grid.group is None else {"strategy": "group", "group_size": grid.group}
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": True, **strategy}
    return {"quant_method": METHOD, "format": "pack-quantized", "quantization_status": "compressed", "ignore": ignored,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@contextlib.contextmanager
def unpacked(folder: Path, data: dict) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """(an ordinary folder that holds the same model dense, {linear: its scales}), removed at the end.

    data: the manifest. Raises ValueError naming a linear whose tensors are missing or do not fit.
    """
    files = sorted(folder.glob("model*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    scales = {}
    for name, entry in data["tensors"].items():
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
    grid = grids.parse(next(iter(data["tensors"].values()))["grid"])
    want = config_of(grid, config.get("ignore", []))
    wrong = [key for key in ("quant_method", "format", "config_groups") if config.get(key) != want[key]]
    return [Fault("config.json", f"its quantization_config has another {key} than {grid} needs") for key in wrong]
