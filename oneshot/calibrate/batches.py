"""Batches: which windows run together, and which batches each of several processes has (runtime/together.py).

A process has some of the batches that a single one would have, with the same windows: of those held out and of the
others, the first ones go to rank 0, and so on.
"""

from collections.abc import Sequence

import torch

from ..runtime import distributed


def batches(n: int, size: int, held_out: Sequence[int] = ()) -> list[tuple[torch.Tensor, bool]]:
    """Divide n windows, in order, into batches of at most `size`: [(window numbers, whether they are held out)].

    Held-out windows come last, in batches of their own. With any held out, batches have nearly equal sizes, because in
    training a small last batch would give its windows more weight than the others.
    """
    if not len(held_out):
        return [(part, False) for part in torch.arange(n).split(size)]
    held = torch.zeros(n, dtype=torch.bool)
    held[list(held_out)] = True
    return [(part, kind) for kind in (False, True) if (windows := (held == kind).nonzero()[:, 0]).numel()
            for part in windows.tensor_split(-(-len(windows) // size))]


def own(found: list[tuple[torch.Tensor, bool]]) -> list[tuple[torch.Tensor, bool]]:
    """This process's part of the `batches`."""
    kinds = ([batch for batch in found if batch[1] == kind] for kind in (False, True))
    return [batches[i] for batches in kinds for i in distributed.part(len(batches))]


def check_parts(n: int, size: int, held_out: Sequence[int] = ()) -> None:
    """Raise ValueError naming the flags if some process would get none of the batches of n windows."""
    known = sum(not held for _, held in batches(n, size, held_out))
    if known < distributed.ranks():
        apart = f" ({len(held_out)} held out)" if len(held_out) else ""
        raise ValueError(f"torchrun: {n} calibration windows{apart} are {known} batches of at most {size}, too few for "
                         f"{distributed.ranks()} processes; raise --nsamples or lower --batch-size")
