"""Source: what a loaded model came from, and what of it would be lost.

What goes in must come out: a tensor of the input that the loaded class does not take would be missing in the output. So
the names, shapes and dtypes in the safetensors headers are compared with those that the loaded model will save.
"""

import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .intake import DEQUANTISED, ROUNDED, Entry, headers, quantisation, shards
from .offload import on_disk

RECOMPUTED = re.compile(r"(.*\.)?(inv_freq|position_ids|(attn|attention)\.masked_bias)")  # tables in old checkpoints
CAUSAL_MASK = re.compile(r"(.*\.)?(attn|attention)\.bias")  # likewise, (1, 1, T, T); a vector of that name is learnt
SCALES = ("_scale_inv", ".weight_scale", ".input_scale", "_blocks", "_scales")  # beside quantised values
FLOATS = {"F64", "F32", "F16", "BF16"}  # dtypes that a weight may have, as safetensors calls them


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
    stands_for: what was taken for a name that can mean one of several ("smollm2"), or None.
    """

    folder: Path | None = None
    quantised: str | None = None
    entries: dict[str, Entry] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    stands_for: str | None = None


_SOURCES: weakref.WeakKeyDictionary[nn.Module, Source] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, source: Source) -> None:
    """Keep what a model came from for `source_of`."""
    _SOURCES[model] = source


def source_of(model: nn.Module) -> Source:
    """What `load` found out about a model's files; an empty Source for a model that was loaded by other means."""
    return _SOURCES.get(model, Source())


def settle(model: nn.Module, config: dict, folder: Path | None, said: str) -> None:
    """Prepare a loaded model to be saved as an ordinary checkpoint, and remember what it came from (`source_of`).

    config: of the checkpoint. folder: its files, or None if unknown. said: the start of error messages. Raises
    ValueError if the model's class uses only a part of the checkpoint, or a weight is not floating-point.
    """
    method, warnings, files = quantisation(config), [], shards(folder, said) if folder else []
    entries = headers(files, said)
    if method in DEQUANTISED:
        undo_quantisation(model)
        warnings.append(f"its weights came quantised ({method}) and are computed and saved as "
                        f"{str(model.dtype).removeprefix('torch.')}")
    check_parameters(model, said)
    if method is None:
        check_dtypes(entries, model, said)
    left = lost(entries, model, method) if entries else Lost((), 0)
    if left.names and (whole := larger_class(config, model)):
        raise ValueError(f"{said}: is a {whole}, of which only {type(model).__name__} is loaded: {left} would "
                         "be lost; save the language model alone and give that")
    if folder and (unread := sorted({*folder.glob("*.safetensors")} - {*files, folder / ROUNDED})):
        size = sum(file.stat().st_size for file in unread) / 1e6
        warnings.append(f"{said}: {len(unread)} more safetensors files ({size:.3g} MB), such as {unread[0].name}, are "
                        "not read and not in what is saved")
    if left.names:
        warnings.insert(0, f"{said}: {left}, are in its files but not in {type(model).__name__}: they are not in what "
                           "is saved")
    remember(model, Source(folder, method, entries, left.names, tuple(warnings)))


def architecture(config: dict) -> str | None:
    """The class that a checkpoint says it is of."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def larger_class(config: dict, model: nn.Module) -> str | None:
    """What a checkpoint is, if the loaded class is another, say the language model of a multimodal one; else None."""
    own, kind = architecture(config), config.get("model_type")
    if own not in (None, type(model).__name__):
        return own
    return kind if isinstance(kind, str) and kind != model.config.model_type else None


def was_dequantised(model: nn.Module) -> bool:
    """Whether transformers dequantised the weights while loading: `save_pretrained` would quantise them again."""
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [op for conversion in conversions for op in getattr(conversion, "operations", None) or ()]
    return any("dequant" in type(op).__name__.lower() for op in operations)


def undo_quantisation(model: nn.Module) -> None:
    """Make a model save dequantised weights as they are; transformers would convert them back to what nothing loads."""
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def will_save(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{tensor name: (shape, dtype)} that `save_pretrained` writes for a model, determined without using memory."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    saved = revert_weight_conversion(model, {name: t for name, t in state.items() if name not in tied})
    return {name: (tuple(t.shape), t.dtype) for name, t in saved.items()}


def lost(entries: dict[str, Entry], model: nn.Module, method: str | None) -> Lost:
    """The tensors of the input that the loaded model will not save. method: by which they are quantised, or None.

    Not lost are tied weights, tables that the class computes itself, scales of quantised weights, and names of the base
    class ("h.0..." for "transformer.h.0...", as GPT-2 is published), which transformers takes as well.
    """
    kept = {*will_save(model), *(getattr(model, "all_tied_weights_keys", None) or {})}
    names = tuple(name for name, entry in entries.items() if not (
        name in kept or f"{model.base_model_prefix}.{name}" in kept - entries.keys() or is_table(name, entry)
        or (method in DEQUANTISED and name.endswith(SCALES))))
    return Lost(names, sum(entries[name].bytes for name in names))


def is_table(name: str, entry: Entry) -> bool:
    """Whether a tensor is one that old checkpoints hold and every class computes by itself."""
    return bool(RECOMPUTED.fullmatch(name) or (CAUSAL_MASK.fullmatch(name) and len(entry.shape) == 4))


def check_dtypes(entries: dict[str, Entry], model: nn.Module, said: str) -> None:
    """Raise ValueError naming a tensor stored as integers but floating-point in the model: it would lack its scales."""
    for name, (_, dtype) in will_save(model).items():
        if dtype.is_floating_point and name in entries and entries[name].dtype not in FLOATS:
            raise ValueError(f"{said}: {name} is stored as {entries[name].dtype}, no floating-point weight; give "
                             "the unquantised checkpoint")


def check_kind(model: object, said: str) -> None:
    """Raise ValueError for anything but a transformers model that works without an encoder."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{said}: is a {type(model).__name__}, no transformers model; oneshot.load loads one")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{said}: {type(model).__name__} is an encoder-decoder model; only decoder-only models can be "
                         "pruned")


def check_parameters(model: nn.Module, said: str) -> None:
    """Raise ValueError naming a parameter that is not a floating-point weight of at least 16 bits, or has no memory."""
    packed = {id(p) for m in model.modules() if hasattr(m, "packed") for p in m.parameters()}
    for name, p in model.named_parameters():
        if id(p) in packed:
            continue
        if p.is_meta and not on_disk(model):
            raise ValueError(f"{said}: {name} is offloaded (on the meta device); load the model without offload")
        if not p.is_floating_point() or p.element_size() < 2:
            raise ValueError(f"{said}: {name} is stored as {str(p.dtype).removeprefix('torch.')}, which is not a "
                             "floating-point weight; give the unquantised checkpoint")
