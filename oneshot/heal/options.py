"""Flags of healing on text of one's own, shared by `--heal full` and `--heal lora`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..data.choose import check_least
from ..data.training import mixture
from ..runtime.flag import flag, listed

HOTTEST = 100  # at which all of the likeliest tokens are as likely
LOSSES = ("next", "kl", "hidden")  # see heal/text/losses.py
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # transformers' own name for the folder of TensorBoard's logs


@dataclass(frozen=True)
class HealOptions:
    """See heal/text/__init__.py."""

    heal_data: str | None = flag(None, "text that --heal full and lora train on, as for --calibration; several by "
                                       "commas, with weights: 0.7*c4,0.3*a.txt; self: sampled from the dense "
                                       "model", section="healing on text", preset=True,
                                 added=True)
    heal_tokens: str = flag("1M", "how many tokens of it: 500k, 20M, 1B", section="healing on text", preset=True,
                            added=True)
    heal_held_out: str | None = flag(None, "text whose loss decides which state is kept and when to stop (default: a "
                                           "part of --heal-data that is not trained on)", section="healing on text",
                                     preset=True, added=True)
    heal_loss: str = flag("kl", "kl: towards the dense model's predictions; next: the next token; hidden: towards the "
                                "dense model's hidden states; several by commas are added", section="healing on text",
                          preset=True, added=True)
    heal_temperature: float = flag(1.0, "temperature of kl", section="healing on text", preset=True, added=True)
    heal_top_k: int | None = flag(None, "kl counts the dense model's so many likeliest tokens, and all others as one "
                                        "(default: all; 64 with --heal-cache)", section="healing on text", preset=True,
                                  added=True)
    heal_cache: str | None = flag(None, "folder for the dense model's predictions: computed once, then read by every "
                                        "run on the same text, without the dense model in memory",
                                  section="healing on text", bears_on="output", added=True)
    heal_teacher: str | None = flag(None, "the dense model (default: --model as it is before pruning)",
                                    section="healing on text", preset=True, added=True)
    heal_batch: int = flag(1024, "tokens per update", section="healing on text", preset=True, added=True)
    heal_seqlen: int = flag(512, "tokens per window", section="healing on text", preset=True, added=True)

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        if self.heal_data is not None:
            mixture(self.heal_data)
        count(self.heal_tokens)
        check_least(self, {"heal_top_k": 1, "heal_batch": 1, "heal_seqlen": 2})
        unknown = [name for name in listed(self.heal_loss) if name not in LOSSES]
        if unknown or not listed(self.heal_loss):
            raise ValueError(f"--heal-loss {self.heal_loss}: give {', '.join(LOSSES)}, or several by commas")
        if not 0 < self.heal_temperature <= HOTTEST:
            raise ValueError(f"--heal-temperature {self.heal_temperature:g}: must be above 0, and at most {HOTTEST}")
        if self.heal_cache is not None and (not self.heal_cache or Path(self.heal_cache).is_file()):
            raise ValueError(f"--heal-cache {self.heal_cache}: give a folder")
        if self.heal_cache is not None and "hidden" in listed(self.heal_loss):
            raise ValueError("--heal-cache: holds predictions, no hidden states; use --heal-loss kl with it")


def count(text: str, flag: str = "--heal-tokens") -> int:
    """The number written as "500k", "20M" or "1B". Raises ValueError naming the flag."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", str(text))
    found = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else 0
    found = round(found) if found < math.inf else 0
    if found < 1:
        raise ValueError(f"{flag} {text}: give a number such as 500k, 20M or 1B")
    return found
