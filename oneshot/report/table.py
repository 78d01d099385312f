"""The one writer of tables: cells in, text for a terminal, markdown, HTML or csv out.

    >>> rows = [["wanda", "12.5"], ["alps", Bold("9.75")]]
    >>> print(render(["method", "ppl"], rows, "markdown", text={"method"}), end="")
    | method |      ppl |
    | ------ | -------: |
    | wanda  |     12.5 |
    | alps   | **9.75** |

It knows nothing of records and does not round: the caller makes the cells (columns.number rounds). Characters with a
meaning in markdown or HTML are escaped here, so give plain text. `Bold` and `Prose` are cells set in their own way.
"""

import csv
import io
from collections.abc import Collection, Sequence
from html import escape

FORMATS = ("terminal", "markdown", "html", "csv")
WIDTH = 120  # characters of a table in the terminal; a wider one is continued below


class Bold(str):
    """A cell to be set in bold where the format can (markdown, HTML)."""


class Prose(str):
    """A cell of running text, which HTML breaks into lines."""


def render(head: Sequence[str], body: Sequence[Sequence], fmt: str, text: Collection[str] = ()) -> str:
    """A table as text that ends with a newline (HTML: one element, no newline).

    head: the names of the columns. body: the rows, as many cells each as `head`; cells are strings, for csv anything
    that `str` turns into text. fmt: "terminal", "markdown", "html" or "csv". text: the names of the columns that hold
    words: they are aligned to the left, all others to the right, like numbers.

    terminal: a table wider than WIDTH is split into several, one below the other; the text columns before the first
    column of numbers are repeated in each. csv: the values in full, comma separated, no alignment.

    Raises ValueError for any other format.
    """
    if fmt == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *body])
        return out.getvalue()
    left = [name in text for name in head]
    if fmt == "html":
        return _html(head, body, left)
    if fmt not in FORMATS:
        raise ValueError(f"table format {fmt}: give terminal, markdown, csv or html")
    written = _markdown_cell if fmt == "markdown" else str
    cells = [[written(c) for c in line] for line in [head, *body]]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(head))]
    lines = [[c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(line, widths, left, strict=True)]
             for line in cells]
    return _markdown(lines, widths, left) if fmt == "markdown" else _terminal(lines, widths, left)


def _terminal(lines, widths, left):
    lines.insert(1, ["-" * w for w in widths])
    names = next((i for i, is_left in enumerate(left) if not is_left), len(left))
    return "\n".join("".join("  ".join(line[i] for i in part).rstrip() + "\n" for line in lines)
                     for part in _split(widths, names))


def _split(widths, names):
    """[[column, ...], ...]: the columns of each of the tables that fit WIDTH, the first `names` columns in all."""
    parts, repeated = [], list(range(names))
    for i in range(names, len(widths)):
        if not parts or sum(widths[j] + 2 for j in [*parts[-1], i]) > WIDTH:
            parts.append(repeated.copy())
        parts[-1].append(i)
    return parts or [repeated]


def _markdown(lines, widths, left):
    lines.insert(1, ["-" * (w - 1) + "-:"[not is_left] for w, is_left in zip(widths, left, strict=True)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _markdown_cell(cell):
    text = cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return f"**{text}**" if isinstance(cell, Bold) else text


def _html(head, body, left):
    """A <table> in a <div class="scroll">; cells of numbers have the class "n"."""
    lines = ["".join(_html_cell(tag, c, is_left) for c, is_left in zip(line, left, strict=True))
             for tag, line in [("th", head), *(("td", line) for line in body)]]
    return (f'<div class="scroll"><table><thead><tr>{lines[0]}</tr></thead><tbody>'
            + "\n".join(f"<tr>{line}</tr>" for line in lines[1:]) + "</tbody></table></div>")


def _html_cell(tag, content, is_left):
    unbroken = content.replace(" ", "\u00a0") if tag == "th" and len(content) < 9 else content
    text = f"<b>{escape(unbroken)}</b>" if isinstance(content, Bold) else escape(unbroken)
    kind = "words" if isinstance(content, Prose) else "" if is_left else "n"
    return f'<{tag} class="{kind}">{text}</{tag}>' if kind else f"<{tag}>{text}</{tag}>"
