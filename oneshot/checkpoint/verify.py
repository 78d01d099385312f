"""`oneshot verify DIR`: check a saved checkpoint against its manifest.

Loads the folder like any user of it would. Checks for every linear layer, in its stored dtype, that the pattern holds
and that the number of zeros and the hash of its bytes are the recorded ones; and that no prunable linear layer is
missing from the manifest. Lists what was never pruned. Exit code: 0, everything is as recorded; 1, something is not;
2, there is nothing to check.

With `--twin OTHER` it also checks that both folders hold the same model, tensor by tensor; packed weights are compared
as the dense matrices they represent.
"""

import argparse
from pathlib import Path

import torch

from .. import models
from ..models import Weight
from ..runtime.command import Parser, exit_code
from . import packed
from .manifest import digest, pattern_of, read_manifest


def verify(path: str | Path) -> tuple[list[dict], list[str], list[tuple[str, str]]]:
    """(rows, faults, skipped): one dict per linear, one line per fault, [(tensor that was not pruned, why)].

    Raises ValueError when the folder is not a finished checkpoint of oneshot, or cannot be loaded.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder; give one that oneshot prune --save wrote")
    data = read_manifest(path)
    model, _ = models.load(str(path), flag="")
    entries, rows, faults = dict(data["tensors"]), [], []
    found = len(packed.linears(model))
    if found != data.get("packed", {}).get("linears", 0):
        faults.append(f"{found} packed linears, recorded {data.get('packed', {}).get('linears', 0)}")
    packed.to_dense(model)  # the recorded hashes are of the dense weights, so they also show that packing lost nothing
    for weight in models.all_weights(model):
        name = weight.name
        entry = entries.pop(name, None)
        if entry is None:
            faults.append(f"{name}: can be pruned but is not in the manifest")
            continue
        try:
            wrong = check(weight, entry)
        except (KeyError, TypeError, ValueError):
            faults.append(f"{name}: its entry in the manifest is damaged")
            continue
        faults += [f"{name}: {text}" for text in wrong]
        rows.append({"name": name, "pattern": entry["pattern"], "shape": weight.shape, "dtype": entry["dtype"],
                     "zeros": int((weight.get() == 0).sum()), "proved": not wrong})
    faults += [f"{name}: in the manifest but not in the model" for name in entries]
    return rows, faults, models.skipped(model)


def compare(path: str | Path, twin: str | Path) -> tuple[int, list[str]]:
    """(number of tensors compared, one line per difference) for two checkpoints of the same model, packed or dense.

    Names, shapes, dtypes and values must be equal. Packed linears are compared as the dense matrices they represent.
    """
    ours, theirs = dense_tensors(path), dense_tensors(twin, "--twin")
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


def dense_tensors(path: str | Path, flag: str = "") -> dict[str, torch.Tensor]:
    """{name: tensor} of a checkpoint, with linears as (R, C) whether they are stored packed, dense or transposed.

    flag: the start of error messages.
    """
    model, _ = models.load(str(path), flag=flag)
    packed.to_dense(model)
    transposed = {f"{weight.name}.weight" for weight in models.all_weights(model) if weight.transposed}
    return {name: t.T if name in transposed else t for name, t in model.state_dict().items()}


def check(weight: Weight, entry: dict) -> list[str]:
    """What is wrong with one linear compared with its manifest entry, in words; [] if nothing is."""
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
    parser.add_argument("--quiet", action="store_true", help="print only faults and the verdict")
    args = parser.parse_args(argv)
    models.quiet()
    rows, faults, left = verify(args.folder)
    equal, different = compare(args.folder, args.twin) if args.twin else (0, [])
    if not args.quiet:
        show(rows, left)
    for fault in faults + different:
        print(f"FAULT {fault}")
    print(f"{len(rows)} linears checked, {len(left)} tensors not pruned: {verdict(faults, 'all proved')}")
    if args.twin:
        print(f"{equal} tensors compared with {args.twin}: {verdict(different, 'all equal')}")
    return 1 if faults or different else 0


def show(rows: list[dict], left: list[tuple[str, str]]) -> None:
    """Print one line per linear, then what was not pruned."""
    width = max((len(r["name"]) for r in rows), default=0)
    for r in rows:
        R, C = r["shape"]
        print(f"{'ok  ' if r['proved'] else 'BAD '} {r['name']:<{width}}  {r['pattern']:>6}  "
              f"{R:>6} x {C:<6} {r['zeros'] / (R * C):8.4%} zero  {r['dtype']}")
    for name, reason in left:
        print(f"not pruned  {name}: {reason}")


def verdict(faults: list[str], good: str) -> str:
    """The number of faults in words, or `good` if there are none."""
    return good if not faults else f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
