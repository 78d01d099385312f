"""One self-contained HTML page of any number of run records: warnings, tables, pictures, every layer.

Needs no torch; matplotlib only for the pictures, and says so on the page where it is missing.
"""

import math
from html import escape

from . import accuracy, task_table
from .record import (
    clean,
    columns,
    flat_settings,
    identity,
    is_dense,
    is_pruned,
    is_rounded,
    is_task,
    labels,
    method_of,
    model_names,
    number,
    ordered,
    pattern_of,
    value,
    write_text,
)
from .tables import html_table, percent, pivot, rows, table

CSS = """
:root { color-scheme: light dark; --ink: #1b1f25; --muted: #69707b; --paper: #ffffff; --sheet: #f5f6f8;
  --grid: #d5d9df; --warn: #8a3800; --warn-paper: #fff3e2; --warn-edge: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --muted: #98a0ac; --paper: #14171b;
  --sheet: #1d2127; --grid: #363c45; --warn: #ffbd85; --warn-paper: #33210f; --warn-edge: #e07b30; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 5rem; max-width: 1100px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 75ch; } .note { color: var(--muted); font-size: .88rem; }
.warn { margin: 1.25rem 0; padding: .7rem 1rem; background: var(--warn-paper); border-radius: 3px;
  border-left: 5px solid var(--warn-edge); overflow-wrap: anywhere; }
.warn h2 { margin: 0 0 .3rem; color: var(--warn); font-size: 1.05rem; }
.warn ul { margin: 0; padding-left: 1.2rem; } .warn li { margin: .3rem 0; } .warn .note { display: block; }
.gap { margin: 1rem 0; } .scroll { overflow: auto; max-width: 100%; } .tall { max-height: 34rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .28rem .7rem; text-align: left; border-bottom: 1px solid var(--grid); white-space: nowrap;
  vertical-align: top; }
th { position: sticky; top: 0; background: var(--paper); font-weight: 600; vertical-align: bottom;
  border-bottom: 2px solid var(--muted); }
.n { text-align: right; } th.n { white-space: normal; }
tbody tr:hover { background: var(--sheet); }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { display: block; }
figure svg text { font-family: inherit !important; fill: currentColor; } figcaption { color: var(--muted);
  font-size: .88rem; max-width: 85ch; margin-top: .4rem; }
details { border-top: 1px solid var(--grid); padding: .45rem 0; } details details { border: 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; } summary .note { font-weight: 400; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .5rem 2.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .12rem 1rem; margin: 0; font-size: .88rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media print { details > * { display: block; } .tall { max-height: none; } }
"""


def html(records, title=None):
    """One self-contained page about one run or several: no script, nothing from elsewhere, all text escaped.

    Without matplotlib a line in the pictures' place says so. Raises ValueError if there are no records.
    """
    if not records:
        raise ValueError("no run records to make a page of")
    records = ordered(records)
    names, several = labels(records), len(records) > 1
    title = clean(title or _describe(records, names))
    body = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(_subtitle(records))}</p>',
            _warnings(records, names), "<h2>Results</h2>", table(records, "html"),
            f'<p class="note">{escape(_legend(records))}</p>']
    if tasks := task_table.table(records, "html"):
        body += ["<h2>Tasks</h2>", tasks]
    if several:
        body += _pivots(records)
    body += _pictures(records)
    body.append(f"<h2>{'The runs' if several else 'The run'}</h2>")
    for i, (record, name) in enumerate(zip(records, names, strict=True)):
        body.append(_run(record, name, i) if several else _details(record))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{escape(title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            f"<style>{CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n")


def of_one(record):
    """The page of a single run."""
    return html([record])


def write_html(records, path, title=None):
    """Write the page of `html` to `path`: whole or not at all."""
    write_text(html(records, title), path)


def _describe(records, names):
    models = list(model_names(records).values())
    what = names[0] if len(records) == 1 else f"{len(records)} pruning runs compared"
    return f"{models[0]}: {what}" if len(models) == 1 else what


def _subtitle(records):
    pruned = [r for r in records if not is_dense(r)]
    counts = {"model": {identity(r) for r in records}, "method": {method_of(r) for r in pruned},
              "pattern": {pattern_of(r) for r in pruned}}
    what = ", ".join(f"{len(s)} {name}{'s' * (len(s) > 1)}" for name, s in counts.items() if s)
    told = [r.get("environment") or {} for r in records]
    dates = sorted({str(e["date"])[:10] for e in told if e.get("date")})
    versions = sorted({str(e["oneshot"]) for e in told if e.get("oneshot")})
    return clean(" · ".join([what if len(records) > 1 else str(records[0].get("run_id")),
                             *([" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else []),
                             *([f"oneshot {', '.join(versions)}"] if versions else [])]))


def _legend(records):
    found = [c for c in columns(records) if not is_task(records, c)]
    heads = [c.header for c in found]
    text = "sparsity: share of the prunable weights that are zero. "
    told = rows(records)
    if any(row["bytes"] is not None for row in told):
        text += "bytes: what the prunable weights take in the smallest simple format of their pattern, of dense. "
    if any(map(is_rounded, records)):
        text += ("rtn int<b>: nothing pruned, plain round-to-nearest codes of b bits, symmetric, a float16 scale for "
                 "each 128 inputs of a row. ")
    if any(" @" in h for h in heads):
        text += "ppl @W: perplexity over windows of W tokens; compare only equal windows. "
    keys = " ".join(k for k in told[0] if k.removesuffix(" / dense").removesuffix(" - dense") in heads)
    text += "/ dense: ratio to the dense model. " if " / dense" in keys else ""
    return text + ("- dense: difference from the dense model." if " - dense" in keys else "")


def _warnings(records, names):
    """The warnings of all runs, each once, with the runs it came from."""
    found = {}
    for record, name in zip(records, names, strict=True):
        status = record.get("status")
        own = [f"not finished: status is {status}"] if status != "finished" else []
        for text in dict.fromkeys([*own, *map(clean, record.get("warnings") or [])]):
            found.setdefault(text, []).append(name)
    if not found:
        return '<p class="note">No warnings.</p>'
    items = []
    for text, runs in found.items():
        where = ", ".join(runs[:8]) + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")
        where = f'<span class="note">{escape(where)}</span>' if len(records) > 1 else ""
        items.append(f"<li>{escape(clean(text))}{where}</li>")
    head = f"{len(found)} warning{'s' * (len(found) > 1)}"
    rest = f"<details><summary>{len(items) - 12} more</summary><ul>{''.join(items[12:])}</ul></details>"
    return (f'<section class="warn" role="alert"><h2>{head}</h2><ul>{"".join(items[:12])}</ul>'
            + rest * (len(items) > 12) + "</section>")


def _pivots(records):
    """Methods down and patterns across, per metric, where there are several of both."""
    pruned = [r for r in records if is_pruned(r)]
    if len({method_of(r) for r in pruned}) < 2 or len({pattern_of(r) for r in pruned}) < 2:
        return []
    shown = [r for r in records if not is_rounded(r)]
    made = [pivot(shown, c.header, "html") for c in columns(shown)
            if "stderr" not in c.metric and not is_task(records, c)]
    made = [f'<div class="gap">{text}</div>' for text in made]
    note = "Bold: the best of the pattern. ±: standard deviation over seeds."
    return ["<h2>By method and pattern</h2>", *made, f'<p class="note">{note}</p>'] if made else []


def _pictures(records):
    """The pictures of the page with their headings; one loud line instead where matplotlib is absent."""
    from . import figures
    from . import figures
    from .figures import drawing, frontier

    made, names = [], model_names(records)

    def add(heading, caption, draw, *args):
        picture, title = drawing.svg(draw(*args), f"f{len(made)}-"), escape(heading)
        made.append(f'<h2>{title}</h2><figure><div role="img" aria-label="{title}">{picture}</div>'
                    f"<figcaption>{escape(caption)}</figcaption></figure>")

    try:
        shown = [r for r in records if not is_rounded(r)]
        if len({pattern_of(r) for r in records if is_pruned(r)}) > 1:
            for column in (c for c in columns(shown) if c.metric.endswith("ppl")):
                add(f"{column.header} against sparsity",
                    "Lower is better. Dashed: the dense model. Hollow: N:M patterns, methods side by side.",
                    figures.fig_perplexity, shown, column.header)
        for key, name in names.items():
            own, of = [r for r in records if identity(r) == key], f", {name}" * (len(names) > 1)
            if any(r.get("layers") for r in own):
                add(f"Error by depth{of}", _error_caption(own), figures.fig_layer_errors, own, records)
                add(f"Zeros by depth{of}", "Share of zeros in each pruned linear.",
                    figures.fig_layer_sparsity, own, records)
        for (key, pattern), own in _damaged(records).items():
            of = f", {names[key]}" * (len(names) > 1)
            add(f"Where the loss increase sits, {clean(pattern)}{of}", _damage_caption(own), figures.fig_damage, own,
                records)
        if tested := list(filter(accuracy.has_tasks, records)):
            add("Tasks", "Dense and pruned models answer the same documents: the table above has their differences.",
                figures.fig_tasks, tested)
        if mapped := [r for r in records if r.get("sensitivity")]:
            add("What must not be touched",
                "Loss increase when this linear alone is pruned and the rest stays dense. White: no increase.",
                frontier.fig_sensitivity, mapped)
        add("Where the time went",
            "collect: forward with statistics; solve: masks, weights; replay: forward with the pruned block.",
            figures.fig_time, records)
    except ImportError as error:
        return [f'<section class="warn"><h2>Pictures left out</h2><p>{escape(str(error))}</p></section>']
    return made


def _damaged(records):
    """{(model, pattern): its records that say where their loss increase sits}."""
    found = {}
    for record in records:
        if (record.get("damage") or {}).get("slices"):
            found.setdefault((identity(record), pattern_of(record)), []).append(record)
    return found


def _damage_caption(records):
    sources = dict.fromkeys(r["damage"].get("frequency_from") for r in records)
    empty = {kind: names for r in records for kind, names in (r["damage"].get("empty") or {}).items()}
    slices = max(len(r["damage"]["slices"]) for r in records)
    told = [f"Dashed: the text as a whole. Bars: 95 % intervals over windows; filled where they leave the whole "
            f"outside, which of {slices} slices about {number(slices / 20, 1)} would do by chance. Crosses: too few "
            f"windows for an interval. Frequency counted in {' or '.join(map(clean, sources))}."]
    told += [f"No token in: {', '.join(map(clean, names))} ({clean(kind)})." for kind, names in empty.items()]
    return " ".join(told)


def _error_caption(records):
    sources = {layer.get("error_from") for r in records for layer in r.get("layers") or []} - {None}
    where = {"gram": "over all calibration tokens", "sample": "on a sample of the calibration tokens"}
    measured = " or ".join(where.get(s, clean(s)) for s in sorted(sources, key=str))
    return ("Relative error: squared change of the linear's output over its squared norm, tr((W−Ŵ)G(W−Ŵ)ᵀ) / "
            f"tr(WGWᵀ){f', {measured}' * bool(measured)}. Line: median; band: range (experts, seeds).")


def _run(record, name, i):
    """The folded details of one run among several."""
    told = [f"{c.header} {number(value(record, c))}" for c in columns([record])][:3]
    told.append(f"{percent(record.get('sparsity'))} zeros")
    note = f'<span class="note">{escape(" · ".join(told))}</span>'
    return f'<details id="run-{i}"><summary>{escape(name)} {note}</summary>{_details(record)}</details>'


def _details(record):
    data = record.get("data") or {}
    spent = {"run id": record.get("run_id"), "peak memory": _bytes(record.get("peak_memory_bytes"))}
    spent |= {k: f"{number(v, 3)} s" for k, v in (record.get("seconds") or {}).items()}
    blocks = [("Settings", dict(flat_settings(record.get("settings") or {}))), ("Model", record.get("model") or {}),
              ("Environment", record.get("environment") or {}), ("Time and memory", spent),
              ("Calibration data", data.get("calibration") or {})]
    blocks += [(f"Evaluation data: {k}", v or {}) for k, v in (data.get("evaluation") or {}).items()]
    facts = "".join(f"<div><h3>{escape(clean(k))}</h3>{_facts(v)}</div>" for k, v in blocks if v)
    return (f'<div class="facts">{facts}</div>{_skipped(record)}{_surplus(record)}{_damage(record)}'
            f'{_sensitivity(record)}{_layers(record)}')


def _facts(pairs):
    items = "".join(f"<dt>{escape(clean(k))}</dt><dd>{escape(_fact(v))}</dd>" for k, v in pairs.items())
    return f"<dl>{items}</dl>"


def _fact(x):
    """A setting as text: whole numbers with thin spaces between thousands, no other number rounded."""
    if isinstance(x, int) and not isinstance(x, bool):
        return f"{x:,}".replace(",", "\u2009") if abs(x) >= 10000 else str(x)
    if isinstance(x, (list, tuple)):
        return ", ".join(map(_fact, x))
    return "-" if x is None else clean(x)


def _bytes(n):
    if n is None:
        return "-"
    power = min(4, max(0, int(math.log10(max(n, 1)) // 3)))
    return f"{number(n / 1000.0**power, 3)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _skipped(record):
    items = record.get("skipped") or []
    if not items:
        return ""
    body = [[clean(s.get("name")), clean(s.get("reason"))] for s in items]
    head = f"<h3>Skipped: {len(items)} tensor{'s' * (len(items) > 1)} not pruned</h3>"
    return head + html_table(["tensor", "reason"], body, [True, True], "tall")


def _surplus(record):
    """The layers that hold more zeros than were asked for."""
    layers = [x for x in record.get("layers") or [] if x.get("surplus")]
    if not layers:
        return ""
    keys = ("target_zeros", "zeros", "surplus")
    body = [[clean(x.get("name")), *(_fact(x.get(k)) for k in keys)] for x in layers]
    head = ["layer", "asked for", "stored", "surplus"]
    return (f"<h3>Surplus zeros in {len(layers)} layer{'s' * (len(layers) > 1)}</h3>"
            + html_table(head, body, [True, False, False, False], "tall")
            + '<p class="note">Dead inputs, weights that were zero before, or underflow.</p>')


def _damage(record):
    """Which slices lost more than the whole, in words; the tokens and passages hurt most."""
    found = record.get("damage") or {}
    if not found:
        return ""
    told = "".join(f"<li>{escape(clean(text))}</li>" for text in found.get("found") or [])
    text = "<h3>Where the loss increase sits</h3>" + (
        f"<ul>{told}</ul>" if told else '<p class="note">No slice of the text lost more than the whole.</p>')
    if rows := found.get("tokens"):
        body = [[repr(t["token"])[1:-1].replace(" ", "␣"), _fact(t["count"]), number(t["increase"], 3),
                 number(t["excess"], 3)] for t in rows]
        text += "<h3>Tokens hurt most</h3>" + html_table(
            ["token", "times", "mean increase (nats)", "beyond the mean (nats)"], body, [True] + [False] * 3, "tall")
    if rows := found.get("passages"):
        places = [f"{clean(p['text'])}, window {p['window']}, from token {p['position']}: {number(p['increase'], 3)} "
                  "nats a token" for p in rows]
        items = "".join(f'<li>{escape(clean(p["passage"]))} <span class="note">{escape(place)}</span></li>'
                        for p, place in zip(rows, places, strict=True))
        text += f"<h3>Passages hurt most</h3><ol>{items}</ol>"
    return text


def _sensitivity(record):
    """What was pruned alone, the most harmful first."""
    if not (ranked := record.get("sensitivity")):
        return ""
    body = [[clean(row["name"]), number(row["loss_increase"], 3), number(row.get("relative_error"), 3),
             _fact(row.get("weights"))] for row in ranked]
    return "<h3>What must not be touched</h3>" + html_table(
        ["pruned alone", "loss increase (nats a token)", "relative error", "weights"], body, [True] + [False] * 3,
        "tall")


def _layers(record):
    layers = record.get("layers") or []
    if not layers:
        return ""
    from .figures import layer_sparsity

    body = [[clean(x.get("name")), " × ".join(map(str, x.get("shape") or [])), clean(x.get("pattern")),
             percent(layer_sparsity(x)), _fact(x.get("zeros")), number(x.get("relative_error"), 3),
             number(x.get("seconds"), 2), _info(x.get("info") or {})]
            for x in layers]
    head = ["layer", "shape", "pattern", "zeros", "zeros (count)", "relative error", "seconds", "info"]
    table_html = html_table(head, body, [h in ("layer", "shape", "pattern", "info") for h in head], "tall")
    return f"<details><summary>All {len(layers)} layers</summary>{table_html}</details>"


def _info(info):
    told = {clean(k): number(v, 3) if isinstance(v, float) else clean(v) for k, v in info.items()}
    return ", ".join(f"{k} {v}" for k, v in told.items())
