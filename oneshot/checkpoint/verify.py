"""`oneshot verify DIR`: prove that a checkpoint is what its manifest says.

Loads the folder as anyone would and checks, on the stored dtype and linear by linear: the pattern holds, the number of
zeros is the recorded one, the bytes are the recorded ones; that no prunable linear is missing from the manifest; and
lists what was never pruned. Exit code 0: all proved; 1: something is off; 2: nothing to check.

With `--twin OTHER` also: both hold the same model, every tensor of the one equal to the other's, packed weights as the
dense matrices they stand for.
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
    """(rows, faults, skipped): one dict per linear, one line per fault, what was left alone and why."""
    if not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder; give one that oneshot.run --save wrote")
    data = read_manifest(path)
    model, _ = models.load(str(path), flag="")
    entries, rows, faults = dict(data["tensors"]), [], []
    found = len(packed.linears(model))
    if found != data.get("packed", {}).get("linears", 0):
        faults.append(f"{found} packed linears, recorded {data.get('packed', {}).get('linears', 0)}")
    packed.to_dense(model)  # the recorded bytes are those of the dense weights: equal to them, packed lost nothing
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
    """(tensors compared, one line per difference) between two checkpoints of the same model, packed or dense.

    Exact: same names, shapes, dtypes and values; what a packed linear stands for is compared, not its packed bytes.
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
    """{name: tensor} of a checkpoint; linears as (R, C), whether they are stored packed, dense or transposed."""
    model, _ = models.load(str(path), flag=flag)
    packed.to_dense(model)
    transposed = {f"{weight.name}.weight" for weight in models.all_weights(model) if weight.transposed}
    return {name: t.T if name in transposed else t for name, t in model.state_dict().items()}


def check(weight: Weight, entry: dict) -> list[str]:
    """What is wrong with one linear, as texts."""
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
    """The command; exit code: see above."""
    return exit_code(lambda: run(argv))


def run(argv: list[str] | None) -> int:
    """Verify, print what was found; exit code 0 or 1."""
    parser = Parser(prog="oneshot verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that oneshot prune --save wrote")
    parser.add_argument("--twin", metavar="OTHER", help="another folder that must hold the same model, tensor by "
                                                        "tensor: the dense one of a packed checkpoint")
    parser.add_argument("--quiet", action="store_true", help="print faults and the verdict only")
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
    """Print a line a linear, then what was left alone."""
    width = max((len(r["name"]) for r in rows), default=0)
    for r in rows:
        R, C = r["shape"]
        print(f"{'ok  ' if r['proved'] else 'BAD '} {r['name']:<{width}}  {r['pattern']:>6}  "
              f"{R:>6} x {C:<6} {r['zeros'] / (R * C):8.4%} zero  {r['dtype']}")
    for name, reason in left:
        print(f"not pruned  {name}: {reason}")


def verdict(faults: list[str], good: str) -> str:
    """How many faults, or what is `good` without any."""
    return good if not faults else f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
