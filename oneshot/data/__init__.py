"""Data: the text a run calibrates on and is measured on, as windows of tokens.

    sources      where text comes from: files, data sets on the hub, the built-in text
    windows      how text becomes windows of tokens
    sample_self  text sampled from the model itself
    perturb      text as people really type it
    choose       which of all this a run's settings ask for
"""

from .sources import HUB_SETS, TextOptions, Unusable
from .windows import Tokens, calibration, evaluation, given, token_warning

__all__ = ["HUB_SETS", "TextOptions", "Tokens", "Unusable", "calibration", "evaluation", "given", "token_warning"]
