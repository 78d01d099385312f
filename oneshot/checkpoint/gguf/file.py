"""File: `model.gguf` written tensor by tensor, and read back to prove that it holds the model.

Matrices are stored in one type, those that `--quantise q8_0|q4_0` rounded as their codes and scales; norms, biases and
rope factors are float32, which llama.cpp computes with. float32 holds every weight exactly, float16 and bfloat16 those
of their own dtype; what another type rounds is a warning with its number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...quantise import grids
from .. import rounded
from ..contents import Fault
from ..manifest import pattern_of
from . import blocks, family, vocabulary

SHORT = {dtype: kind for kind, dtype in blocks.PLAIN.items()}


@dataclass(frozen=True)
class Plan:
    """Where each tensor goes. names: {of the model: in the file}. kinds: {of the model: type}."""

    family: family.Family
    names: dict[str, str]
    kinds: dict[str, str]

    @property
    def summary(self) -> dict[str, int]:
        """{type: number of tensors}."""
        return {kind: list(self.kinds.values()).count(kind) for kind in sorted(set(self.kinds.values()))}


def plan_of(model: nn.Module, form: str, data: dict) -> Plan:
    """The Plan of a model. form: "gguf" or "gguf:f16". data: the manifest."""
    known, asked = family.family_of(model), form.partition(":")[2]
    names, state, kinds = family.names_of(model, known), model.state_dict(), {}
    head = data.get("record", {}).get("head")
    grids_of = with_head(model, data, {name: entry.get("grid") for name, entry in data.get("tensors", {}).items()} | (
        {head["name"]: head["grid"]} if head else {}))
    for name in names:
        grid = grids_of.get(name.removesuffix(".weight"))
        if state[name].ndim < 2:
            kinds[name] = "f32"
        elif grid in blocks.ROUNDED and asked in ("", grid):
            kinds[name] = grid
        else:
            kinds[name] = asked if asked in blocks.PLAIN else SHORT[state[name].dtype]
    return Plan(known, names, kinds)


def with_head(model: nn.Module, data: dict, known: dict[str, Any]) -> dict[str, Any]:
    """`known`, {linear: what is known of it}, where a rounded output head also has the name of the embedding that it
    is tied to, which is the file's. data: the manifest."""
    head = data.get("record", {}).get("head")
    if not head or not head["tied"] or head["name"] not in known:
        return known
    embedding = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
    return known | {embedding: known[head["name"]]}


def check_range(form: str, model: nn.Module) -> None:
    """Raise ValueError naming `--format` and a matrix with weights that float16 cannot hold, if it is asked for."""
    for name, t in model.state_dict().items() if form.endswith(":f16") else ():
        if t.ndim > 1 and not t.half().isfinite().all():
            raise ValueError(f"--format {form}: {name} has weights above 65504, float16's largest; use gguf:bf16")


def stored(name: str, t: torch.Tensor, plan: Plan, scales: dict[str, torch.Tensor]) -> np.ndarray:
    """The rows of a tensor of the model as they are in the file, in the model's order."""
    kind = plan.kinds[name]
    if kind in blocks.ROUNDED:
        s = scales[name.removesuffix(".weight")]
        return blocks.rounded(rounded.codes_of(t, grids.parse(kind), s), s, kind)
    return blocks.plain(t.float() + plan.family.shift if family.is_shifted(name, plan.family) else t, kind)


def write(path: Path, model: nn.Module, tokenizer: Any, plan: Plan, scales: dict[str, torch.Tensor]) -> list[str]:
    """Write the file, one tensor in memory at a time; returns warnings for the record."""
    import gguf

    config, state = model.config, model.state_dict()
    found, more = vocabulary.describe(tokenizer, config.vocab_size), family.extra(model, plan.family)
    warnings = [*family.check(model, plan.family), *found.warnings]
    out = gguf.GGUFWriter(path, plan.family.arch)
    out.add_name(Path(getattr(config, "_name_or_path", "") or plan.family.arch).name.removesuffix(".gguf"))
    out.add_file_type(file_type(gguf, plan))
    if set(plan.kinds.values()) & set(blocks.ROUNDED):
        out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    family.describe(out, config, plan.family)
    vocabulary.write(out, tokenizer, config, found)
    for name, there in plan.names.items():
        kind, R, C = plan.kinds[name], state[name].shape[0], state[name].shape[-1]
        width = {"bf16": 2 * C, **{k: C // blocks.WIDTH * n for k, n in blocks.BYTES.items()}}.get(kind, C)
        kept = np.dtype({"f32": np.float32, "f16": np.float16}.get(kind, np.uint8))
        shape = (R, width) if state[name].ndim > 1 else (width,)
        out.add_tensor_info(there, shape, kept, int(np.prod(shape)) * kept.itemsize,
                            gguf.GGMLQuantizationType[kind.upper()])
    for there, t in more.items():
        out.add_tensor_info(there, t.shape, np.dtype(np.float32), 4 * t.numel(), gguf.GGMLQuantizationType.F32)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    changed = total = 0
    for name in plan.names:
        rows = stored(name, state[name], plan, scales)
        out.write_tensor_data(family.interleave(rows, family.heads_of(name, config, plan.family)))
        if state[name].ndim > 1 and plan.kinds[name] in blocks.PLAIN:
            total += state[name].numel()
            changed += int((state[name].to(blocks.PLAIN[plan.kinds[name]]) != state[name]).sum())
    for t in more.values():
        out.write_tensor_data(t.numpy())
    out.close()
    return warnings + ([f"model.gguf: {changed} of {total} weights are rounded to its type, so it is not bit for bit "
                        "the model that was measured"] if changed else [])


def file_type(gguf: Any, plan: Plan) -> int:
    """llama.cpp's number of what most matrices are stored as."""
    counts = plan.summary
    kind = max((k for k in counts if counts[k]), key=lambda k: (k in blocks.ROUNDED, k != "f32", counts[k]))
    return gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]


def faults(path: Path, model: nn.Module, plan: Plan, entries: dict[str, dict],
           scales: dict[str, torch.Tensor]) -> list[Fault]:
    """What of a file is not the model: its tensors, their types, and each value. entries: the manifest's linears."""
    import gguf

    try:
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    except Exception as error:  # a damaged file can raise anything there
        return [Fault(path.name, f"cannot be read ({type(error).__name__})")]
    more, state = family.extra(model, plan.family), model.state_dict()
    wanted = {*plan.names.values(), *more}
    found = [Fault(name, f"is missing in {path.name}") for name in sorted(wanted - set(tensors))]
    found += [Fault(name, f"is in {path.name} but not in the model") for name in sorted(set(tensors) - wanted)]
    known = model.config, entries, scales
    for name, there in plan.names.items():
        if there in tensors and (why := fault(name, tensors[there], state[name], plan, known)):
            found.append(Fault(name, f"{why} in {path.name} ({there})"))
    return found + [Fault(name, f"its values in {path.name} are not the model's") for name, t in more.items()
                    if name in tensors and not np.array_equal(tensors[name].data, t.numpy())]


def fault(name: str, there: Any, t: torch.Tensor, plan: Plan, known: tuple[Any, dict, dict]) -> str | None:
    """What is wrong with one tensor of the file, in words; None if nothing is. there: gguf's. known: the model's
    config, the manifest's entries of linears, their scales."""
    config, entries, scales = known
    kind, linear = plan.kinds[name], name.removesuffix(".weight")
    if there.tensor_type.name.lower() != kind or tuple(reversed(there.shape.tolist())) != tuple(t.shape):
        return f"is {there.tensor_type.name} {there.shape.tolist()[::-1]} instead of {kind} {list(t.shape)}"
    rows = family.separate(np.array(there.data), family.heads_of(name, config, plan.family))
    if kind in blocks.ROUNDED:
        grid = grids.parse(kind)
        codes, s = blocks.unrounded(rows, kind)
        if linear not in scales or not torch.equal(s, scales[linear].half()):
            return "has other scales"
        value = grid.value(codes.float(), s.float())
        same = torch.equal(value.to(t.dtype), t)
    else:
        value = blocks.unplain(rows, kind)
        want = (t.float() + plan.family.shift if family.is_shifted(name, plan.family) else t).to(blocks.PLAIN[kind])
        same = torch.equal(value, want)
    if not same:
        return "its values are not the model's"
    if linear in entries and not pattern_of(entries[linear]).holds(value):
        return f"pattern {entries[linear]['pattern']} does not hold"
    if linear in entries and (zeros := int((value == 0).sum())) < entries[linear]["zeros"]:
        return f"{zeros} zeros, recorded {entries[linear]['zeros']}"
    return None
