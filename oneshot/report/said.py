"""What each model says to the prompts of `--say`: prompt by prompt, one answer for each run."""

import textwrap
from html import escape

from .columns import clean, labels, ordered
from .table import Prose, render

WIDTH = 110  # characters of a line


def table(records: list[dict], fmt: str = "terminal") -> str:
    """Every prompt with every run's answer below it, the runs in the order of the other tables; "" without any.

    fmt: "terminal", "markdown" (a code block) or "html".
    """
    records, answers = ordered([r for r in records if r.get("say")]), {}
    for record, name in zip(records, labels(records), strict=True):
        for entry in record["say"]:
            answers.setdefault(clean(entry["prompt"]), []).append((name, clean(entry["answer"]) or "(nothing)"))
    text = "\n".join((_html if fmt == "html" else _plain)(prompt, found) for prompt, found in answers.items())
    return f"```\n{text}```\n" if text and fmt == "markdown" else text


def _plain(prompt, answers):
    """The prompt, then a paragraph for each run."""
    width, lines = max(len(name) for name, _ in answers), [f"> {prompt}"]
    for name, text in answers:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{name:<{width}}  ", subsequent_indent=" " * (width + 2))
    return "\n".join(lines) + "\n"


def _html(prompt, answers):
    """The prompt as a heading, then a table."""
    rows = [[name, Prose(text)] for name, text in answers]
    return f"<h3>{escape(prompt)}</h3>\n" + render(["run", "answer"], rows, "html", text={"run", "answer"})
