"""Report: run records, and everything that is made from them.

A record is the JSON of one run. Tables, pictures and pages are pure functions of records: they can be
made again at any time, on any machine, without a model.

    record      the file: write, read, check, old names
    shape       of what kind each part of a record is
    columns     what a record says: columns, values, names of runs, numbers as text
    storage     what a record says of bytes, and of what is never pruned
    accuracy    two runs' task results: the difference and its standard error
    table       the one writer of tables: terminal, markdown, HTML, csv
    section     the part of a markdown file that a program writes, between two markers
    tables      a line for each run; methods down and patterns across
    task_table  tasks down, runs across
    said        what each model says to the prompts of --say
    figures/    one file for each kind of picture (matplotlib)
    pictures    which of them a page has, with headings and captions
    page        one self-contained HTML page (page.html.j2, page.css)
    details     what that page says about a single run
    summary     what a command prints when it is done
    compare     the command: any runs in one table and one page

Everything re-exported here is in `record`, `columns` and `storage`. In this package import from the files themselves
(`from .columns import columns`): here the name `columns` is the function, no longer the file.
"""

from .columns import (
    Column,
    clean,
    columns,
    flat_settings,
    higher_is_better,
    identity,
    is_dense,
    is_pruned,
    is_rounded,
    is_task,
    labels,
    layer_sparsity,
    like,
    method_of,
    model_names,
    number,
    ordered,
    pattern_key,
    pattern_of,
    percent,
    series,
    setting,
    value,
    variants,
)
from .record import SCHEMA, checked, in_todays_words, read, storable, write
from .storage import left_dense, whole_bytes, whole_sparsity

__all__ = [
    "SCHEMA", "Column", "checked", "clean", "columns", "flat_settings", "higher_is_better", "identity",
    "in_todays_words", "is_dense", "is_pruned", "is_rounded", "is_task", "labels", "layer_sparsity", "left_dense",
    "like", "method_of", "model_names", "number", "ordered", "pattern_key", "pattern_of", "percent", "read", "series",
    "setting", "storable", "value", "variants", "whole_bytes", "whole_sparsity", "write",
]
