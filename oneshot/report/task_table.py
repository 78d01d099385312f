"""The table of lm-eval tasks: tasks down, runs across, each run against the dense run of its model."""

from html import escape

from . import accuracy
from .columns import columns, identity, is_task, labels, like, model_names, number, ordered, value
from .table import render
from .tables import task_difference

LEGEND = ("In brackets: minus dense ± its standard error, paired document by document unless it says unpaired; ~ "
          "within two standard errors of dense, as 19 of 20 would be without any effect. ° not above chance (a uniform "
          "guess) by more than two standard errors: {guesses} of {values} values. Dense: ± its own standard error.")


def table(records: list[dict], fmt: str = "terminal") -> str:
    """The table and what its marks mean, one table for each model; "" where no task was measured.

    fmt: as in table.render. Tasks that are part of a group are left out (the csv of tables.table has them).
    """
    records = list(filter(accuracy.has_tasks, ordered(records)))
    models = model_names(records)
    parts, guesses = [], []
    for key, name in models.items():
        own = [r for r in records if identity(r) == key]
        found = [c for c in columns(own) if is_task(own, c) and not accuracy.is_member(own, c.metric)]
        head = ["task" if len(models) == 1 else f"{name}: task", "documents", "chance", *labels(own)]
        body = []
        for c in found:
            info = next(accuracy.how(r, c.metric) for r in own if value(r, c) is not None)
            body.append([c.header, number(info.get("samples")), _share(info.get("chance")),
                         *(_cell(own, r, c) for r in own)])
            guesses += [accuracy.no_better_than_chance(r, c.metric) for r in own
                        if value(r, c) is not None and accuracy.how(r, c.metric).get("chance") is not None]
        parts.append(render(head, body, fmt, text={head[0]}))
    if not parts:
        return ""
    legend = LEGEND.format(guesses=sum(guesses), values=len(guesses))
    return "\n".join([*parts, f'<p class="note">{escape(legend)}</p>' if fmt == "html" else legend + "\n"])


def _cell(records, record, column):
    """"0.412° (-0.021 ± 0.008 ~)"."""
    x = value(record, column)
    text = _share(x) + "°" * accuracy.no_better_than_chance(record, column.metric)
    found = task_difference(records, record, column)
    stderr = accuracy.how(record, column.metric).get("stderr")
    if x is None or (found is None and stderr is None):
        return text
    if found is None:
        return f"{text} ± {like(_share(x), stderr)}"
    marks = " unpaired" * (not found.paired) + " ~" * found.within_noise
    sign = "+" if found.value > 0 else "-" if found.value < 0 else ""
    return f"{text} ({sign}{like(_share(x), abs(found.value))} ± {like(_share(x), found.stderr)}{marks})"


def _share(x):
    """An accuracy with three decimals; a value outside 0 to 1 like any other number."""
    return f"{x:.3f}" if isinstance(x, float) and 0 <= x <= 1 else number(x)
