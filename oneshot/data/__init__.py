"""Data: the text that a run calibrates and evaluates on, as windows of tokens.

    sources      read text from files, data sets on the hub, and the built-in text
    windows      turn text into windows of tokens
    sample_self  sample text from the model itself
    perturb      add typos and the like to evaluation text
    choose       select what a run's settings ask for
"""

from .sources import HUB_SETS, TextOptions, Unusable
from .windows import Tokens, calibration, evaluation, given, token_warning

__all__ = ["HUB_SETS", "TextOptions", "Tokens", "Unusable", "calibration", "evaluation", "given", "token_warning"]
