"""What smaller dense models lose: shrink.md from the rows of scripts/bench/shrink.py.

    python scripts/tables/shrink_table.py            # write results/shrink/shrink.md
    python scripts/tables/shrink_table.py --check    # exit 1 if it is stale

A pure function of results/shrink/*.json.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import one_page
import yaml
from best_rows import described

from oneshot.report import table

ROOT = Path(__file__).parents[2]
WAYS = yaml.safe_load((ROOT / "scripts" / "bench" / "shrink_ways.yaml").read_text(encoding="utf-8"))
BASELINES = ("flap", "flap, as published", "wanda-sp", "shortgpt")
OURS = ("oneshot", "oneshot, widths by layer", "widths by layer, no mixtures")
ASKED = {"demo": 0.5, "craftgpt-5m": 0.5}  # how much less excess; of all others 0.3


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where --check finds shrink.md stale."""
    return one_page.main(argv, __doc__, __file__, ROOT / "results" / "shrink" / "shrink.md",
                         lambda out: page(rows_of(out)))


def rows_of(folder: Path) -> list[dict]:
    """All rows whose flags are today's. Raises ValueError where there are none."""
    every = WAYS["main"] | WAYS["ingredients"]
    found = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text()).get("rows", [])]
    found = [row for row in found if every.get(row["way"]) == row["flags"]]
    if not found:
        raise ValueError(f"--out {folder}: holds no rows; run scripts/bench/shrink.py")
    return found


def page(rows: Sequence[dict]) -> str:
    """The whole page."""
    lines = ["# Smaller dense models", "",
             "Excess log-perplexity over the dense model in nats, without any healing unless a way says so, mean ± "
             "standard deviation over calibration seeds (n), and in brackets how much less that is than the best of "
             f"{'; '.join(BASELINES)} with the same seed. The share is of the parameters of the transformer blocks "
             "that are left. FLAP's biases are extra parameters and its own; `shortgpt` drops as many whole blocks "
             "as the budget allows, FLAP's neurons give the rest. Every layer has the same width unless a way says "
             "otherwise; as published, FLAP chooses widths by layer, of attentions too.", "",
             f"`scripts/bench/shrink.py` on {described(rows)}.", ""]
    for name in dict.fromkeys(row["model"] for row in rows):
        lines += section(name, [row for row in rows if row["model"] == name])
    return "\n".join(lines)


def section(name: str, rows: Sequence[dict]) -> list[str]:
    """One model: its table, and whether the target is met."""
    shares = sorted({row["asked"] for row in rows}, reverse=True)
    ways = [way for way in WAYS["main"] | WAYS["ingredients"] if any(row["way"] == way for row in rows)]
    best = least(rows)
    body = [[way, *(cell(rows, best, way, share) for share in shares), seconds(rows, way)] for way in ways]
    head = ["way", *(f"{share:g}" for share in shares), "seconds"]
    metric, window = rows[0]["metric"], rows[0]["window"]
    lines = [f"## {name}", "", f"{metric} @{window}, dense {rows[0]['dense_ppl']:.4g}", "",
             table.render(head, body, "markdown", text={"way"})]
    for share in shares:
        for way in OURS:
            gains = less(rows, best, way, share)
            if gains:
                asked = ASKED.get(name, 0.3)
                met = "met" if statistics.fmean(gains) >= asked else "missed"
                lines.append(f"- {share:g}, {way}: {100 * statistics.fmean(gains):.0f} % less than the best of these, "
                             f"asked for {100 * asked:.0f} %: {met} (seeds: "
                             f"{', '.join(f'{100 * g:.0f} %' for g in gains)})")
    return [*lines, ""]


def least(rows: Sequence[dict]) -> dict[tuple[float, int], float]:
    """{(share, seed): excess of the best baseline}, where all were measured."""
    found: dict[tuple[float, int], dict[str, float]] = {}
    for row in rows:
        if row["way"] in BASELINES:
            found.setdefault((row["asked"], row["seed"]), {})[row["way"]] = row["excess"]
    return {key: min(own.values()) for key, own in found.items() if len(own) == len(BASELINES)}


def less(rows: Sequence[dict], best: dict, way: str, share: float) -> list[float]:
    """By which share the way's excess is below that of the best baseline, for each seed."""
    return [1 - row["excess"] / best[share, row["seed"]] for row in rows
            if (row["way"], row["asked"]) == (way, share) and (share, row["seed"]) in best]


def cell(rows: Sequence[dict], best: dict, way: str, share: float) -> str:
    """A way at a share."""
    own = [row["excess"] for row in rows if (row["way"], row["asked"]) == (way, share)]
    if not own:
        return "-"
    spread = f" ± {statistics.stdev(own):.3f}" if len(own) > 1 else ""
    text = f"{statistics.fmean(own):.3f}{spread} ({len(own)})"
    gains = less(rows, best, way, share)
    return text + (f" [{-100 * statistics.fmean(gains):+.0f} %]" if gains and way not in BASELINES else "")


def seconds(rows: Sequence[dict], way: str) -> str:
    """Processor seconds of a way, mean over all that was measured of it."""
    own = [row["cpu_seconds"] for row in rows if row["way"] == way]
    return f"{statistics.fmean(own):.1f}"


if __name__ == "__main__":
    sys.exit(main())
