"""What healing on text gives back: heal.md and heal.svg from the records of scripts/bench/heal.py.

    python scripts/tables/heal_table.py            # write them into results/heal
    python scripts/tables/heal_table.py --check    # exit 1 if heal.md is stale

    excess   log ppl - log ppl of the dense model, on text that nothing was trained on
    share    of the excess of the pruned model without healing that a way removes
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from best_rows import described, spread

from oneshot import report
from oneshot.report import accuracy, figures, table
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_text

ROOT = Path(__file__).parents[2]
WINDOWS = 64  # of calibration, unless a row says otherwise
METRICS, OWN = ("wikitext2_test/ppl", "c4/ppl"), "own/ppl"  # OWN: models with a text of their own
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
            records = [record for _, record in rows(args.out) if figures.healing.curves(record)]
            figures.save(figures.fig_healing(records), args.out / "heal.svg")
        print(f"{'stale' if args.check else 'written'}: {file}" if stale else "up to date")
        return int(stale and args.check)
    return exit_code(work)


def rows(out: Path) -> list[tuple[str, dict]]:
    """(model, record) of all finished runs."""
    files = sorted(out.glob("*/*.json"))
    found = [(file.parent.name, report.read(file)) for file in files if not file.name.endswith("-failed.json")]
    return [(model, record) for model, record in found if record.get("status") == "finished"]


def lines_of(out: Path) -> str:
    """The tables of all records in the folder `out`, one for the models that were measured on the same texts."""
    found = in_order(out)
    texts = dict.fromkeys(texts_of(record) for _, record in found)
    return "\n".join(of_texts([row for row in found if texts_of(row[1]) == metrics], metrics) for metrics in texts)


def texts_of(record: dict) -> tuple[str, ...]:
    """The perplexities that a record holds."""
    return tuple(metric for metric in (*METRICS, OWN) if metric in record["metrics"])


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


def plain_of(record: dict, same: list[dict]) -> dict | None:
    """The model without healing that a record is compared with, among all records of its model."""
    plain = [r for r in same if unhealed(r) and not settings_of(r).get("uneven") and of(r) == of(record)]
    return next((r for r in plain if windows_of(r) == windows_of(record)), plain[0] if plain else None)


def trained_on_text(record: dict) -> dict:
    """What a record says of healing on text; {} where there was none."""
    return next((info for info in record["heal"].values() if "attempts" in info), {})


def in_order(out: Path) -> list[tuple[str, dict]]:
    """`rows`, by model and seed, then as `order` says."""
    return sorted(rows(out), key=lambda row: (row[0], seed_of(row[1]), order(row[1])))


def dense_of(found: list[tuple[str, dict]], model: str) -> dict | None:
    """The record of the dense model, if there is one."""
    return next((r for m, r in found if m == model and r["settings"]["method"] == "dense"), None)


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
            "which nothing was trained; own: the other half of the toys' own texts; several seeds: mean ± standard "
            "deviation. "
            "share: of the excess log-perplexity of the same model without healing that is gone (of best: of "
            "SparseGPT's; of widths by layer: of even widths'), with as many calibration windows where that was "
            "measured. held-out loss, nats, "
            "on a part of the training mixture that was not trained on: KL to the dense model, with (next) the next "
            "token's cross-entropy, which also moves a model towards the texts it is healed on; the dense one was not.")


def page(out: Path) -> str:
    """heal.md."""
    return (f"# Healing on text\n\n{told(out)}\n\n{lines_of(out)}\n{tasks_of(out)}"
            "![held-out loss against tokens](heal.svg)\n")


def unhealed(record: dict) -> bool:
    """Whether a pruned or smaller model was not trained."""
    return record["settings"]["method"] != "dense" and record["settings"].get("heal", "none") in ("none", "fold")


def of(record: dict) -> tuple:
    """What a healed model and the unhealed one that it is compared with share."""
    settings = settings_of(record)
    return settings.get("pattern"), settings.get("shrink"), seed_of(record)


def settings_of(record: dict) -> dict:
    """A record's settings, where it began with another way's model those by which that was made."""
    return record["settings"] | record.get("begun", {})


def seed_of(record: dict) -> int:
    """The calibration seed; 0 for the dense model, which has none."""
    return record["settings"].get("seed", 0)


def windows_of(record: dict) -> int:
    """How many calibration windows a record's model was pruned with."""
    return settings_of(record).get("nsamples", WINDOWS)


def order(record: dict) -> tuple:
    """Dense first, then without healing, then by the tokens trained on."""
    tokens = trained_on_text(record).get("tokens", 0)
    return record["settings"]["method"] != "dense", round(tokens, -4), way_of(record)


def way_of(record: dict, usual: int = WINDOWS) -> str:
    """A way as the table names it. usual: calibration windows that go without saying."""
    settings = settings_of(record)
    if settings["method"] == "dense":
        return "dense"
    made = [f"shrink {settings['shrink']:g}"] if settings.get("shrink") else []
    method = settings.get("preset") or settings["method"]
    made += [f"{method} {settings['pattern']}"] if settings.get("pattern") != "dense" else []
    own = settings.get("heal") if not record["settings"].get("preset") else None  # a preset heals by itself
    about = [settings["heal_loss"]] if settings.get("heal_loss") else []
    about += ["on shuffled words"] if "shuffled" in str(settings.get("heal_data")) else []
    about += ["C4 held out"] if settings.get("heal_held_out") else []
    about += ["widths by layer"] if settings.get("uneven") else []
    about += [f"{windows_of(record)} windows"] if windows_of(record) != usual else []
    healed = f", {own}" if own not in (None, "none") else ""
    return " ".join(made) + healed + (f" ({', '.join(about)})" if about else "")


def share(record: dict, plain: dict | None, dense: dict | None, metric: str) -> float | None:
    """The share of the excess of `plain` that a record's way removes; None where there is nothing to compare with."""
    if not plain or not dense or record in (plain, dense):
        return None
    excess = [math.log(r["metrics"][metric] / dense["metrics"][metric]) for r in (plain, record)]
    return 1 - excess[1] / excess[0]


if __name__ == "__main__":
    sys.exit(main())
