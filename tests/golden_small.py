"""Writes `data/golden/stories260k_small.json`: what the public numbers of `stories260k.json` become on fewer windows.

    PYTHONPATH=tests python tests/golden_small.py

The suite proves most of its golden cases on these, in a tenth of the time. They come from `reference.py`, which is
naive and imports nothing of oneshot, with the model run as transformers runs it. Before it writes anything, the same
code must give the public numbers on all windows.
"""

import json
from pathlib import Path

import reference
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

DATA = Path(__file__).resolve().parent / "data"
CASES = [("magnitude-exact", "0.5"), ("magnitude-exact", "2:4"),
         ("wanda", "0.5"), ("wanda", "0.6"), ("wanda", "2:4"),
         ("sparsegpt-exact", "0.5"), ("sparsegpt-exact", "0.6"), ("sparsegpt-exact", "0.7"),
         ("sparsegpt", "2:4")]
WINDOWS = 16
BATCH = 8


def tolerance(pattern):
    """Relative: at 60 and 70 % the order of summation already shows."""
    return 5e-3 if pattern in ("0.6", "0.7") else 1e-3


@torch.no_grad()
def perplexity(model, ids):
    losses = [cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="none")
              for part in ids.split(BATCH)]
    return torch.cat(losses).double().mean().exp().item()


@torch.no_grad()
def pruned(method, pattern, ids):
    """The model, pruned block after block; the inputs of a block come from the pruned blocks before it."""
    model = AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32).eval()
    prune = getattr(reference, method.removesuffix("-exact"))
    pattern = tuple(map(int, pattern.split(":"))) if ":" in pattern else float(pattern)
    for block in model.model.layers:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        grams = dict.fromkeys(linears, 0.0)

        def gather(linear, args, grams=grams):
            x = args[0].flatten(0, 1).double()
            grams[linear] = grams[linear] + x.T @ x / ids.numel()

        hooks = [m.register_forward_pre_hook(gather) for m in linears]
        if prune is not reference.magnitude:
            for part in ids.split(BATCH):
                model.model(part)
        for hook in hooks:
            hook.remove()
        for m in linears:
            inputs = {} if prune is reference.magnitude else {"G": grams[m]}
            m.weight.copy_(prune(m.weight, pattern=pattern, **inputs)[0])
    return model


def main():
    public = json.loads((DATA / "golden" / "stories260k.json").read_text())
    wanted = {(c["method"], c["pattern"]): c["ppl"] for c in public["cases"]}
    tokens = {k: v.long() for k, v in load_file(DATA / "golden" / "stories260k_tokens.safetensors").items()}
    cases = []
    for method, pattern in CASES:
        ppl = perplexity(pruned(method, pattern, tokens["calib"]), tokens["eval"])
        print(f"{method} {pattern}: {ppl:.4f} on all windows, {wanted[method, pattern]} is public")
        if abs(ppl / wanted[method, pattern] - 1) > tolerance(pattern):
            raise SystemExit("the references do not give the public numbers: nothing written")
        small = perplexity(pruned(method, pattern, tokens["calib"][:WINDOWS]), tokens["eval"][:WINDOWS])
        cases.append({"method": method, "pattern": pattern, "ppl": round(small, 4)})
    note = ("From tests/golden_small.py: tests/reference.py on the first windows of each; the same code gives the "
            "public numbers on all of them.")
    record = {"calibration": WINDOWS, "evaluation": WINDOWS, "note": note, "cases": cases}
    (DATA / "golden" / "stories260k_small.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
