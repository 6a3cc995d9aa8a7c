"""Attention of one block over pairs of (query tile, key/value tile) of a sequence that is somewhere else.

Tiles cut the flat axis of all tokens, and a tile may hold the end of one sequence and the start of the next: a pair of
tiles is then attended sequence by sequence. The parts of a row merge by log-sum-exp, as in ring attention (Liu et al.
2023); the backward of a pair needs the row's lse over all keys, not its parts'.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

from torch import Tensor

from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.ops.direct import ops


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The part of a pair of tiles that lies in one sequence: rows of each, and where they begin in the sequence."""

    queries: slice
    keys: slice
    q_start: int
    k_start: int
    sequence: int


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Where a sequence's queries and its keys lie on the flat axis, and its number."""

    queries: slice
    keys: slice
    number: int

    def place(self, query: int) -> int:
        """Where a query, by its place on the flat axis, stands among the keys there."""
        return self.keys.start + query - self.queries.start


class TiledAttend:
    """`DenseAttend` by pairs of tiles. q (t, H * D), k (t, Hkv * D), v (t, Hkv * Dv), o (t, H * Dv), lse and delta
    (1, H, t)."""

    def __init__(self, attend: DenseAttend, layout: Layout, tile: int) -> None:
        self._attend, self._tile, self._tokens = attend, tile, layout.tokens
        self._sequences = _sequences(layout)
        self._starts = [s.queries.start for s in self._sequences]
        self._key_stops = [s.keys.stop for s in self._sequences]

    @property
    def backward_looking(self) -> bool:
        """No query sees a key behind its own tile."""
        return self._attend.window[1] == 0

    def keys_of(self, i: int) -> range:
        """The key tiles that some query of tile i sees, from the first to the last, and tile i itself."""
        left, right = self._attend.window
        first, last = i * self._tile, min((i + 1) * self._tile, self._tokens) - 1
        a, b = self._sequence_of(first), self._sequence_of(last)
        low = a.keys.start if left < 0 else max(a.keys.start, a.place(first) - left)
        high = b.keys.stop if right < 0 else min(b.keys.stop, b.place(last) + right + 1)
        return range(min(low // self._tile, i), max((high - 1) // self._tile, i) + 1)

    def forward(
        self, i: int, j: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: int | None
    ) -> None:
        """Merge key tile j into the running (o, lse) of query tile i: float32 or better.

        They begin as 0 and -inf, or the sinks.
        """
        for piece in self._pieces(i, j):
            rows, keys = piece.queries, piece.keys
            qh, kh = (self._heads(t, s) for t, s in ((q, rows), (k, keys)))
            vh, oh = (self._value_heads(t, s) for t, s in ((v, keys), (o, rows)))
            ops.attention_tile_fwd_(qh, kh, vh, oh, lse[:, :, rows], *self._options(piece, seed))

    def backward(
        self,
        i: int,
        j: int,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        seed: int | None,
    ) -> None:
        """Add the pair's share to dq, dk, dv: float32 or better."""
        for piece in self._pieces(i, j):
            rows, keys = piece.queries, piece.keys
            dq, dk, dv = grads
            ops.attention_tile_bwd_(
                self._value_heads(do, rows),
                self._heads(q, rows),
                self._heads(k, keys),
                self._value_heads(v, keys),
                lse[:, :, rows],
                delta[:, :, rows],
                self._heads(dq, rows),
                self._heads(dk, keys),
                self._value_heads(dv, keys),
                *self._options(piece, seed),
                self._value_heads(o, rows),
            )

    def delta(self, do: Tensor, o: Tensor) -> Tensor:
        rows = slice(0, o.shape[0])
        return ops.attention_delta(self._value_heads(do, rows), self._value_heads(o, rows), None)

    def _heads(self, t: Tensor, rows: slice) -> Tensor:
        return t[rows].view(1, rows.stop - rows.start, -1, self._attend.head_dim)

    def _value_heads(self, t: Tensor, rows: slice) -> Tensor:
        return t[rows].view(1, rows.stop - rows.start, -1, self._attend.value_dim)

    def _options(self, piece: _Piece, seed: int | None) -> tuple[object, ...]:
        a = self._attend
        options = (*a.window, a.softcap, a.scale, piece.q_start, piece.k_start)
        if seed is None or not a.dropout:
            return (*options, None, 0.0, None, 0)
        return (*options, None, a.dropout, seed, piece.sequence)

    def _sequence_of(self, token: int) -> _Sequence:
        return self._sequences[bisect.bisect_right(self._starts, token) - 1]

    def _pieces(self, i: int, j: int) -> Iterator[_Piece]:
        """The sequences that have queries in tile i and keys in tile j."""
        queries, keys = (slice(n * self._tile, min((n + 1) * self._tile, self._tokens)) for n in (i, j))
        at = max(bisect.bisect_right(self._starts, queries.start) - 1, bisect.bisect_right(self._key_stops, keys.start))
        for s in self._sequences[at:]:
            if s.queries.start >= queries.stop or s.keys.start >= keys.stop:
                return
            rows, cols = _common(s.queries, queries), _common(s.keys, keys)
            if rows.start < rows.stop and cols.start < cols.stop:
                places = rows.start - s.queries.start, cols.start - s.keys.start
                yield _Piece(_within(rows, queries), _within(cols, keys), *places, s.number)


def _sequences(layout: Layout) -> list[_Sequence]:
    """The sequences that have queries; one without has a number and nothing to do."""
    cuts = enumerate(zip(*map(itertools.pairwise, layout.numbers), strict=True))
    return [_Sequence(slice(*q), slice(*k), n) for n, (q, k) in cuts if q[1] > q[0]]


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _within(part: slice, whole: slice) -> slice:
    """The part, counted from where the whole begins."""
    return slice(part.start - whole.start, part.stop - whole.start)
