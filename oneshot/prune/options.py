"""Options: how pruning is computed. What is computed is given by the plan and the chain of solvers."""

import math
from dataclasses import dataclass, replace

import torch

from ..runtime import distributed, environment
from ..runtime.flag import flag

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """Flags of the block loop.

    device: "auto" is resolved when the Options are made, to a GPU if there is one, else to the CPU.
    """

    true_sequential: bool = flag(False, "prune q,k,v, then o, then gate,up, then down, each on the outputs of those "
                                        "pruned before it", section="what", preset=True)
    dense_target: float = flag(0.0, "0 to 1: how far each linear layer aims at its output in the dense model, instead "
                                    "of at its dense weight's output on the pruned model's inputs (try 0.5)",
                               section="what", preset=True)
    stop_on_collapse: bool = flag(False, "stop with an error at the first block whose output collapses (error, norm or "
                                         "effective dimensions out of bounds); without this flag it is a warning",
                                  section="what")
    device: str = flag("auto", "where blocks are computed, one at a time: auto (a GPU if there is one), cpu, cuda, "
                               "cuda:1", section="machine", bears_on="loading", shown=False)
    batch_size: int = flag(8, "windows per batch; with --heal at most as many as hold 512 tokens", section="machine")
    activations: str | None = flag(None, "device that holds the activations between blocks (default: --device)",
                                   section="machine")
    activation_dtype: str | None = flag(None, "dtype in which activations are held between blocks (default: as "
                                              "computed)", section="machine", choices=DTYPES)
    gram_budget: float = flag(4.0, "GiB of Gram matrices to collect at once; beyond that, further passes are made",
                              section="machine")
    compute: str = flag("auto", "dtype in which a CPU computes: auto, float32; stored, that of the weights, as on a "
                                "GPU (several times as fast in bfloat16 where the CPU has AMX; the numbers move)",
                        section="machine", bears_on="loading", python=True, added=True,
                        choices=("auto", "stored"))
    tf32: bool = flag(False, "allow TF32 products on the GPU: faster, 10 bits of mantissa", section="machine")
    layer_errors: bool = flag(True, "measure the output error of every linear layer, on a sample of 256 tokens",
                              section="machine")
    progress: bool = flag(True, "show progress bars", section="output", bears_on="output", python=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", environment.resolve_device(self.device))
        self.check()

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: must be at least 1")
        if not 0 < self.gram_budget < math.inf:
            raise ValueError(f"--gram-budget {self.gram_budget:g}: must be a positive number of GiB")
        if not 0 <= self.dense_target <= 1:
            raise ValueError(f"--dense-target {self.dense_target:g}: give a share from 0 to 1")

    @property
    def here(self) -> "Options":
        """For this of several processes: its own device; only rank 0 shows progress."""
        return replace(self, device=distributed.device(self.device),
                       progress=self.progress and distributed.rank() == 0)

    @property
    def gram_bytes(self) -> int:
        """`gram_budget` in bytes."""
        return int(self.gram_budget * 2**30)

    @property
    def waiting_dtype(self) -> torch.dtype | None:
        """`activation_dtype` as a torch.dtype; None: as computed."""
        return getattr(torch, self.activation_dtype) if self.activation_dtype else None
