"""Attention of one block over pairs of (range of queries, range of keys) of the flat axis of all tokens.

A range may hold the end of one sequence and the start of the next: a pair of ranges is then attended sequence by
sequence, but for those that lie in it whole, which are attended together. The parts of a row merge by log-sum-exp, as
in ring attention (Liu et al. 2023); the backward of a pair needs the row's lse over all keys, not its parts'.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
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
class _Together:
    """Sequences that lie in a pair of ranges whole: rows of each, and the starts of the sequences among those."""

    queries: slice
    keys: slice
    starts: tuple[Tensor, Tensor]


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
        self._attend, self._layout = attend, layout
        self._sequences = _sequences(layout)
        self._starts = [s.queries.start for s in self._sequences]
        self._stops = [s.queries.stop for s in self._sequences]
        self._key_starts = [s.keys.start for s in self._sequences]
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
        whole = self._whole(queries, keys, seed)
        if whole:
            self._forward_together(self._together(whole, queries, keys, q.device), q, k, v, o, lse)
        for piece in self._pieces(queries, keys, whole):
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
        whole = range(0) if o is None else self._whole(queries, keys, seed)
        if whole and o is not None:
            them = self._together(whole, queries, keys, q.device)
            self._backward_together(them, do, q, k, v, o, lse, delta, grads)
        for piece in self._pieces(queries, keys, whole):
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

    def _forward_together(self, them: _Together, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
        rows, cols = them.queries, them.keys
        qh, kh, vh = self._heads(q, rows)[0], self._heads(k, cols)[0], self._value_heads(v, cols)[0]
        part_o, part_lse = ops.attention_fwd(qh, kh, vh, *self._options_together(them))
        ops.attention_merge_(self._value_heads(o, rows), lse[:, :, rows], part_o[None], part_lse[None])

    def _backward_together(
        self,
        them: _Together,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        rows, cols = them.queries, them.keys
        doh, qh, kh = self._value_heads(do, rows)[0], self._heads(q, rows)[0], self._heads(k, cols)[0]
        vh, oh = self._value_heads(v, cols)[0], self._value_heads(o, rows)[0]
        sums = lse[0, :, rows].contiguous(), delta[0, :, rows].contiguous()
        made = ops.attention_bwd(doh, qh, kh, vh, oh, sums[0], None, *self._options_together(them), sums[1])
        for total, part, where in zip(grads, made, (rows, cols, cols), strict=True):
            total[where] += part.flatten(1)

    def _heads(self, t: Tensor, rows: slice) -> Tensor:
        return t[rows].view(1, rows.stop - rows.start, t.shape[1] // self._attend.head_dim, self._attend.head_dim)

    def _value_heads(self, t: Tensor, rows: slice) -> Tensor:
        return t[rows].view(1, rows.stop - rows.start, t.shape[1] // self._attend.value_dim, self._attend.value_dim)

    def _options(self, piece: _Piece, seed: int | None) -> tuple[object, ...]:
        a = self._attend
        options = (*a.window, a.softcap, a.scale, piece.q_start, piece.k_start)
        if seed is None or not a.dropout:
            return (*options, None, 0.0, None, 0)
        return (*options, None, a.dropout, seed, piece.sequence)

    def _options_together(self, them: _Together) -> tuple[Any, ...]:
        a = self._attend
        return *them.starts, *a.window, a.softcap, a.scale, None, None, 0.0, None, self._layout.apart

    def _whole(self, queries: slice, keys: slice, seed: int | None) -> range:
        """The places among the sequences of those that lie in both ranges, where several can be attended together.

        Dropout draws by a sequence's number in the batch, and shares that a sink makes smaller would be rounded twice.
        """
        if (seed is not None and self._attend.dropout) or self._attend.sinks is not None:
            return range(0)
        first = max(bisect.bisect_left(self._starts, queries.start), bisect.bisect_left(self._key_starts, keys.start))
        stops = bisect.bisect_right(self._stops, queries.stop), bisect.bisect_right(self._key_stops, keys.stop)
        return range(first, min(stops)) if min(stops) - first > 1 else range(0)

    def _together(self, whole: range, queries: slice, keys: slice, device: torch.device) -> _Together:
        first, last = self._sequences[whole[0]], self._sequences[whole[-1]]
        rows, cols = slice(first.queries.start, last.queries.stop), slice(first.keys.start, last.keys.stop)
        of_queries, of_keys = self._layout.starts
        if of_queries is None or of_keys is None:
            starts = torch.arange(0, rows.stop - rows.start + 1, self._layout.seq, dtype=torch.int32, device=device)
            return _Together(_within(rows, queries), _within(cols, keys), (starts, starts))
        numbers = slice(first.number, last.number + 2)
        starts = of_queries[numbers] - rows.start
        key_starts = of_keys[numbers] - cols.start if self._layout.apart else starts
        return _Together(_within(rows, queries), _within(cols, keys), (starts, key_starts))

    def _pieces(self, queries: slice, keys: slice, without: range) -> Iterator[_Piece]:
        """The sequences that have queries in one range and keys in the other that some of those see, but for those at
        these places."""
        at = max(bisect.bisect_right(self._starts, queries.start) - 1, bisect.bisect_right(self._key_stops, keys.start))
        for place, s in enumerate(self._sequences[at:], at):
            if s.queries.start >= queries.stop or s.keys.start >= keys.stop:
                return
            if place in without:
                continue
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
