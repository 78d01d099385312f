"""What healing on text gives back: heal.md and heal.svg from the records of scripts/bench/heal.py.

    python scripts/tables/heal_table.py            # write them into results/heal
    python scripts/tables/heal_table.py --check    # exit 1 if heal.md is stale

    excess   log ppl - log ppl of the dense model, on text that nothing was trained on
    share    of the excess of the pruned model without healing that a way removes
"""

import statistics
import sys
from pathlib import Path

import heal_picture
import one_page
from best_rows import described, spread
from heal_rows import (
    METRICS,
    OWN,
    begun_with,
    dense_of,
    in_order,
    minutes_of,
    plain_of,
    rate_of,
    seed_of,
    settings_of,
    share,
    texts_of,
    trained_on_text,
    way_of,
    windows_of,
)

from oneshot.report import accuracy, figures, table
from oneshot.report.figures import healing

ROOT = Path(__file__).parents[2]
ACC = "/acc"  # how the metrics of tasks end that are shown
LOOKS = (20, 40, 60)  # minutes of training on text


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds heal.md stale."""
    return one_page.main(argv, __doc__, __file__, ROOT / "results" / "heal" / "heal.md", page,
                         lambda out: figures.save(heal_picture.picture(in_order(out)), out / "heal.svg"))


def lines_of(found: list[tuple[str, dict]]) -> str:
    """The tables of some records, one for the models that were measured on the same texts."""
    texts = dict.fromkeys(texts_of(record) for _, record in found)
    return "\n".join(of_texts([row for row in found if texts_of(row[1]) == metrics], metrics) for metrics in texts)


def of_texts(found: list[tuple[str, dict]], metrics: tuple[str, ...]) -> str:
    """The table of the models measured on the same texts: a line a way, over its seeds."""
    names, ways = [metric.split("/")[0] for metric in metrics], {}
    for model, record in found:
        usual = min(windows_of(r) for m, r in found if m == model and r["settings"]["method"] != "dense")
        ways.setdefault((model, way_of(record, usual)), []).append(record)
    heads = ["model", "seeds", "way", "tokens", "a step", "lr", *(f"{name} ppl" for name in names),
             *(f"share, {name}" for name in names), "held-out loss", "tokens/s", "minutes", "in all", "peak GiB"]
    lines = [[model, ", ".join(str(seed_of(r)) for r in records if "seed" in r["settings"]), way,
              *cells(records, found, model, metrics)] for (model, way), records in ways.items()]
    return table.render(heads, lines, "markdown", text={"model", "seeds", "way"})


def cells(records: list[dict], found: list[tuple[str, dict]], model: str, metrics: tuple[str, ...]) -> list[str]:
    """What the table says of the runs of one way, which differ in their seed."""
    same, dense = [r for m, r in found if m == model], dense_of(found, model)
    infos = [info for info in map(trained_on_text, records) if info]
    speeds = [info["tokens_per_second"] for info in infos if info.get("tokens_per_second")]
    loss = [statistics.fmean(info[f"held_out_{when}"] for info in infos) for when in ("before", "after") if infos]
    return [f"{statistics.fmean(info['tokens'] for info in infos):,.0f}" if infos else "",
            f"{statistics.fmean(info['tokens'] / info['steps'] for info in infos):.0f}" if infos else "",
            ", ".join(dict.fromkeys(filter(None, map(rate_of, records)))),
            *(spread([r["metrics"][metric] for r in records], 2) for metric in metrics),
            *(shares(records, same, dense, metric) for metric in metrics),
            f"{loss[0]:.3f} to {loss[1]:.3f}" if infos else "", f"{statistics.fmean(speeds):.0f}" if speeds else "",
            f"{statistics.fmean(r['seconds']['prune'] for r in records) / 60:.1f}",
            f"{statistics.fmean(minutes_of(r, same) for r in records):.1f}",
            f"{max(r['peak_memory_bytes'] for r in records) / 2**30:.1f}"]


def shares(records: list[dict], same: list[dict], dense: dict | None, metric: str) -> str:
    """The share of the excess that the runs of a way remove; in brackets that of the model with which it began, where
    this is not the one that it is compared with."""
    found = [share(r, plain_of(r, same), dense, metric) for r in records]
    if None in found:
        return ""
    starts = [begun_with(r, same) for r in records]
    if any(start is None or start is plain_of(r, same) for r, start in zip(records, starts, strict=True)):
        return spread(found, 2)
    own = [share(r, start, dense, metric) for r, start in zip(records, starts, strict=True)]
    return f"{spread(found, 2)} ({spread(own, 2)})"


# ------------------------------------------------------------------ at equal time

def by_time(out: Path) -> str:
    """Every 2:4 model of one model, the quickest first: trained on text, in full or by LoRA, or on its calibration
    windows alone; "" where nothing was measured."""
    found = [(model, record) for model, record in in_order(out) if model == heal_picture.MODEL]
    same, dense = [record for _, record in found], dense_of(found, heal_picture.MODEL)
    records = [r for r in same if settings_of(r).get("pattern") == "2:4" and "shuffled" not in way_of(r)]
    if not records or not dense:
        return ""
    lines = [[way_of(r), kind_of(r), f"{minutes_of(r, same):.1f}",
              *(f"{r['metrics'][metric]:.2f}" for metric in METRICS), *(shares([r], same, dense, m) for m in METRICS),
              *(held_out_at(r, minutes) for minutes in LOOKS), r["environment"]["device"], r["environment"]["commit"]]
             for r in sorted(records, key=lambda r: minutes_of(r, same))]
    names = [metric.split("/")[0] for metric in METRICS]
    heads = ["way", "trained on", "minutes in all", *(f"{name} ppl" for name in names),
             *(f"share, {name}" for name in names), *(f"KL at {minutes} min" for minutes in LOOKS), "processor",
             "commit"]
    return (f"At equal time: {heal_picture.MODEL} at 2:4, the quickest first, so that neighbours took about as long. "
            "KL: held out, to the dense model, after so many minutes of training on text; -: it had ended, or had "
            "another loss.\n\n"
            f"{table.render(heads, lines, 'markdown', text={'way', 'trained on', 'processor', 'commit'})}")


def kind_of(record: dict) -> str:
    """What a model was trained on."""
    heals = (settings_of(record) | record["settings"]).get("heal") or "none"
    if trained_on_text(record):
        return "text, LoRA" if "lora" in heals else "text, all kept weights"
    heals = record["heal"] or heals != "none"
    return "calibration windows" if heals else "nothing"


def held_out_at(record: dict, minutes: float) -> str:
    """The held-out KL at the last look before so many minutes of training on text; "-" where it had ended, "" where
    there was none."""
    info = trained_on_text(record)
    if not info or record["settings"].get("heal_loss", "kl") != "kl":
        return "-" if info else ""
    seconds = info["tokens"] / info["tokens_per_second"]
    looks = [(tokens / info["tokens"] * seconds / 60, loss)
             for curve in healing.curves(record).values() for stretch in curve for tokens, loss in stretch]
    before = [loss for at, loss in looks if at <= minutes]
    return f"{before[-1]:.3f}" if before and seconds / 60 > minutes else "-"


# ------------------------------------------------------------------ tasks, and the page

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


def told(found: list[tuple[str, dict]]) -> str:
    """How the numbers came about, and what the columns say, one line."""
    own = " own: all of the other half of a toy's own text;" if any(OWN in r["metrics"] for _, r in found) else ""
    return (f"`scripts/bench/heal.py` on {described([record for _, record in found])}. 64 windows of each text, on "
            f"which nothing was trained;{own} several seeds: mean ± standard deviation. a step: tokens. lr: of "
            "training on text, set by hand for `full` (by default it is found on the first steps), and what it was "
            "lowered to. share: of the excess log-perplexity of the same model without healing that is gone (of best: "
            "of SparseGPT's; of widths by layer: of even widths'), with as many calibration windows where that was "
            "measured; in brackets: of the excess of the very model that the way began with. held-out loss, nats, on a "
            "part of the training mixture that was not trained on: KL to the dense model, with (next) the next token's "
            "cross-entropy, which also moves a model towards the texts it is healed on; the dense one was not. "
            "minutes: of the run; in all: with the run that made the model it began with.")


def page(out: Path) -> str:
    """heal.md."""
    found = in_order(out)
    return (f"# Healing on text\n\n{told(found)}\n\n{lines_of(found)}\n{by_time(out)}\n{tasks_of(out)}".rstrip("\n")
            + "\n\n![excess against the tokens seen, and held-out losses](heal.svg)\n")


if __name__ == "__main__":
    sys.exit(main())
