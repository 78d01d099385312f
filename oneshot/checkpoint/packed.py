"""Packed checkpoints: every 2:4 linear takes 0.5625 of its dense bytes; loaded by plain `from_pretrained`.

    import oneshot                                                    # registers the format with transformers
    model = AutoModelForCausalLM.from_pretrained("llama-2of4-packed")   # linears are oneshot_kernels.Sparse24Linear

On disk a packed linear has two tensors, `...weight` (R, C/2) and `...metadata` (R, ceil(C/8)) uint8, as defined in
oneshot_kernels/reference.py. One that was rounded to int8:row or int4:64 (--quantise) has codes for its weight, and
`...scales` beside them, as defined in oneshot_kernels/rounded.py. Without `import oneshot`, transformers warns of an
unknown quantisation method, builds dense linears, finds tensors of another shape and raises: it never runs with made-up
weights. The config contains the names of linears, never code.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from oneshot_kernels import Rounded24Linear, Sparse24Linear, pack, reference
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import models
from ..models import uneven  # noqa: F401 - registers the other format
from ..models.intake import PACKED
from ..quantise import grids
from . import contents, manifest, rounded

METHOD = PACKED
HINT = "run `import oneshot` before from_pretrained"
GRIDS = ("int8:row", "int4:64")  # what the compiled kernels compute with
Packed = Sparse24Linear | Rounded24Linear


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint: the names of the packed linears, and how to load it.

    grid, stored: where they hold codes, of which grid, and which dtype scale · code is rounded to. Where they differ,
    `grid` is {linear: its grid}; one that is not there holds weights.
    """

    def __init__(self, linears: Iterable[str] = (), to_load: str = HINT, grid: str | dict[str, str] | None = None,
                 stored: str | None = None, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.linears, self.to_load = list(linears), to_load
        if grid is not None:
            mixed = grid if isinstance(grid, dict) else {}
            wrong = [text for text in mixed.values() or [grid] if text not in GRIDS]
            wrong += [name for name in mixed if name not in self.linears]
            if wrong or not isinstance(getattr(torch, str(stored), None), torch.dtype):
                raise ValueError(f"quantization_config of {METHOD}: no grid or dtype: {(wrong or [grid])[0]!r:.30}, "
                                 f"{stored!r:.30}")
            self.grid, self.stored = grid, stored
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise ValueError(f"quantization_config of {METHOD}: unknown entries {', '.join(sorted(unknown))}")

    def grid_of(self, name: str) -> str | None:
        """The grid of a packed linear's codes; None where it holds weights."""
        grid = getattr(self, "grid", None)
        return grid.get(name) if isinstance(grid, dict) else grid


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Replaces dense linears by packed ones before transformers loads the files into them."""

    requires_calibration = True  # in transformers' terms: dense checkpoints are not packed while they are loaded

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None,
                                             **kwargs: Any) -> None:
        for name in self.quantization_config.linears:
            replace(model, name, empty_like(linear_named(model, name), self.quantization_config, name))
        check_files(checkpoint_files or (), len(self.quantization_config.linears),
                    sum(map(bool, map(self.quantization_config.grid_of, self.quantization_config.linears))))
        check_hashes(checkpoint_files or ())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.quantization_config.linears:
            linear = model.get_submodule(name)
            try:
                if isinstance(linear, Rounded24Linear):
                    linear.check()
                    continue
                reference.check(*linear.packed[:2])  # the GPU kernels do not check their inputs
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            linear.prepare()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled; if not, `generate` with a static cache would silently not compile."""
        return True


def check_files(files: Iterable[str], n: int, codes: int = 0) -> None:
    """Raise ValueError unless the files hold `n` packed weights; transformers would only log what is missing.

    codes: how many of them are codes with scales.
    """
    keys = set()
    for file in files:
        with safe_open(file, "pt") as f:
            keys.update(f.keys())
    stems = {key.removesuffix("metadata") for key in keys if key.endswith(".metadata")}
    whole = sum(f"{stem}weight" in keys for stem in stems)
    whole -= max(0, codes - sum({f"{stem}weight", f"{stem}scales"} <= keys for stem in stems))
    if files and not n == whole == len(stems):
        raise ValueError(f"the config names {n} packed linears, the files hold {whole} whole ones and "
                         f"{len(stems) - whole} in part: the folder is incomplete, fetch it again")


_CHECKS = [True]


def check_hashes(files: Sequence[str]) -> None:
    """Raise ValueError naming a tensor that does not have the hash that the manifest beside the files records.

    Changed packed values would not show otherwise. sha256 takes 0.55 s per GB and core (193 MB: 0.105 s, where loading
    lazily from a warm cache takes 0.07 s; the demo's 3 MB: 0.003 s and 0.05 s), less than reading from most disks.
    Without a manifest nothing can be checked; a warning says so.
    """
    folder = Path(files[0]).parent if files else None
    if folder is None or not _CHECKS[-1]:
        return
    try:
        recorded = manifest.read_manifest(folder)
    except ValueError:
        recorded = {}
    if "stored_tensors" not in recorded:
        warnings.warn(f"{folder}: its packed values are loaded unchecked: there is no {manifest.MANIFEST} with their "
                      "hashes beside them", stacklevel=2)
    elif changed := contents.changed_tensors(files, recorded):
        raise ValueError(f"{changed[0]}{f' and {len(changed) - 1} more tensors' if changed[1:] else ''}: not the bytes "
                         f"that {manifest.MANIFEST} records; fetch the folder again or prune again (`oneshot verify` "
                         "lists all that changed)")


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Within the context, packed checkpoints are loaded without checking their hashes."""
    _CHECKS.append(False)
    try:
        yield
    finally:
        _CHECKS.pop()


def pack_model(model: nn.Module, names: list[str], grids_of: Mapping[str, str | None] = MappingProxyType({}),
               scales: Mapping[str, torch.Tensor] = MappingProxyType({})) -> nn.Module:
    """Pack the linears named `names` in place; `save_pretrained` of the model then writes a packed checkpoint.

    grids_of: {linear: the grid that its weights lie on}, with their `scales` {linear: (R, groups)}: of these codes are
    packed.

    Raises ValueError naming the linear that is not 2:4, or not on the grid.
    """
    for name in names:
        linear = linear_named(model, name)
        weight = (linear.weight.data.T if is_conv1d(linear) else linear.weight.data).contiguous()
        try:
            made = rounded_linear(weight, grids_of[name], scales[name], linear.bias) if grids_of.get(name) else (
                Sparse24Linear.from_packed(*pack(weight)[:2], linear.bias))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        replace(model, name, made)
    stored, found = str(linear_dtype(model)).removeprefix("torch."), {
        name: grid for name in names if (grid := grids_of.get(name))}
    one = len(found) == len(names) and len(set(found.values())) == 1  # as an older oneshot reads it
    model.config.quantization_config = PackedConfig(names, **(
        {"grid": found[names[0]] if one else found, "stored": stored} if found else {}))
    model.hf_quantizer = PackedQuantizer(model.config.quantization_config, pre_quantized=True)
    return model


def rounded_linear(weight: torch.Tensor, text: str, scales: torch.Tensor,
                   bias: torch.Tensor | None) -> Rounded24Linear:
    """The packed linear of a stored weight (R, C) that lies on the grid `text` with these scales.

    Raises ValueError for a weight that does not, or is not 2:4.
    """
    grid = grids.parse(text)
    codes = rounded.codes_of(weight, grid, scales)
    return Rounded24Linear.from_codes(codes, scales, bias, bits=grid.bits, group=grid.group, dtype=weight.dtype)


def linear_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the weights that a model's packed linears stand for."""
    return next((m.dtype if isinstance(m, Rounded24Linear) else m.weight.dtype for m in linears(model)), torch.float32)


def pack_checkpoint(model: nn.Module, tensors: dict[str, dict], scales: dict[str, torch.Tensor]) -> dict:
    """Pack, in place, every linear in a manifest's `tensors` that can be packed; returns entries for the manifest.

    scales: of rounded linears; what is packed is taken out of it.

    Raises ValueError naming `--format` when there is none.
    """
    names, left = [], {}
    modules = dict(model.named_modules())
    for name, entry in tensors.items():
        if entry["pattern"] != "2:4":
            left[name] = f"pattern {entry['pattern']}, the packed format is for 2:4"
        elif name not in modules:
            left[name] = "a fused expert, the packed format is for single linears"
        else:
            names.append(name)
    if not names:
        raise ValueError("--format packed: this model has no single linear pruned to 2:4")
    pack_model(model, names, {name: tensors[name].get("grid") for name in names}, scales)
    for name in names:
        scales.pop(name, None)
    packed, dense = bytes_of(model)
    return {"format": "packed", "left_dense": left,
            "packed": {"linears": len(names), "bytes": packed, "dense_bytes": dense}}


def linear_named(model: nn.Module, name: str) -> nn.Module:
    """The linear named `name`. Raises ValueError when the model has none, as config and model then do not match."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, (nn.Linear, models.Conv1D)):
        raise ValueError(f"quantization_config names {name}, which is not a linear of {type(model).__name__}")
    return module


def is_conv1d(linear: nn.Module) -> bool:
    """Whether a linear stores its weight transposed, as (C, R)."""
    return isinstance(linear, models.Conv1D)


def empty_like(linear: nn.Module, config: PackedConfig, name: str) -> Packed:
    """An uninitialised packed linear of the same shape, dtype and bias, as the config has the one of this name."""
    R, C = linear.weight.shape[::-1] if is_conv1d(linear) else linear.weight.shape
    if text := config.grid_of(name):
        grid = grids.parse(text)
        made = Rounded24Linear(C, R, linear.bias is not None, bits=grid.bits, group=grid.group,
                               device=linear.weight.device, dtype=linear.weight.dtype)
        made.dtype = getattr(torch, config.stored)
        return made
    return Sparse24Linear(C, R, linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module named `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def linears(model: nn.Module) -> list[Packed]:
    """All packed linears of a model."""
    return [m for m in model.modules() if isinstance(m, Packed)]


def scales_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: scales (R, groups), float16} of all packed linears that hold codes."""
    return {name: m.half_scales() for name, m in model.named_modules() if isinstance(m, Rounded24Linear)}


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """(bytes of all packed linears' weights, bytes of the same weights when dense)."""
    packed = dense = 0
    for m in linears(model):
        if isinstance(m, Rounded24Linear):
            packed, dense = packed + m.nbytes, dense + m.out_features * m.in_features * m.dtype.itemsize
            continue
        values, metadata, (R, C) = m.packed
        packed += values.numel() * values.element_size() + metadata.numel()
        dense += R * C * values.element_size()
    return packed, dense


def to_dense(model: nn.Module) -> nn.Module:
    """Replace packed linears, in place, by nn.Linear with the same weights; returns the model."""
    for name, m in list(model.named_modules()):
        if isinstance(m, Packed):
            linear = nn.Linear(m.in_features, m.rows, m.bias is not None, device="meta")
            linear.weight = nn.Parameter(m.dense(), requires_grad=False)
            linear.bias = m.bias
            replace(model, name, linear)
    return model
