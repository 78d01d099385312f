"""The records of scripts/bench/heal.py: what each was made with, what it is compared with, how tables name it."""

import math
from pathlib import Path

from oneshot import report

WINDOWS = 64  # of calibration, unless a row says otherwise
METRICS, OWN = ("wikitext2_test/ppl", "c4/ppl"), "own/ppl"  # OWN: models with a text of their own


def rows(out: Path) -> list[tuple[str, dict]]:
    """(model, record) of all finished runs."""
    files = sorted(out.glob("*/*.json"))
    found = [(file.parent.name, report.read(file)) for file in files if not file.name.endswith("-failed.json")]
    return [(model, record) for model, record in found if record.get("status") == "finished"]


def in_order(out: Path) -> list[tuple[str, dict]]:
    """`rows`, by model and seed, then as `order` says."""
    return sorted(rows(out), key=lambda row: (row[0], seed_of(row[1]), order(row[1])))


def dense_of(found: list[tuple[str, dict]], model: str) -> dict | None:
    """The record of the dense model, if there is one."""
    return next((r for m, r in found if m == model and r["settings"]["method"] == "dense"), None)


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


def excess(record: dict, dense: dict, metric: str) -> float:
    """Log perplexity above the dense model's, nats."""
    return math.log(record["metrics"][metric] / dense["metrics"][metric])


def share(record: dict, plain: dict | None, dense: dict | None, metric: str) -> float | None:
    """The share of the excess of `plain` that a record's way removes; None where there is nothing to compare with."""
    if not plain or not dense or record in (plain, dense):
        return None
    return 1 - excess(record, dense, metric) / excess(plain, dense, metric)


def plain_of(record: dict, same: list[dict]) -> dict | None:
    """The model without healing that a record is compared with, among all records of its model."""
    plain = [r for r in same if unhealed(r) and not settings_of(r).get("uneven") and of(r) == of(record)]
    return next((r for r in plain if windows_of(r) == windows_of(record)), plain[0] if plain else None)


def is_start(plain: dict, healed: dict) -> bool:
    """Whether a run made, without text, the model that another healed on text, or one by the same settings."""
    if trained_on_text(plain) or not trained_on_text(healed) or windows_of(plain) != windows_of(healed):
        return False
    made, began = plain["settings"], settings_of(healed)
    return all(made.get(key) == began.get(key) for key in ("method", "preset", "pattern", "shrink", "uneven"))


def begun_with(record: dict, same: list[dict]) -> dict | None:
    """The run that saved the model with which a way began, among all records of its model; None where it began with
    the dense one, or where that run is not there."""
    made = [r for r in same if "begun" in record and is_start(r, record) and seed_of(r) == seed_of(record)]
    return made[0] if made else None


def minutes_of(record: dict, same: list[dict]) -> float:
    """Minutes of pruning and healing, with those of the run that made the model with which a way began."""
    start = begun_with(record, same)
    return record["seconds"]["prune"] / 60 + (minutes_of(start, same) if start else 0)


def rate_of(record: dict) -> str:
    """The learning rate on text, "0.002", or where it was lowered "0.002 to 0.0005"; "" where nothing was trained."""
    rates = [attempt["lr"] for attempt in trained_on_text(record).get("attempts", [])]
    return " to ".join(f"{rate:g}" for rate in dict.fromkeys((rates[0], rates[-1]))) if rates else ""


def trained_on_text(record: dict) -> dict:
    """What a record says of healing on text; {} where there was none."""
    return next((info for info in record["heal"].values() if "attempts" in info), {})


def texts_of(record: dict) -> tuple[str, ...]:
    """The perplexities that a record holds."""
    return tuple(metric for metric in (*METRICS, OWN) if metric in record["metrics"])
