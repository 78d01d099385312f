"""`oneshot verify DIR`: check a saved checkpoint against its manifest.

Hashes every file that the run wrote and names each tensor that has changed: weights, norms, embeddings, biases, packed
values. Loads the folder like any user of it would. Checks for every linear layer, in its stored dtype, that the pattern
holds and that the number of zeros and the hash of its bytes are the recorded ones; and that no prunable linear layer is
missing from the manifest. Checks that the manifest agrees with itself: patterns, groups, zeros, format, settings. Lists
what was never pruned, and what is not checked. Exit code: 0, everything is as recorded; 1, something is not; 2, there
is nothing to check.

Of a smaller model it checks that blocks, units and tensors are those that the manifest says are left. With `--original
MODEL`, the model it was made from, it checks each tensor against the rows and columns of that one: shapes of all, and
the bits of those that are recorded as original.

With `--offload disk` one block at a time is in memory.

With `--twin OTHER` it also checks that both folders hold the same model, tensor by tensor; packed weights are compared
as the dense matrices they represent.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import models
from ..models import Weight
from ..models.offload import OFFLOAD
from ..runtime.command import Parser, exit_code
from ..structured import origin
from ..structured.options import shrinks
from . import claims, compressed, contents, gguf, output_head, packed, rounded
from .contents import MANIFEST, Fault
from .manifest import digest, old, pattern_of, read_sealed

UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, IndexError)  # what damaged values raise


class Verified(NamedTuple):
    """What `verify` found.

    rows: one dict per linear. faults: one line per fault. skipped: [(tensor that was not pruned, why)]. files, tensors:
    how many were hashed. unchecked: what the manifest records nothing of.
    """

    rows: list[dict]
    faults: list[str]
    skipped: list[tuple[str, str]]
    files: int = 0
    tensors: int = 0
    unchecked: tuple[str, ...] = ()


def verify(path: str | Path, trust_remote_code: bool = False, original: str | None = None,
           offload: str = "none") -> Verified:
    """Check a folder against its manifest.

    trust_remote_code: run code that the folder brings, to load its model. original: the model that a smaller one was
    made from. offload: "disk" reads one block at a time.

    Raises ValueError when the folder is not a finished checkpoint of oneshot, or cannot be loaded.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give one that oneshot prune --save wrote")
    data, whole = read_sealed(path)
    if offload == "disk" and (data.get("format") != "dense" or "origin" in data):
        kind = "holds a smaller model" if "origin" in data else f"is of format {data.get('format')}"
        raise ValueError(f"--offload disk: {path} {kind}, which is checked in memory as a whole; leave it out")
    faults = [] if whole else [Fault(MANIFEST, "was changed after it was written")]
    changed = contents.differences(path, data)
    try:
        model, scales = loaded(path, data, trust_remote_code=trust_remote_code, offload=offload)
    except ValueError as error:
        more = f"; not as recorded: {changed[0]}" if changed else ""
        more += f" and {len(changed) - 1} more" if changed[1:] else ""
        raise ValueError(f"{error}{more if changed else ''}") from None
    faults += claims.check(data) + claims.check_packed(data, model)
    faults += compressed.faults(path, data) if data.get("format") == compressed.METHOD else []
    packed.to_dense(model)  # the recorded hashes are of the dense weights, so they also show that packing lost nothing
    rows, found = check_linears(model, data, scales)
    of_head, off = output_head.check(model, data, scales)
    rows, found = rows + of_head, found + off
    faults += gguf.faults(path, data, model, scales) if data.get("format") in gguf.FORMS else []
    faults += check_origin(model, data, original, trust_remote_code)
    bad = {fault.name for fault in found}
    faults += found + [fault for fault in changed if not fault.tensor or fault.name.rpartition(".")[0] not in bad]
    unchecked = [f"{name} (not the run's)" for name in contents.files_of(path) if name not in data.get("files", {})]
    if old(data):
        unchecked = ["norms, embeddings, biases, config and tokenizer (an older oneshot recorded no hashes of files)"]
    return Verified(rows, list(map(str, faults)), output_head.not_pruned(model, data), len(data.get("files", {})),
                    len(data.get("stored_tensors", {})), tuple(unchecked))


def loaded(path: Path, data: dict, **how: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """(the folder's model, {linear: its scales} of those that were rounded). data: the manifest. how: to load it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(packed.unchecked())
        folder, scales = path, rounded.read(path)
        if data.get("format") == compressed.METHOD:
            folder, scales = stack.enter_context(compressed.unpacked(path, data))
        model, _ = models.load(str(folder), flag="", **how)
    return model, scales | packed.scales_of(model)


def check_linears(model: torch.nn.Module, data: dict, scales: dict[str, torch.Tensor]
                  ) -> tuple[list[dict], list[Fault]]:
    """(rows, faults): every linear of a loaded model compared with a manifest. scales: of those that were rounded."""
    entries, rows, faults, zeros, total = dict(data["tensors"]), [], [], 0, 0
    for weight in models.all_weights(model):
        name = weight.name
        entry, zero = entries.pop(name, None), int((weight.get() == 0).sum())
        zeros, total = zeros + zero, total + weight.size
        if entry is None:
            faults.append(Fault(name, "can be pruned but is not in the manifest"))
            continue
        try:
            wrong = check(weight, entry, scales)
        except (AttributeError, KeyError, TypeError, ValueError):
            faults.append(Fault(name, "its entry in the manifest is damaged"))
            continue
        faults += [Fault(name, text) for text in wrong]
        rows.append({"name": name, "pattern": " ".join(filter(None, (entry["pattern"], entry.get("grid")))),
                     "shape": weight.shape, "dtype": entry["dtype"],
                     "zeros": zero, "proved": not wrong})
    faults += [Fault(name, "in the manifest but not in the model") for name in entries]
    if not faults and total and data["record"].get("sparsity") != zeros / total:
        faults.append(Fault(MANIFEST, f"sparsity {data['record'].get('sparsity')} recorded, it is {zeros / total}"))
    return rows, faults


def check_origin(model: torch.nn.Module, data: dict, original: str | None, trust_remote_code: bool) -> list[Fault]:
    """Faults of what a smaller model's manifest says it was made from. original: the model it was made from, or None.

    Raises ValueError naming `--original` for a model that this one was not made from.
    """
    try:
        said, asked = data.get("origin"), shrinks(data["record"]["settings"])
    except UNREADABLE:
        return [Fault(MANIFEST, "its settings cannot be read")]
    if said is None or not asked:
        if original:
            raise ValueError(f"--original {original}: the manifest records no larger model that this one was made from")
        return [Fault(MANIFEST, "its settings and its record disagree on whether the model was made smaller")
                ] if bool(said) != asked else []
    dense = None
    if original:
        dense, _ = models.load(original, flag="--original", trust_remote_code=trust_remote_code)
    try:
        found = origin.shape_faults(model, said)
        same = not dense or models.fingerprint(dense) == data["record"]["model"]["fingerprint"]
        if dense and same and not found:
            found = origin.faults(dense, model, said)
    except UNREADABLE as error:
        return [Fault(MANIFEST, f"its origin cannot be read ({type(error).__name__})")]
    if not same and not found:
        raise ValueError(f"--original {original}: is not the model that this one was made from")
    return [Fault(name, text) for name, text in found]


def compare(path: str | Path, twin: str | Path, trust_remote_code: bool = False) -> tuple[int, list[str]]:
    """(number of tensors compared, one line per difference) for two checkpoints of the same model, packed or dense.

    Names, shapes, dtypes and values must be equal. Packed linears are compared as the dense matrices they represent.
    """
    ours, theirs = (dense_tensors(folder, flag, trust_remote_code) for folder, flag in ((path, ""), (twin, "--twin")))
    faults = [f"{name}: only in {path}" for name in ours if name not in theirs]
    faults += [f"{name}: only in {twin}" for name in theirs if name not in ours]
    shared = [name for name in ours if name in theirs]
    for name in shared:
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            faults.append(f"{name}: {tuple(a.shape)} {a.dtype}, in the twin {tuple(b.shape)} {b.dtype}")
        elif not torch.equal(a, b):
            faults.append(f"{name}: {int((a != b).sum())} of {a.numel()} values differ from the twin's")
    return len(shared), faults


def dense_tensors(path: str | Path, flag: str = "", trust_remote_code: bool = False) -> dict[str, torch.Tensor]:
    """{name: tensor} of a checkpoint, with linears as (R, C) whether they are stored packed, dense or transposed.

    flag: the start of error messages.
    """
    with packed.unchecked():  # what has changed shows in the comparison
        model, _ = models.load(str(path), flag=flag, trust_remote_code=trust_remote_code)
    packed.to_dense(model)
    transposed = {f"{weight.name}.weight" for weight in models.all_weights(model) if weight.transposed}
    return {name: t.T if name in transposed else t for name, t in model.state_dict().items()}


def check(weight: Weight, entry: dict, scales: dict[str, torch.Tensor]) -> list[str]:
    """What is wrong with one linear compared with its manifest entry, in words; [] if nothing is. scales: of all."""
    W, wrong = weight.get(), []
    dtype = str(weight.stored).removeprefix("torch.")
    if list(weight.shape) != entry["shape"]:
        return [f"shape {tuple(weight.shape)}, recorded {tuple(entry['shape'])}"]
    if dtype != entry["dtype"]:
        wrong.append(f"stored as {dtype}, recorded {entry['dtype']}")
    if not pattern_of(entry).holds(W):
        wrong.append(f"pattern {entry['pattern']} does not hold")
    zeros = int((W == 0).sum())
    if zeros != entry["zeros"]:
        wrong.append(f"{zeros} zeros, recorded {entry['zeros']}")
    if off := rounded.fault(weight, entry, scales):
        wrong.append(off)
    if digest(weight) != entry["sha256"]:
        wrong.append("its bytes are not the recorded ones")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code, see above."""
    return exit_code(lambda: run(argv))


def run(argv: list[str] | None) -> int:
    """Verify, print the findings, and return exit code 0 or 1. Raises ValueError if there is nothing to check."""
    parser = Parser(prog="oneshot verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that oneshot prune --save wrote")
    parser.add_argument("--twin", metavar="OTHER", help="another folder that must hold the same model, tensor by "
                                                        "tensor, such as the dense version of a packed checkpoint")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the folder brings, to load it")
    parser.add_argument("--offload", choices=OFFLOAD, default="none",
                        help="disk: read one block at a time, for a model larger than memory")
    parser.add_argument("--quiet", action="store_true", help="print only faults and the verdict")
    parser.add_argument("--original", metavar="MODEL", help="the model that a smaller one was made from: compares each "
                                                            "tensor with the rows and columns that are left of it")
    args = parser.parse_args(argv)
    models.quiet()
    if args.offload == "disk" and args.twin:
        raise ValueError("--twin: compares whole models in memory, so it does not go with --offload disk")
    found = verify(args.folder, args.trust_remote_code, args.original, args.offload)
    equal, different = compare(args.folder, args.twin, args.trust_remote_code) if args.twin else (0, [])
    if not args.quiet:
        show(found)
    for fault in found.faults + different:
        print(f"FAULT {fault}")
    print(f"{len(found.rows)} linears checked, {len(found.skipped)} tensors not pruned: "
          f"{verdict(found.faults, 'all proved')} ({scope(found)})")
    if args.twin:
        print(f"{equal} tensors compared with {args.twin}: {verdict(different, 'all equal')}")
    return 1 if found.faults or different else 0


def scope(found: Verified) -> str:
    """How much was hashed and what was not checked, in words."""
    first, more = ", ".join(found.unchecked[:3]), len(found.unchecked) - 3
    hashed = f"{found.files} files and the {found.tensors} tensors in them hashed" if found.files else ""
    left = f"not checked: {first}" + (f" and {more} more" if more > 0 else "") if found.unchecked else ""
    return "; ".join(filter(None, [hashed, left]))


def show(found: Verified) -> None:
    """Print one line per linear, then what was not pruned, then what was not checked."""
    width = max((len(r["name"]) for r in found.rows), default=0)
    for r in found.rows:
        R, C = r["shape"]
        print(f"{'ok  ' if r['proved'] else 'BAD '} {r['name']:<{width}}  {r['pattern']:>6}  "
              f"{R:>6} x {C:<6} {r['zeros'] / (R * C):8.4%} zero  {r['dtype']}")
    for name, reason in found.skipped:
        print(f"not pruned  {name}: {reason}")
    for text in found.unchecked:
        print(f"not checked {text}")


def verdict(faults: list[str], good: str) -> str:
    """The number of faults in words, or `good` if there are none."""
    return good if not faults else f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
