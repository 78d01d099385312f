"""Data: the text that a run calibrates and evaluates on, as windows of tokens.

    sources      read text by its name: built in, from files, from data sets on the hub
    text         documents as they were read, and how they are to be read
    files        .txt .jsonl .json .parquet .csv, as they are or packed (zst: .zst files)
    json_list    the elements of a JSON list, one at a time
    hub          data sets on the Hugging Face hub
    columns      which column of a data set holds the text
    windows      turn text into windows of tokens
    encode       turn documents and conversations into token ids; where a BOS token stands
    embedding    token ids for which the model's embedding has no row
    sample_self  sample text from the model itself
    perturb      add typos and the like to evaluation text
    choose       select what a run's settings ask for
    pieces       the beginning of a training text, parted and tokenised on disk
    training     the text of `--heal-data`, mixed and packed into windows that lie on disk
"""

from .sources import HUB_SETS, TextOptions, Unusable
from .windows import Tokens, calibration, evaluation, given, token_warning

__all__ = ["HUB_SETS", "TextOptions", "Tokens", "Unusable", "calibration", "evaluation", "given", "token_warning"]
