"""`python -m oneshot.verify DIR`: prove that a checkpoint is what its manifest says.

Loads the folder as anyone would and checks, on the stored dtype and linear by linear: the pattern holds, the number of
zeros is the recorded one, the bytes are the recorded ones; that no prunable linear is missing from the manifest; and
lists what was never pruned. Exit code 0: all proved; 1: something is off; 2: nothing to check.
"""

import argparse
import sys

from . import export, models, packed


def verify(path):
    """(rows, faults, skipped): one dict per linear, one line per fault, what was left alone and why."""
    data = export.read_manifest(path)
    model, _ = models.load(str(path))
    entries, rows, faults = dict(data["tensors"]), [], []
    found = len(packed.linears(model))
    if found != data.get("packed", {}).get("linears", 0):
        faults.append(f"{found} packed linears, recorded {data.get('packed', {}).get('linears', 0)}")
    packed.to_dense(model)  # the recorded bytes are those of the dense weights: equal to them, packed lost nothing
    for name, view in export.all_views(model):
        entry = entries.pop(name, None)
        if entry is None:
            faults.append(f"{name}: can be pruned but is not in the manifest")
            continue
        try:
            wrong = check(view, entry)
        except (KeyError, TypeError, ValueError):
            faults.append(f"{name}: its entry in the manifest is damaged")
            continue
        faults += [f"{name}: {text}" for text in wrong]
        rows.append({"name": name, "pattern": entry["pattern"], "shape": view.shape, "dtype": entry["dtype"],
                     "zeros": int((view.get() == 0).sum()), "proved": not wrong})
    faults += [f"{name}: in the manifest but not in the model" for name in entries]
    return rows, faults, skipped(model)


def skipped(model):
    """[(name, reason)] of every matrix that is not pruned, read off the model and not off the manifest."""
    name, block_list = models.blocks(model)
    return models.outside(model, block_list) + [
        (f"{name}.{b}.{n}", why) for b, block in enumerate(block_list) for n, why in models.linears(block)[1]]


def check(view, entry):
    """What is wrong with one linear, as texts."""
    W, wrong = view.get(), []
    dtype = str(view.stored).removeprefix("torch.")
    if list(view.shape) != entry["shape"]:
        return [f"shape {tuple(view.shape)}, recorded {tuple(entry['shape'])}"]
    if dtype != entry["dtype"]:
        wrong.append(f"stored as {dtype}, recorded {entry['dtype']}")
    if not export.pattern_of(entry).holds(W):
        wrong.append(f"pattern {entry['pattern']} does not hold")
    zeros = int((W == 0).sum())
    if zeros != entry["zeros"]:
        wrong.append(f"{zeros} zeros, recorded {entry['zeros']}")
    if export.digest(view) != entry["sha256"]:
        wrong.append("its bytes are not the recorded ones")
    return wrong


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m oneshot.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder that oneshot.run --save wrote")
    parser.add_argument("--quiet", action="store_true", help="print faults and the verdict only")
    try:
        args = parser.parse_args(argv)
        models.quiet()
        rows, faults, left = verify(args.folder)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not args.quiet:
        width = max((len(r["name"]) for r in rows), default=0)
        for r in rows:
            R, C = r["shape"]
            print(f"{'ok  ' if r['proved'] else 'BAD '} {r['name']:<{width}}  {r['pattern']:>6}  "
                  f"{R:>6} x {C:<6} {r['zeros'] / (R * C):8.4%} zero  {r['dtype']}")
        for name, reason in left:
            print(f"not pruned  {name}: {reason}")
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(rows)} linears checked, {len(left)} tensors not pruned: "
          + ("all proved" if not faults else f"{len(faults)} faults"))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
