"""Sections of markdown files that programs write, between two markers. Text outside the markers is left alone."""

import re


def replace(text: str, name: str, program: str, content: str) -> str:
    """`text` with `content` as its section `name`; the section is added at the end where there is none.

    program: the path of the program that writes the section; its first marker names it, so that a reader knows whom to
    run. A section that another program has written is replaced too: its marker then names this one.

    Raises ValueError where a section begins and does not end.
    """
    end = f"<!-- {name}: end -->"
    section = f"<!-- {name}: written by {program} -->\n{content}\n{end}"
    begun = re.search(rf"<!-- {re.escape(name)}: written by .*? -->", text)
    if not begun:
        return text + ("\n" if text and not text.endswith("\n\n") else "") + section + "\n"
    before, (_, found, after) = text[:begun.start()], text[begun.end():].partition(end)
    if not found:
        raise ValueError(f"section {name}: no `{end}` after `{begun[0]}`")
    return before + section + after
