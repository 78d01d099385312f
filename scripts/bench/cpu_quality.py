"""Perplexity of what cpu_decode.py times: the forms that CPU kernels compute with, and llama.cpp's, on the same tokens.

    python scripts/bench/cpu_quality.py --shared ../shared --gguf q8/model.gguf,q4/model.gguf --pruned HEALED
    python scripts/bench/cpu_quality.py --page             # only the page and the picture, from the rows
    python scripts/bench/cpu_quality.py --toy --out DIR    # a toy model and few tokens, for the tests

    transformers    the dense model as it is stored, bfloat16
    dense, 2:4, cut the layers of oneshot_kernels in bf16, int8 and int4, of the dense model, of --pruned, which is 2:4,
                    and of --cut, a smaller dense model; rounded: inputs and output head in int8 too
    llama.cpp       each file of --gguf, its keys and values in float16

Every token is predicted from those before it in its window. llama.cpp's server says nothing of a token that is no whole
character: such tokens count for no way. Speeds are those of cpu_decode.json, of the same model and threads.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from common import written
from cpu_decode import KINDS, WAYS, read
from cpu_forms import SHAPES, bytes_of, formed, random_model
from llama_server import Server, named, ways_of
from oneshot_kernels.cpu import integers
from tqdm import tqdm

from oneshot import measure, models
from oneshot.data import windows
from oneshot.models import gguf
from oneshot.report.figures import drawing, size
from oneshot.report.table import render
from oneshot.runtime import environment
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = "data/wikitext2_test.txt"


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    def run() -> None:
        with named("--gguf"):
            work(arguments(argv))
    return exit_code(run)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/bench/cpu_quality.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help=f"folder of {TEXT}")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--pruned", help="folder of the same model with zeros in 2:4")
    p.add_argument("--cut", help="folder of a smaller dense model made from it")
    p.add_argument("--gguf", default="", help="files that llama.cpp runs, by commas; of --cut's model: cut=FILE")
    p.add_argument("--windows", type=int, default=32)
    p.add_argument("--seqlen", type=int, default=256)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path("results/bench"))
    p.add_argument("--toy", action="store_true", help="random weights, two short windows")
    p.add_argument("--page", action="store_true", help="measure nothing: the page of the JSON in --out")
    return p.parse_args(argv)


def work(args: argparse.Namespace) -> None:
    """Measure everything, write the rows and the page."""
    rows = read(args.out / "cpu_quality.json") if args.page else measured(args)
    if not rows:
        raise ValueError(f"--page: {args.out} holds no cpu_quality.json yet; measure first")
    write_text(page(rows), args.out / "cpu_quality.md")
    if timed(rows):
        drawing.save(picture(timed(rows)), args.out / "cpu_quality.svg")
    print(f"written: {args.out / 'cpu_quality.md'}")


def measured(args: argparse.Namespace) -> list[dict]:
    """The rows, which are written into --out."""
    models.quiet()
    torch.set_num_threads(args.threads)
    dense, ids = loaded(args)
    sources = {"dense": dense, **{kind: models.load(folder, dtype="bfloat16")[0]
                                  for kind, folder in (("2:4", args.pruned), ("cut", args.cut)) if folder}}
    losses, nbytes = {}, {}
    ways = {"transformers": None, **{way: form for way, form in WAYS.items() if form[0]}}
    for way, form in tqdm(ways.items(), desc="forms", unit="way"):
        source = sources.get(form[1] if form else "dense")
        if source is None or form == ("bf16", "dense", False):  # not given; the very layers of transformers
            continue
        model = formed(source, *form) if form else dense
        with mock.patch.object(integers, "MANY", sys.maxsize):  # inputs are rounded as in decoding, however many
            losses[way] = measure.losses.token_losses(model, ids, batch_size=4)
        nbytes[way] = bytes_of(model)
    for (_, way), file in ways_of(args.gguf, (args.model, "cut")).items():
        losses[way], nbytes[way] = llama_losses(Server(file, args.threads, "F16"), ids, way), file.stat().st_size
    known = ~torch.stack(list(losses.values())).isnan().any(0)
    where, name = environment.environment("cpu"), "toy" if args.toy else args.model
    rates = speeds(args.out, name, args.threads)
    common = {"model": name, "pruned": args.pruned and Path(args.pruned).name, "cut": args.cut and Path(args.cut).name,
              "tokens": int(known.sum()), "window": ids.shape[1], "environment": where}
    rows = [{"way": way, "ppl": math.exp(own[known].double().mean()), "bytes": nbytes[way],
             "tokens_per_second": rates.get(way), **common} for way, own in losses.items()]
    write_json({"rows": rows}, args.out / "cpu_quality.json")
    return rows


def loaded(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """(the dense model, int64 (windows, seqlen) of the text)."""
    if args.toy:
        return random_model("toy"), torch.randint(SHAPES["toy"]["vocab_size"], (2, 16))
    model, tokenizer = models.load(args.model, dtype="bfloat16")
    tokens = windows.evaluation(tokenizer, str(args.shared / TEXT), seqlen=args.seqlen, max_windows=args.windows)
    return model, tokens.ids


def llama_losses(server: Server, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Loss of every predicted token in nats, float32 (n, T-1); NaN where the server keeps it back.

    It says the probability of the token it chose, so it is made to choose the one that follows.
    """
    losses = torch.full((len(ids), ids.shape[1] - 1), float("nan"))
    for window, row in enumerate(tqdm(ids.tolist(), desc=name, unit="window")):
        for i, follows in enumerate(row[1:]):
            answer = server.ask("/completion", prompt=row[:i + 1], n_predict=1, temperature=0, n_probs=1,
                                ignore_eos=True, cache_prompt=True, logit_bias=[[follows, 1e4]])
            found = answer.get("completion_probabilities")
            if found and found[0]["id"] == follows:
                losses[window, i] = -found[0]["logprob"]
    return losses


def speeds(folder: Path, model: str, threads: int) -> dict[str, float]:
    """{way: tokens per second} of cpu_decode.json, of this model with so many threads."""
    return {row["way"]: row["tokens_per_second"] for row in read(folder / "cpu_decode.json")
            if (row["model"], row["threads"]) == (model, threads)}


def page(rows: list[dict]) -> str:
    """The table."""
    first = rows[0]
    told = (f"{first['model']}, {first['tokens']} tokens of WikiText-2 test, windows of {first['window']}. 2:4: "
            f"{first['pruned'] or 'none'}; cut: {first.get('cut') or 'none'}. excess: log perplexity above "
            f"transformers', nats. tokens/s: cpu_decode.md. {gguf.beside_integers([first['model']])}".rstrip())
    body = [[row["way"], f"{row['bytes'] / 1e6:.0f}", f"{row['ppl']:.3f}", f"{math.log(row['ppl'] / first['ppl']):.4f}",
             f"{row['tokens_per_second']:.1f}" if row["tokens_per_second"] else "-"] for row in rows]
    return "\n".join(["# Perplexity of what a CPU computes\n", written("cpu_quality.py", first["environment"]) + "\n",
                      told + "\n", render(["way", "MB", "ppl", "excess", "tokens/s"], body, "markdown", text={"way"}),
                      "![excess against tokens per second](cpu_quality.svg)\n" * any(timed(rows))])


def timed(rows: Sequence[dict]) -> list[dict]:
    """The rows whose speed is known."""
    return [row for row in rows if row["tokens_per_second"]]


@drawing.drawn
def picture(rows: Sequence[dict]) -> "Figure":
    """Excess against tokens per second: a colour for each kind of model, a line through what none beats in both."""
    styles = dict(zip(("transformers", *KINDS, "llama.cpp"), zip(drawing.COLOURS, drawing.MARKERS,
                                                                         strict=False), strict=False))
    fig, dense = drawing.new_figure(drawing.WIDTH, 4.2), rows[0]["ppl"]
    ax = fig.subplots()
    points = {row["way"]: (row["tokens_per_second"], [max(math.log(row["ppl"] / dense), 0.0)]) for row in rows}
    for way, (speed, [excess]) in points.items():
        own = next(kind for kind in styles if way.startswith(kind))
        drawing.mark(ax, speed, [excess], *styles[own])
        ax.annotate(way.removeprefix(own).partition("/")[0].strip(), (speed, excess), xytext=(4, 4),
                    textcoords="offset points", fontsize=7, color=drawing.MUTED)
    line = sorted(points[way] for way in size.front({w: (-speed, x) for w, (speed, x) in points.items()}))
    ax.plot([speed for speed, _ in line], [x for _, [x] in line], color=drawing.MUTED, lw=1, zorder=1)
    ax.set(title=rows[0]["model"], xlabel="tokens per second, batch 1", ylabel="excess log perplexity, nats")
    drawing.legend(fig, [drawing.handle(kind, colour, "none", marker) for kind, (colour, marker) in styles.items()
                         if any(way.startswith(kind) for way in points)])
    return fig


if __name__ == "__main__":
    sys.exit(main())
