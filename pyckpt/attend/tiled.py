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

import torch
from torch import Tensor

from pyckpt.attend.dense import DenseAttend, Layout

ops = torch.ops.pyckpt


@dataclasses.dataclass(frozen=True)
class _Piece:
    """The part of a pair of tiles that lies in one sequence: rows of each, and where they begin in the sequence."""

    queries: slice
    keys: slice
    q_start: int
    k_start: int
    sequence: int


class TiledAttend:
    """`DenseAttend` by pairs of tiles. q, o (t, H * D), k, v (t, Hkv * D), lse and delta (1, H, t)."""

    def __init__(self, attend: DenseAttend, layout: Layout, tile: int) -> None:
        for what, given in (("sinks", attend.sinks), ("values of another head dim than keys", attend.v_head_dim)):
            if given is not None:
                raise ValueError(f"attention with {what} cannot be streamed; run these blocks without stream=")
        self._attend, self._tile, self._tokens = attend, tile, layout.tokens
        cu = layout.cu_seqlens
        starts = range(0, layout.tokens + 1, layout.seq) if cu is None else cu.tolist()
        # An empty sequence has a number and no tokens.
        self._sequences = [(a, b, n) for n, (a, b) in enumerate(itertools.pairwise(starts)) if b > a]
        self._starts = [a for a, _, _ in self._sequences]

    @property
    def backward_looking(self) -> bool:
        """No query sees a key behind its own tile."""
        return self._attend.window[1] == 0

    def keys_of(self, i: int) -> range:
        """The key tiles that some query of tile i sees."""
        left, right = self._attend.window
        first, last = i * self._tile, min((i + 1) * self._tile, self._tokens) - 1
        start, end = self._sequence_of(first)[0], self._sequence_of(last)[1]
        low = start if left < 0 else max(start, first - left)
        high = end if right < 0 else min(end, last + right + 1)
        return range(low // self._tile, (high - 1) // self._tile + 1)

    def forward(
        self, i: int, j: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: int | None
    ) -> None:
        """Merge key tile j into the running (o, lse) of query tile i: float32 or better, from 0 and -inf."""
        for piece in self._pieces(i, j):
            rows, keys = piece.queries, piece.keys
            qh, kh, vh, oh = (self._heads(t, s) for t, s in ((q, rows), (k, keys), (v, keys), (o, rows)))
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
            cut = ((do, rows), (q, rows), (k, keys), (v, keys))
            into = zip(grads, (rows, keys, keys), strict=True)
            ops.attention_tile_bwd_(
                *(self._heads(t, s) for t, s in cut),
                lse[:, :, rows],
                delta[:, :, rows],
                *(self._heads(t, s) for t, s in into),
                *self._options(piece, seed),
                self._heads(o, rows),
            )

    def delta(self, do: Tensor, o: Tensor) -> Tensor:
        rows = slice(0, o.shape[0])
        return ops.attention_delta(self._heads(do, rows), self._heads(o, rows), None)

    def _heads(self, t: Tensor, rows: slice) -> Tensor:
        return t[rows].view(1, rows.stop - rows.start, -1, self._attend.head_dim)

    def _options(self, piece: _Piece, seed: int | None) -> tuple[object, ...]:
        a = self._attend
        options = (*a.window, a.softcap, a.scale, piece.q_start, piece.k_start)
        if seed is None or not a.dropout:
            return (*options, None, 0.0, None, 0)
        return (*options, None, a.dropout, seed, piece.sequence)

    def _sequence_of(self, token: int) -> tuple[int, int, int]:
        return self._sequences[bisect.bisect_right(self._starts, token) - 1]

    def _pieces(self, i: int, j: int) -> Iterator[_Piece]:
        """The sequences that have tokens in both tiles."""
        size = self._tile
        high = min(min(i, j) * size + size, self._tokens)  # only the sequence of the token before it reaches further
        at = bisect.bisect_right(self._starts, i * size if i == j else high - 1) - 1
        for start, end, number in self._sequences[at:]:
            if start >= high:
                return
            cuts = [(max(start, n * size), min(end, (n + 1) * size)) for n in (i, j)]
            if all(a < b for a, b in cuts):
                (qa, qb), (ka, kb) = cuts
                yield _Piece(
                    slice(qa - i * size, qb - i * size),
                    slice(ka - j * size, kb - j * size),
                    qa - start,
                    ka - start,
                    number,
                )
