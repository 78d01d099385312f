"""Room in transformers' cache: keys and values in buffers that hold more tokens than the cache shows.

transformers' own cache copies all keys and values for every token. Here a token is written behind the others, and the
cache shows one position more of the same memory, so that anybody may go on with it.
"""

from typing import Any

import torch

ROOM = 64  # positions by which a cache grows, at least


class Buffers:
    """The keys and values of one DynamicCache with room for more tokens: (1, J, capacity, D) for each block."""

    def __init__(self, cache: Any) -> None:
        self.keys, self.values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        self.length = cache.get_seq_length()
        self.grow()
        self.show(cache, self.length)

    def grow(self) -> None:
        """Move to larger buffers."""
        capacity = max(2 * self.length, self.length + ROOM)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_empty(1, old.shape[1], capacity, old.shape[3])
                tensors[i][:, :, : self.length] = old[:, :, : self.length]
        self.capacity = capacity

    def show(self, cache: Any, length: int) -> None:
        """Let the cache show the first `length` positions."""
        self.length, self.shown = length, []
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            layer.keys, layer.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)
            self.shown += [layer.keys, layer.values]

    def shown_by(self, cache: Any) -> bool:
        """Whether nobody has changed the cache since."""
        held = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return len(held) == len(self.shown) and all(a is b for a, b in zip(held, self.shown, strict=True))


def length(cache: Any, blocks: int, heads: int, size: int, dtype: torch.dtype) -> int:
    """The number of tokens in a cache that room can be made in; 0 for an empty one and for all others.

    blocks, heads, size, dtype: of transformers' DynamicCache, whose keys and values are (1, heads, length, size) in
    each block, all of the text (no sliding window).
    """
    if type(cache).__name__ != "DynamicCache" or len(cache.layers) != blocks:
        return 0
    found = cache.get_seq_length()
    want = (1, heads, found, size)
    plain = found and all(type(layer).__name__ == "DynamicLayer" and layer.keys.shape == layer.values.shape == want
                          and layer.keys.dtype == dtype for layer in cache.layers)
    return found if plain else 0
