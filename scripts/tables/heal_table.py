"""What healing on text gives back: heal.md and heal.svg from the records of scripts/bench/heal.py.

    python scripts/tables/heal_table.py            # write them into results/heal
    python scripts/tables/heal_table.py --check    # exit 1 if heal.md is stale

    excess   log ppl - log ppl of the dense model, on text that nothing was trained on
    share    of the excess of the pruned model without healing that a way removes
"""

import argparse
import statistics
import sys
from pathlib import Path

import heal_picture
from best_rows import described, spread
from heal_rows import (
    dense_of,
    in_order,
    plain_of,
    rows,
    seed_of,
    share,
    texts_of,
    trained_on_text,
    way_of,
    windows_of,
)

from oneshot.report import accuracy, figures, table
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

ROOT = Path(__file__).parents[2]
ACC = "/acc"  # how the metrics of tasks end that are shown


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds heal.md stale."""
    p = Parser(prog="python scripts/tables/heal_table.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "results" / "heal", help="folder of the records and both files")
    p.add_argument("--check", action="store_true", help="write nothing, exit 1 if heal.md would change")
    args = p.parse_args(argv)

    def work() -> int:
        file = args.out / "heal.md"
        stale = not file.is_file() or file.read_text(encoding="utf-8") != page(args.out)
        if stale and not args.check:
            write_text(page(args.out), file)
            figures.save(heal_picture.picture(in_order(args.out)), args.out / "heal.svg")
        print(f"{'stale' if args.check else 'written'}: {file}" if stale else "up to date")
        return int(stale and args.check)
    return exit_code(work)


def lines_of(out: Path) -> str:
    """The tables of all records in the folder `out`, one for the models that were measured on the same texts."""
    found = in_order(out)
    texts = dict.fromkeys(texts_of(record) for _, record in found)
    return "\n".join(of_texts([row for row in found if texts_of(row[1]) == metrics], metrics) for metrics in texts)


def of_texts(found: list[tuple[str, dict]], metrics: tuple[str, ...]) -> str:
    """The table of the models measured on the same texts: a line a way, over its seeds."""
    names, ways = [metric.split("/")[0] for metric in metrics], {}
    for model, record in found:
        usual = min(windows_of(r) for m, r in found if m == model and r["settings"]["method"] != "dense")
        ways.setdefault((model, way_of(record, usual)), []).append(record)
    heads = ["model", "seeds", "way", "tokens", *(f"{name} ppl" for name in names),
             *(f"share, {name}" for name in names), "held-out loss", "tokens/s", "minutes", "peak GiB"]
    lines = [[model, ", ".join(str(seed_of(r)) for r in records if "seed" in r["settings"]), way,
              *cells(records, found, model, metrics)] for (model, way), records in ways.items()]
    return table.render(heads, lines, "markdown", text={"model", "seeds", "way"})


def cells(records: list[dict], found: list[tuple[str, dict]], model: str, metrics: tuple[str, ...]) -> list[str]:
    """What the table says of the runs of one way, which differ in their seed."""
    same, dense = [r for m, r in found if m == model], dense_of(found, model)
    infos = [info for info in map(trained_on_text, records) if info]
    shares = [[share(r, plain_of(r, same), dense, metric) for r in records] for metric in metrics]
    speeds = [info["tokens_per_second"] for info in infos if info.get("tokens_per_second")]
    loss = [statistics.fmean(info[f"held_out_{when}"] for info in infos) for when in ("before", "after") if infos]
    return [f"{statistics.fmean(info['tokens'] for info in infos):,.0f}" if infos else "",
            *(spread([r["metrics"][metric] for r in records], 2) for metric in metrics),
            *("" if None in values else spread(values, 2) for values in shares),
            f"{loss[0]:.3f} to {loss[1]:.3f}" if infos else "", f"{statistics.fmean(speeds):.0f}" if speeds else "",
            f"{statistics.fmean(r['seconds']['prune'] for r in records) / 60:.1f}",
            f"{max(r['peak_memory_bytes'] for r in records) / 2**30:.1f}"]


def tasks_of(out: Path) -> str:
    """What the tasks say, as text with a table; "" where none were measured."""
    found = [(model, record) for model, record in in_order(out) if any(m.endswith(ACC) for m in record["metrics"])]
    if not found:
        return ""
    info, tasks = found[0][1]["metric_info"], [m for m in found[0][1]["metrics"] if m.endswith(ACC)]
    lines = [[model, str(seed_of(record)), way_of(record), *(task_cell(record, dense_of(found, model), task)
                                                             for task in tasks)] for model, record in found]
    heads = [f"{task} (chance {info[task]['chance']:g})" if info[task]["chance"] else task for task in tasks]
    return (f"Tasks, {info[tasks[0]]['samples']} documents each, ± standard error; in brackets: minus dense, document "
            "by document unless it says unpaired; ~ within two standard errors.\n\n"
            f"{table.render(['model', 'seed', 'way', *heads], lines, 'markdown', text={'model', 'way'})}\n")


def task_cell(record: dict, dense: dict | None, task: str) -> str:
    """An accuracy and how it differs from the dense model's."""
    own = f"{record['metrics'][task]:.2f} ± {record['metric_info'][task]['stderr']:.2f}"
    found = accuracy.difference(record, dense, task) if dense and record is not dense else None
    if not found:
        return own
    marks = " unpaired" * (not found.paired) + " ~" * found.within_noise
    return f"{own} ({found.value:+.2f} ± {found.stderr:.2f}{marks})"


def told(out: Path) -> str:
    """How the numbers came about, one line."""
    return (f"`scripts/bench/heal.py` on {described([record for _, record in rows(out)])}. 64 windows of each text, on "
            "which nothing was trained; own: all of the other half of a toy's own text; several seeds: mean ± standard "
            "deviation. "
            "share: of the excess log-perplexity of the same model without healing that is gone (of best: of "
            "SparseGPT's; of widths by layer: of even widths'), with as many calibration windows where that was "
            "measured. held-out loss, nats, "
            "on a part of the training mixture that was not trained on: KL to the dense model, with (next) the next "
            "token's cross-entropy, which also moves a model towards the texts it is healed on; the dense one was not.")


def page(out: Path) -> str:
    """heal.md."""
    return (f"# Healing on text\n\n{told(out)}\n\n{lines_of(out)}\n{tasks_of(out)}"
            "![excess against the tokens seen, and held-out losses](heal.svg)\n")


if __name__ == "__main__":
    sys.exit(main())
