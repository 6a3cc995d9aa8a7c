"""Attention of one block over pairs of (range of queries, range of keys) of the flat axis of all tokens.

A range may hold the end of one sequence and the start of the next: a pair of ranges is then attended sequence by
sequence. The parts of a row merge by log-sum-exp, as in ring attention (Liu et al. 2023); the backward of a pair needs
the row's lse over all keys, not its parts'.
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
    """The part of a pair of ranges that lies in one sequence: rows of each, and where they begin in the sequence."""

    queries: slice
    keys: slice
    q_start: int
    k_start: int
    sequence: int


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Where a sequence's queries and its keys lie on the flat axis, and its number."""

    queries: slice
    keys: slice
    number: int

    def place(self, query: int) -> int:
        """Where a query, by its place on the flat axis, stands among the keys there."""
        return self.keys.start + query - self.queries.start


class PairAttend:
    """`DenseAttend` by pairs of ranges, given by their places on the flat axis. q (t, H * D), k (t, Hkv * D), v
    (t, Hkv * Dv), o (t, H * Dv), lse and delta (1, H, t), of the tokens of a range."""

    def __init__(self, attend: DenseAttend, layout: Layout) -> None:
        self._attend = attend
        self._sequences = _sequences(layout)
        self._starts = [s.queries.start for s in self._sequences]
        self._key_stops = [s.keys.stop for s in self._sequences]

    def sequence_of(self, token: int) -> Sequence:
        """The sequence that has this query, by its place on the flat axis."""
        return self._sequences[bisect.bisect_right(self._starts, token) - 1]

    def forward(
        self, queries: slice, keys: slice, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: int | None
    ) -> None:
        """Merge the keys into the queries' running (o, lse): float32 or better.

        They begin as 0 and -inf, or the sinks.
        """
        for piece in self._pieces(queries, keys):
            rows, cols = piece.queries, piece.keys
            qh, kh = (self._heads(t, s) for t, s in ((q, rows), (k, cols)))
            vh, oh = (self._value_heads(t, s) for t, s in ((v, cols), (o, rows)))
            ops.attention_tile_fwd_(qh, kh, vh, oh, lse[:, :, rows], *self._options(piece, seed))

    def backward(
        self,
        queries: slice,
        keys: slice,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor | None,
        lse: Tensor,
        delta: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
        seed: int | None,
    ) -> None:
        """Add the pair's share to dq, dk, dv: float32 or better.

        o: None where delta is not made of it alone, since lse has a gradient too.
        """
        for piece in self._pieces(queries, keys):
            rows, cols = piece.queries, piece.keys
            dq, dk, dv = grads
            ops.attention_tile_bwd_(
                self._value_heads(do, rows),
                self._heads(q, rows),
                self._heads(k, cols),
                self._value_heads(v, cols),
                lse[:, :, rows],
                delta[:, :, rows],
                self._heads(dq, rows),
                self._heads(dk, cols),
                self._value_heads(dv, cols),
                *self._options(piece, seed),
                None if o is None else self._value_heads(o, rows),
            )

    def delta(self, do: Tensor, o: Tensor, dlse: Tensor | None = None) -> Tensor:
        rows = slice(0, o.shape[0])
        return ops.attention_delta(self._value_heads(do, rows), self._value_heads(o, rows), dlse)

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

    def _pieces(self, queries: slice, keys: slice) -> Iterator[_Piece]:
        """The sequences that have queries in one range and keys in the other that some of those see."""
        at = max(bisect.bisect_right(self._starts, queries.start) - 1, bisect.bisect_right(self._key_stops, keys.start))
        for s in self._sequences[at:]:
            if s.queries.start >= queries.stop or s.keys.start >= keys.stop:
                return
            rows, cols = _common(s.queries, queries), _common(s.keys, keys)
            if rows.start < rows.stop and cols.start < cols.stop and self._sees(s, rows, cols):
                places = rows.start - s.queries.start, cols.start - s.keys.start
                yield _Piece(_within(rows, queries), _within(cols, keys), *places, s.number)

    def _sees(self, s: Sequence, rows: slice, cols: slice) -> bool:
        """Some of these queries of the sequence see some of these keys."""
        left, right = self._attend.window
        first, last = s.place(rows.start), s.place(rows.stop - 1)
        return (left < 0 or cols.stop - 1 >= first - left) and (right < 0 or cols.start <= last + right)


def _sequences(layout: Layout) -> list[Sequence]:
    """The sequences that have queries; one without has a number and nothing to do."""
    cuts = enumerate(zip(*map(itertools.pairwise, layout.numbers), strict=True))
    return [Sequence(slice(*q), slice(*k), n) for n, (q, k) in cuts if q[1] > q[0]]


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _within(part: slice, whole: slice) -> slice:
    """The part, counted from where the whole begins."""
    return slice(part.start - whole.start, part.stop - whole.start)
