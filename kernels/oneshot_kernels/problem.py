"""What `dispatch` decides on, and what it decides."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Problem:
    """What a choice depends on.

    tokens: M. rows, k: the weight's shape; with `swiglu` there are half as many outputs as rows. fragments: whether the
    weight is in fragment order. prefill_copy: whether there is a copy for cuSPARSELt. tiles: whether the weight is in
    tiles for a CPU; threads: how many of them compute there, else 0; native: False if it was cast since. form: of
    integers, "int8", "int4 2:4", with dtype that of the inputs; rounds: whether these are rounded to int8.
    """

    tokens: int
    rows: int
    k: int
    dtype: torch.dtype
    device: torch.device
    fragments: bool = True
    prefill_copy: bool = False
    swiglu: bool = False
    tiles: bool = False
    threads: int = 0
    native: bool = True
    form: str = ""
    rounds: bool = False

    @property
    def key(self) -> str:
        """The key in the table: one entry per weight shape, dtype, epilogue and number of threads."""
        words = [f"{self.rows}x{self.k}", self.form, str(self.dtype).removeprefix("torch."), "swiglu" * self.swiglu,
                 f"threads={self.threads}" if self.threads else ""]
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Choice:
    """The chosen path, its launch parameters (a Config, an algorithm number or None), and the basis of the decision."""

    path: str
    config: Any
    source: str
    reason: str
