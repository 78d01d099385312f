"""Ending: plain rounding beside the rounds, acceptance of the result, the pictures, and what the command says.

    honest row   int8 and int4 rounding to nearest of the dense model, by the same measures; where it keeps all floors
                 and is at least as small and as good as the result, the first line says so
    acceptance   of the result, beside the dense model: floors, tasks, divergence, damage, prompts (--damage, --say,
                 --prompts ... say which), and its perplexity as it runs, with the inputs of integer layers rounded too
"""

import math
from dataclasses import asdict, replace

from ... import checkpoint, measure, report
from ...data import choose
from ...measure import perplexity
from ...report import accuracy, figures, page, summary
from ...report.figures.path import Point
from ...report.table import render
from ...runtime.files import write_text, writing
from ...settings import RunConfig, parse
from .. import device_table, forms
from . import steps
from .ledger import Round
from .rounds import Fit
from .steps import State


def finish(fit: Fit) -> str:
    """Measure what is left to measure, write the pictures, and return what the command prints."""
    plain = [plainly(fit, grid) for grid in forms.GRIDS]
    accepted = acceptance(fit)
    fit.ledger.ending |= {"result": fit.state.result, "met": fit.met(fit.shares), "stopped": fit.stopped,
                          "accepted": accepted}
    fit.ledger.write()
    text = told(fit, plain, accepted)
    with writing("--save", fit.ledger.folder):
        draw(fit, plain)
        write_text(text + "\n", fit.ledger.folder / "fit.txt")
    return text


def plainly(fit: Fit, grid: str) -> Round:
    """The dense model rounded to nearest, judged like a round; timed once."""
    kept, told = fit.ledger.ending.setdefault("plain", {}), (fit.table or {}).get("parts", {}).get("decode1", {})
    head = grid if told.get("head", {}).get(grid, 0.0) > 0 else None
    cfg = fit.steps.plain(grid, head)
    record = steps.done([cfg])
    now = Round(f"plain {grid}", {}, 0.0, told=f"{grid}: plain rounding{', of the output head too' if head else ''}")
    timed = kept.get(grid, {}).get("shares", {}).get("latency")
    if fit.asked.table is not None:
        blocks = record["model"]["blocks"]
        whole = told["rest"] + blocks * told["block"]
        gained = blocks * told.get("forms", {}).get(grid, 0.0) + told.get("head", {}).get(head, 0.0)
        now.foretold = {"latency": 1 - gained / whole}
    fit.judge(now, record, str(cfg.save), timed)
    kept[grid] = asdict(now)
    fit.ledger.write()
    return now


def wins(fit: Fit, plain: Round) -> bool:
    """Whether plain rounding keeps all floors, is as small as asked or as the result, and is no worse in any metric."""
    small = all(plain.shares[kind] <= max(share, fit.shares[kind]) for kind, share in fit.asked.targets.items())
    if not plain.kept or not small or plain.shares["bytes"] >= 1:
        return False
    if fit.state.result == fit.steps.model:
        return True
    best = record_of(fit.state)
    named = [metric for metric in best["metrics"] if metric in plain.metrics]
    for metric in named:
        mine, theirs = (math.nan if m[metric] is None else m[metric] for m in (plain.metrics, best["metrics"]))
        higher = metric.rpartition("/")[2].startswith(measure.higher())
        if not (mine >= theirs if higher else mine <= theirs):
            return False
    return bool(named)


def record_of(state: State) -> dict:
    """The record of a state that is a checkpoint."""
    return checkpoint.read_manifest(state.result)["record"]


def acceptance(fit: Fit) -> dict:
    """{"metrics", "parts", "dense"} of the result beside the dense model, plain values; {} for the dense model."""
    if fit.state.result == fit.steps.model:
        return {}
    cfg = asked_of(fit)
    (dense, tokenizer), (model, _) = fit.load(fit.steps.model), fit.load(fit.state.result)
    texts = choose.evaluation(cfg, model, tokenizer)
    found = measure.measure(measure.Subject(model, tokenizer, cfg, texts, None, lambda: dense))
    rounds = fit.state.grids or fit.state.output
    if "latency" in fit.asked.targets and rounds and forms.runnable(cfg.device) and fit.asked.table is None:
        runs = steps.loaded(fit.steps.dense, fit.state.result).float()
        for name, tokens in texts.items():
            found.metrics[f"{name}/ppl as it runs"] = perplexity.perplexity(
                runs, tokens.ids, tokens.mask, device=cfg.device, batch_size=cfg.batch_size)[0]
    both = {"metrics": found.metrics, "parts": found.parts}
    if cfg.say or cfg.prompts:
        own = replace(cfg, evaluate="none", divergence=False, damage=False)
        both["dense"] = measure.measure(measure.Subject(dense, tokenizer, own, {})).parts
    return report.storable(both)


def asked_of(fit: Fit) -> RunConfig:
    """What the command's own flags ask to measure, with divergence; what rounds have measured is left out."""
    [cfg] = parse([*fit.steps.words, "--model", fit.steps.model, "--method", "magnitude", "--pattern", "dense",
                   "--no-dense"])
    return replace(cfg, divergence=bool(cfg.evaluations), tasks="none", sensitivity="none", latency=False)


def draw(fit: Fit, plain: list[Round]) -> None:
    """fit.svg, candidates.svg, and fit.html, the page of all rounds' records."""
    folder, rounds = fit.ledger.folder, fit.ledger.rounds
    points = [Point("dense", "dense", dict.fromkeys(fit.asked.targets, 1.0), fit.dense["metrics"])]
    points += [Point(r.name.removeprefix("round-"), "kept" if r.kept else "taken back", r.shares, r.metrics)
               for r in rounds]
    points += [Point(r.name.removeprefix("plain "), "plain rounding", r.shares, r.metrics) for r in plain]
    bounds = {own.metric: own.bound(fit.dense["metrics"][own.metric]) for own in fit.asked.floors} or {
        metric: math.nan for metric in fit.dense["metrics"] if metric.endswith("ppl")}
    figures.save(figures.fig_path(points, fit.asked.targets, bounds), folder / "fit.svg")
    figures.save(figures.fig_candidates([(r.name, looked_at(r.candidates)) for r in rounds]), folder / "candidates.svg")
    records = [fit.dense, *(record_of(State("", str(folder / r.name))) for r in rounds if r.metrics)]
    page.write_html(records, folder / "fit.html", "The rounds of oneshot fit")


def looked_at(candidates: dict) -> dict[str, dict[int | str, float]]:
    """What of a round's candidates is drawn: {form, or "influence": {number of a block, or HEAD: what it loses}}."""
    found = {forms.SPARSE: candidates.get("sparse", []), **candidates.get("grids", {}),
             "influence": candidates.get("influence", [])}
    drawn = {label: dict(map(tuple, rows)) for label, rows in found.items()}
    for form, kl in candidates.get("output", {}).items():
        drawn.setdefault(form, {})[forms.HEAD] = kl
    return drawn


def told(fit: Fit, plain: list[Round], accepted: dict) -> str:
    """What the command prints at its end."""
    lines = [f"plain {r.name.removeprefix('plain ')} rounding of the dense model is the better answer: it keeps all "
             f"floors at {', '.join(f'{kind} {r.shares[kind]:.2f}' for kind in fit.asked.targets)}"
             for r in plain if wins(fit, r)][-1:]
    kinds = list(dict.fromkeys([*fit.asked.targets, "bytes", "parameters"]))
    metrics = list(dict.fromkeys([own.metric for own in fit.asked.floors]
                                 + [m for m in fit.dense["metrics"] if m.endswith("ppl")]))
    body = [["dense", "", *("1.00" for _ in kinds), *(shown(fit.dense["metrics"].get(m)) for m in metrics), ""]]
    for r in [*plain, *fit.ledger.rounds]:
        why = r.failed or ("yes" if r.kept else "; ".join(r.broken) or "no")
        body.append([r.name.removeprefix("round-"), r.told, *(shown(r.shares.get(kind), ".2f") for kind in kinds),
                     *(shown(r.metrics.get(m)) for m in metrics), why])
    lines += [render(["round", "what", *kinds, *metrics, "floors kept"], body, "terminal",
                     text={"round", "what", "floors kept"})]
    lines += [f"note: {note}" for note in notes(fit)]
    lines += accepted_lines(fit, accepted)
    lines += summary.warnings([record_of(fit.state)]) if accepted else []
    met = fit.met(fit.shares)
    lines += ["target met" if met else f"target not met: {fit.stopped}"]
    tried = next((r for r in reversed(fit.ledger.rounds) if r.plan and not r.kept), None)
    if not met and tried:
        lines += [f"next would be: {tried.told}"]
    return "\n".join([*lines, f"pictures: {fit.ledger.folder / 'fit.svg'}, {fit.ledger.folder / 'candidates.svg'}",
                      f"report: {fit.ledger.folder / 'fit.html'}", f"result: {fit.state.result}"])


def notes(fit: Fit) -> list[str]:
    """What a reader of the table should know."""
    found = [note for r in fit.ledger.rounds for note in r.notes]
    if "latency" in fit.asked.targets:
        told = (fit.table or {}).get("parts", {}).get("decode1", {})
        known = told.get("forms", {})
        lacking = [form for form in (forms.SPARSE, *forms.GRIDS) if form in fit.asked.allow and form not in known]
        found += [f"no kernel for {', '.join(lacking)} in the device's table: no time is gained by them, bytes only"
                  ] * bool(lacking)
        found += ["no time of the output head in the device's table: it stays as it is"] * bool(
            fit.steps.head and known and "head" not in told)
        found += [] if fit.table is None else device_table.warnings(fit.table)
        found += [f"latency: a token by {own}" for own in [(fit.table or {}).get("decoding")] if own]
        found += ["times are foretold by the table of --device, not measured"] * (fit.asked.table is not None)
    unsure = [own.metric for own, row in zip(fit.asked.floors, last_floors(fit), strict=False) if row["worst"] is None]
    found += [f"floors judged by the value alone, without a standard error: {', '.join(unsure)}"] * bool(unsure)
    return list(dict.fromkeys(found))


def last_floors(fit: Fit) -> list[dict]:
    """The judged floors of the last round that has any."""
    return next((r.floors for r in reversed(fit.ledger.rounds) if r.floors), [])


def accepted_lines(fit: Fit, accepted: dict) -> list[str]:
    """The acceptance table of the result: every metric beside the dense model's, floors, damage, answers."""
    if not accepted:
        return ["acceptance: nothing was kept; the result is the dense model"]
    best, body = record_of(fit.state), []
    floors = {own.metric: own.judge(best, fit.dense) for own in fit.asked.floors}
    for metric in dict.fromkeys([*floors, *best["metrics"], *accepted["metrics"]]):
        value = best["metrics"].get(metric, accepted["metrics"].get(metric))
        base, own = fit.dense["metrics"].get(metric), floors.get(metric)
        error = accuracy.difference(best, fit.dense, metric)
        said = "" if error is None else f"{error.value:+.3g} ± {error.stderr:.2g}"
        body.append([metric, shown(base), shown(value), said,
                     "" if own is None else shown(own.worst), "" if own is None else f"{own.sign} {own.bound:.4g}",
                     "" if own is None else "yes" if own.holds else "no"])
    head = ["acceptance", "dense", "result", "difference", "with its error", "floor", "holds"]
    lines = [render(head, body, "terminal", text={"acceptance", "floor", "holds"})]
    lines += (accepted["parts"].get("damage") or {}).get("found", [])
    theirs = (accepted.get("dense") or {}).get("say") or []
    for mine, dense in zip(accepted["parts"].get("say") or [], theirs, strict=False):
        lines += [f"> {mine['prompt']}", f"dense   {dense['answer']}", f"result  {mine['answer']}"]
    return lines


def shown(value: float | None, form: str = ".4g") -> str:
    """A number; empty where there is none."""
    return "" if value is None else format(value, form)
