"""How much faster smaller models are on this machine, weights at random: results/shrink/speed.json and speed.md.

    python scripts/bench/shrink_speed.py                       # the shapes below; continues where it was stopped
    python scripts/bench/shrink_speed.py --shapes 1b --rounds 3

Of each shape a dense model and cuts that leave 75 and 50 % of the blocks' parameters (blocks alone, neurons alone,
both) take turns (oneshot/measure/latency.py). The time of a model does not depend on what its weights are.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from oneshot import models
from oneshot.measure import latency
from oneshot.report import table
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text
from oneshot.structured import Cut, budget, cut, slices

COMMON = {"max_position_embeddings": 2048, "tie_word_embeddings": True}
SHAPES = {  # Llama configs
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
}
SHARES = (0.75, 0.5)
KINDS = {"prefill": "prefill", "decode1": "decode 1", "decode8": "decode 8"}  # as the table names them


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/shrink_speed.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default=",".join(SHAPES), help="of the list in this file, separated by commas")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=Path("results/shrink"))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu")

    def work() -> None:
        args = p.parse_args(argv)
        torch.set_num_threads(args.threads)
        models.quiet()
        file = args.out / "speed.json"
        for name in args.shapes.split(","):
            if name not in SHAPES:
                raise ValueError(f"--shapes {name}: there are {', '.join(SHAPES)}")
            found = json.loads(file.read_text())["speeds"] if file.is_file() else []
            if not any(row["shape"] == name for row in found):
                write_json({"speeds": [*found, *measured(name, SHAPES[name], args)]}, file)
        found = json.loads(file.read_text())["speeds"]
        write_text(page(found), args.out / "speed.md")
        print(page(found))
    return exit_code(work, interrupted=lambda: "the same command continues")


def measured(name: str, shape: dict, args: argparse.Namespace) -> list[dict]:
    """The rows of one shape."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON | shape)).eval()
    model.requires_grad_(False)
    rows = []
    for share in SHARES:
        for what, found in cuts(model, share).items():
            small = slices.first_units(model, found)
            times = latency.compare({"model": small, "dense": model}, args.device, args.rounds)
            rows.append({"shape": name, "asked": share, "what": what, "share": cut.parameters(model, found)
                         / cut.whole(model), "cut": found.plain(), "model": times["model"], "dense": times["dense"],
                         "environment": environment.environment(args.device)})
            print(f"{name} {share:g} {what}: " + ", ".join(
                f"{kind} {times['model'][kind]['speedup']:.2f}x" for kind in latency.KINDS), flush=True)
    return rows


def cuts(model: nn.Module, share: float) -> dict[str, Cut]:
    """{what goes: a cut that leaves the share}: blocks from the middle, neurons, or half of each."""
    n = len(models.blocks(model)[1])
    own = budget.Budget(share * cut.whole(model), budget.Sizes.of(model).left)
    most = next(d for d in range(n) if own.fits(Cut(tuple(range(d)))))

    def middle(count: int) -> tuple[int, ...]:
        return tuple(range(n // 2 - count // 2, n // 2 - count // 2 + count))
    return {"blocks": Cut(middle(most)), "neurons": budget.neurons_for(model, own, ()),
            "both": budget.neurons_for(model, own, middle(most // 2))}


def page(rows: list[dict]) -> str:
    """The table."""
    e = rows[0]["environment"]
    head = ["shape", "parameters", "asked", "what goes", "blocks left", "share", "GFLOP a token",
            *(f"{kind}, {part}" for kind in KINDS.values() for part in ("times", "ms"))]
    body = [[r["shape"], f"{r['dense']['parameters'] / 1e6:.0f}M -> {r['model']['parameters'] / 1e6:.0f}M",
             f"{r['asked']:g}", r["what"], f"{100 * r['share']:.1f} %",
             f"{r['model']['parameters'] / r['dense']['parameters']:.2f}",
             " -> ".join(f"{2 * r[name]['multiply_adds'] / 1e9:.2f}" for name in ("dense", "model")),
             *(cell for kind in KINDS for cell in (f"{r['model'][kind]['speedup']:.2f}x", " -> ".join(
                 milliseconds(r[name][kind]) for name in ("dense", "model"))))] for r in rows]
    return "\n".join([
        "# Speed of smaller models", "",
        "Times of the dense model over times of the smaller one, median of the ratios of the rounds in which both take "
        "turns; in ms the medians and, in brackets, the quartiles of each. Weights at random, float32, no compiler. "
        "share: of the whole model's parameters; GFLOP: of the linears and the output head. Decoding 135M parameters "
        "is bound by Python and the number of operations, so blocks pay more than neurons; with 1B bytes decide.", "",
        f"`scripts/bench/shrink_speed.py` on {e['device']}, {e['threads']} thread, torch {e['torch']}, transformers "
        f"{e['transformers']}, commit {e['commit']}.", "",
        table.render(head, body, "markdown", text={"shape", "what goes"})])


def milliseconds(times: dict) -> str:
    """A median with its quartiles."""
    return f"{times['median']:.1f} ({times['low']:.1f} to {times['high']:.1f})"


if __name__ == "__main__":
    sys.exit(main())
