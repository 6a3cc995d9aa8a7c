"""What a store will hold, known before it is opened: slabs of tiles, and their bytes."""

from __future__ import annotations

import dataclasses

import torch

Key = tuple[str, int, int]
"""A tile: the slab's name, which of its tensors, the tile's number."""


@dataclasses.dataclass(frozen=True)
class Slab:
    """`count` tensors of (tokens, width), each cut into tiles; `buffers` tiles of them are on the device at once.

    buffers: the tiles that compute holds at one time, and one more for each that should be on its way meanwhile.
    """

    name: str
    width: int
    dtype: torch.dtype
    count: int = 1
    buffers: int = 2

    @property
    def token_bytes(self) -> int:
        return self.width * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """The slabs of one run over `tokens` tokens in tiles of `tile`, the last one shorter where it does not divide."""

    tokens: int
    tile: int
    slabs: tuple[Slab, ...]

    @property
    def n_tiles(self) -> int:
        return -(-self.tokens // self.tile)

    def rows(self, tile: int) -> slice:
        """The tokens of a tile."""
        return slice(tile * self.tile, min((tile + 1) * self.tile, self.tokens))

    def slab(self, name: str) -> Slab:
        return next(s for s in self.slabs if s.name == name)

    @property
    def store_bytes(self) -> int:
        """What the store takes, wherever it is."""
        return sum(s.count * self.tokens * s.token_bytes for s in self.slabs)

    @property
    def buffer_bytes(self) -> int:
        """What the ring of device buffers takes, whatever the number of tokens."""
        return sum(s.buffers * self.tile * s.token_bytes for s in self.slabs)


class Places:
    """Where each tile is in `total` bytes, of a file or of memory: one tensor after the other, each at a multiple of
    `aligned`."""

    def __init__(self, plan: Plan, aligned: int = 1) -> None:
        self._plan, self.total = plan, 0
        self._offsets: dict[tuple[str, int], int] = {}
        for s in plan.slabs:
            for i in range(s.count):
                self._offsets[s.name, i] = self.total
                self.total += -(-plan.tokens * s.token_bytes // aligned) * aligned

    def start(self, key: Key) -> int:
        name, index, tile = key
        return self._offsets[name, index] + self._plan.rows(tile).start * self._plan.slab(name).token_bytes
