"""Cutting in the tests: cuts that leave half of everything, models in which units are zero, plain logits."""

import torch

from oneshot.models import groups
from oneshot.structured import Cut
from oneshot.structured import cut as cuts


def cut_of(model, kinds=None, dropped=()):
    """A Cut that leaves half of each of the kinds (default: all that the family can lose)."""
    known = cuts.kinds(model)
    known = {kind: width for kind, width in known.items() if kinds is not None or kind != groups.QUERIES}
    return Cut(tuple(dropped), tuple((kind, width.count // 2) for kind, width in known.items()
                                     if kinds is None or kind in kinds))


@torch.no_grad()
def zeroed(model, cut, seed=0):
    """Zero random units of every consumer as the cut leaves; in place."""
    gen = torch.Generator().manual_seed(seed)
    for block, width in cuts.consumers(model, cut):
        own = next(w for w in block.weights if w.linear == width.consumer)
        W = own.get().clone().view(own.shape[0], width.segments, width.count, width.size)
        for segment in range(width.segments):
            W[:, segment, torch.randperm(width.count, generator=gen)[cut.left(block, width):]] = 0
        own.set(W.view(own.shape))
    return model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits
