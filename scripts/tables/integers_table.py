"""Quality against bytes and speed: integers.md and integers.svg from the rows of scripts/bench/integers.py.

    python scripts/tables/integers_table.py            # write them into results/bench
    python scripts/tables/integers_table.py --check    # exit 1 if integers.md is stale

    less       share of the excess of SparseGPT at 2:4, rounded to nearest int4, that a way of as many bytes does
               without
    tokens/s   of the form that the way's weights have, as scripts/bench/cpu_decode.py measured it
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import one_page
import yaml

from oneshot import report
from oneshot.models import gguf
from oneshot.report.figures import drawing, size
from oneshot.report.table import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
WAYS = {way: own for group in
        yaml.safe_load((ROOT / "scripts/bench/integers_ways.yaml").read_text(encoding="utf-8")).values()
        for way, own in group.items()}
MARKED = {gguf.SMOLLM2: f"{gguf.on_grid()}, except where it was rotated, scaled or healed before; once rotated it has "
                        "a head of its own, not counted here"}
NEAREST = "2:4, then int4 to nearest"  # what `less` compares with
SHOWN = (NEAREST, "2:4, then int4 by GPTQ", "2:4 and int4 in one pass", "2:4 by ALPS, then int4 by GPTQ",
         "2:4 by ALPS, healed, then int4 by GPTQ", "2:4 by ALPS, healed on text, then int4 by GPTQ",
         "50 %, then int4 by GPTQ", "50 % by ALPS, healed, then int4 by GPTQ", "int3 by GPTQ",
         "int3 by GPTQ, columns scaled")  # in the README
FORMS = {None: "bf16", "int8:row": "int8", "int4:64": "int4"}  # of cpu_decode.py, with inputs as they are
HEALED = ", healed"
LEAST = 1e-4  # nats; what loses less, or gains, is drawn there


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds integers.md stale."""
    return one_page.main(argv, __doc__, __file__, ROOT / "results" / "bench" / "integers.md",
                         lambda out: page(rows_of(out), speeds(out)),
                         lambda out: drawing.save(picture(rows_of(out)), out / "integers.svg"))


def rows_of(folder: Path) -> list[dict]:
    """All rows whose flags are today's. Raises ValueError where there are none."""
    file = folder / "integers.json"
    found = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    found = [row for row in found if WAYS.get(row["way"]) == row["flags"]]
    if not found:
        raise ValueError(f"--out {folder}: holds no rows; run scripts/bench/integers.py")
    return found


def speeds(folder: Path) -> dict[tuple[str, str], tuple[float, dict]]:
    """{(model, form): (tokens per second with one thread, row)} of cpu_decode.json; none where it was not measured."""
    file = folder / "cpu_decode.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
    return {(row["model"], row["way"]): (row["tokens_per_second"], row) for row in rows if row["threads"] == 1}


def page(rows: Sequence[dict], fast: dict) -> str:
    """The page: a table for each model, fewest bits last."""
    e = rows[-1]["environment"]
    commits = ", ".join(dict.fromkeys(row["environment"]["commit"] for row in rows))
    parts = ["# Quality against bytes\n",
             f"`scripts/bench/integers.py` on {e['device']}, {e['threads']} thread, torch {e['torch']}, "
             f"commit {commits}.\n",
             "bits: of codes, scales and positions for each weight that the dense model has in its blocks' linears. "
             "excess: log perplexity above the dense model's, nats, mean over seeds (± standard deviation). less: "
             f"share of the excess of \"{NEAREST}\" that a way of as many bytes does without. seconds: by the "
             "clock, of a machine that did other things as well.\n",
             "![excess against bits, with the front of what no other way beats](integers.svg)\n"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        parts += [f"## {name}\n", *([f"{name}: {MARKED[name]}.\n"] if name in MARKED else []),
                  *([f"{winner(own)}\n"] if winner(own) else [])]
        told = f"{own[0]['metric']}: dense {report.number(own[0]['dense_ppl'])} at {own[0]['window']} tokens."
        used = [row for model, form in fast for _, row in [fast[model, form]] if model == name]
        if used:
            told += (f" tokens/s: `cpu_decode.py`, commit {used[0]['environment']['commit']}, one thread, "
                     f"{used[0]['environment']['device']}; '-': no kernel for this form, or not timed.")
        parts += [f"{told}\n", table(own, {form: rate for (model, form), (rate, _) in fast.items() if model == name})]
    return "\n".join(parts)


def lines(folder: Path) -> str:
    """The README's table: what ways of as many bytes as NEAREST lose on each model but the built-in one; "" where
    nothing was measured."""
    if not (folder / "integers.json").is_file():
        return ""
    rows = [row for row in rows_of(folder) if row["model"] != "demo"]
    if not rows:
        return ""
    names = list(dict.fromkeys(row["model"] for row in rows))
    groups = {name: grouped([row for row in rows if row["model"] == name]) for name in names}
    body = [[way, *(lost(groups[name].get(way, ())) for name in names)] for way in SHOWN
            if any(way in groups[name] for name in names)]
    e, bits = rows[-1]["environment"], groups[names[0]][NEAREST][0]["bits"]
    commits = ", ".join(dict.fromkeys(row["environment"]["commit"] for row in rows))
    told = (f"Log perplexity above the dense model's, nats, mean ± standard deviation over seeds, all at {bits:.2f} "
            f"bits a weight. `scripts/bench/integers.py`, {e['device']}, torch {e['torch']}, commit {commits}. healed: "
            "block by block on the calibration windows; on text: 500k tokens of C4 and books. smollm2: "
            f"{MARKED['smollm2']}.")
    return f"{told}\n\n{render(['way', *names], body, 'markdown', text={'way'}).rstrip()}"


def lost(rows: Sequence[dict]) -> str:
    """The excess of a way's rows."""
    excess = [row["excess"] for row in rows]
    spread = f" ± {statistics.stdev(excess):.3f}" if len(excess) > 1 else ""
    return f"{statistics.fmean(excess):.3f}{spread}" if excess else "-"


def winner(rows: Sequence[dict]) -> str:
    """Which way loses least of those that take as many bytes as NEAREST; "" where there is none to compare with."""
    groups = grouped(rows)
    if NEAREST not in groups:
        return ""
    same = {way: statistics.fmean(r["excess"] for r in met) for way, met in groups.items() if alike(met[0], groups)}
    best = min(same, key=same.get)
    return (f"At {groups[NEAREST][0]['bits']:.2f} bits the least is lost by **{best}**, {same[best]:.4f} nats; "
            f"by \"{NEAREST}\" {same[NEAREST]:.4f}.")


def table(rows: Sequence[dict], rates: dict[str, float]) -> str:
    """A model's table. rates: {form: tokens per second}; tasks where some were measured."""
    groups = grouped(rows)
    excess = {way: statistics.fmean(r["excess"] for r in met) for way, met in groups.items()}
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("tasks", {})))
    head = ["way", "bits", "KB", "excess", "less", "to zero", "seconds", *(["tokens/s"] if rates else []),
            *(f"{task.removeprefix('foundry_').removesuffix('/acc')}" for task in tasks)]
    lines = []
    for way, met in sorted(groups.items(), key=lambda item: (-item[1][0]["bits"], excess[item[0]])):
        spread = f" ± {statistics.stdev(r['excess'] for r in met):.4f}" if len(met) > 1 else ""
        smaller = met[0].get("dense", 0) < max(row.get("dense", 0) for row in rows)  # it began with a smaller model
        rate = None if smaller else rates.get(form(met[0]["flags"]))
        lines.append([way, f"{met[0]['bits']:.2f}", f"{met[0]['stored'] / 1e3:.0f}", f"{excess[way]:.4f}{spread}",
                      less(way, groups, excess), str(round(statistics.fmean(r["rounded_to_zero"] for r in met))),
                      f"{statistics.fmean(r['seconds'] for r in met):.1f}",
                      *([f"{rate:.0f}" if rate else "-"] if rates else []),
                      *(answered(met[0], task) for task in tasks)])
    return render(head, lines, "markdown", text={"way"}) + chances(rows)


def form(flags: dict) -> str | None:
    """What cpu_decode.py calls weights of this form; None where it has no kernel for it."""
    pattern = flags.get("pattern", "dense")
    first = flags.get("FIRST")
    grid = FORMS.get(flags.get("quantise", first if first in FORMS else None))
    return f"{pattern} {grid}" if pattern in ("dense", "2:4") and grid and "shrink" not in flags else None


def answered(row: dict, task: str) -> str:
    """A task's accuracy with its standard error."""
    found = row.get("tasks", {}).get(task)
    return f"{found['value']:.3f} ± {found['stderr']:.3f}" if found else "-"


def chances(rows: Sequence[dict]) -> str:
    """A line on how many documents the tasks had, and what guessing gives; "" where there were none."""
    found = next((row["tasks"] for row in rows if "tasks" in row), {})
    told = [f"{name.removeprefix('foundry_').removesuffix('/acc')} {of['samples']} documents, "
            + (f"chance {of['chance']:.2f}" if of["chance"] else "no chance level") for name, of in found.items()]
    return f"\nTasks, accuracy ± standard error: {'; '.join(told)}.\n" if told else ""


def less(way: str, groups: dict[str, list[dict]], excess: dict[str, float]) -> str:
    """The share of NEAREST's excess that a way does without; "-" where it takes other bytes, by more than 1 %."""
    if NEAREST not in groups or way == NEAREST:
        return "-"
    return f"{100 * (1 - excess[way] / excess[NEAREST]):.0f} %" if alike(groups[way][0], groups) else "-"


def grouped(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """{way: its rows}."""
    groups = {}
    for row in rows:
        groups.setdefault(row["way"], []).append(row)
    return groups


def alike(row: dict, groups: dict[str, list[dict]]) -> bool:
    """Whether a row takes as many bytes as NEAREST, to 1 %."""
    return abs(row["stored"] / groups[NEAREST][0]["stored"] - 1) <= 0.01


def kind(flags: dict) -> str:
    """What a way's point in the picture is called."""
    if "shrink" in flags:
        return "smaller dense model" + HEALED * ("block" in flags.get("heal", ""))
    if flags["pattern" if "pattern" in flags else "method"] == "dense":
        return "dense, to nearest" if flags.get("quantiser") == "rtn" else "dense, GPTQ"
    healed = HEALED + " on text" if "MODEL" in flags else HEALED * ("heal" in flags)
    return ("50 %" if flags["pattern"] == "0.5" else flags["pattern"]) + healed


@drawing.drawn
def picture(rows: Sequence[dict]) -> "Figure":
    """Excess against bits, a panel for each model; a line joins the ways that no other beats."""
    rows = [row for row in rows if row["flags"] != WAYS["dense"]]  # its excess is none
    names = list(dict.fromkeys(row["model"] for row in rows))
    kinds = list(dict.fromkeys(kind(row["flags"]) for row in rows))
    bases = list(dict.fromkeys(name.partition(HEALED)[0] for name in kinds))  # a colour each; a marker by healing
    colours = dict(zip(bases, drawing.COLOURS, strict=False))
    states = ("", HEALED, HEALED + " on text")
    styles = {name: (colours[(base := name.partition(HEALED)[0])], drawing.MARKERS[states.index(name[len(base):])])
              for name in kinds}
    fig = drawing.new_figure(drawing.WIDTH, 0.5 + 2.9 * len(names))
    for ax, name in zip(fig.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        groups = grouped([row for row in rows if row["model"] == name])
        points = {way: (met[0]["bits"], [max(r["excess"], LEAST) for r in met]) for way, met in groups.items()}
        for way, (bits, values) in points.items():
            drawing.mark(ax, bits, values, *styles[kind(groups[way][0]["flags"])])
        line = [(points[way][0], statistics.fmean(points[way][1])) for way in size.front(points)]
        ax.plot(*zip(*line, strict=True), color=drawing.MUTED, lw=1, zorder=1)
        drawing.scale_y([ax], [v for _, values in points.values() for v in values])
        ax.set(title=name, xlabel="bits of storage a weight", ylabel="excess log perplexity, nats")
    drawing.legend(fig, [drawing.handle(name, colour, "none", marker) for name, (colour, marker) in styles.items()])
    return fig


if __name__ == "__main__":
    sys.exit(main())
