"""Attention by tiles of a sequence that several processes share: the tiles of all of them, in turn, are the sequence.

A process's tile i is the r-th part of range i of all tokens, r being its rank, so that ranges are in order: what a
causal query sees is in its own range or an earlier one, whichever process has it, and all processes walk through the
same pairs. In each pair they talk, and all have as much to do but where a range meets itself.
"""

from __future__ import annotations

from torch import Tensor

from pyckpt.attend.all_to_all import AllToAllAttend
from pyckpt.attend.dense import Layout
from pyckpt.attend.ring import RingAttend, apart, together
from pyckpt.attend.tiled import Named, TiledAttend
from pyckpt.ops import philox
from pyckpt.ops.attention import sinks_backward

_FIRST_SITE = 1 << 8  # of the seeds of a process's heads, which are derived from attention's


class RingTiles(TiledAttend):
    """Of a pair of tiles each process has its queries meet everybody's keys, which go round.

    One tile of others' keys is on the device, and one on its way.
    """

    def __init__(self, attend: RingAttend, layout: Layout, tile: int) -> None:
        super().__init__(attend, layout, tile * attend.processes.size)
        self._processes = attend.processes

    def forward(
        self, i: int, j: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: int | None
    ) -> None:
        queries = self._part(i, self._processes.rank)
        for owner, packed in self._processes.around(together(k, v)):
            self._pairs.forward(queries, self._part(j, owner), q, *apart(packed, k, v), o, lse, seed)

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
        queries, (dq, *sums) = self._part(i, self._processes.rank), grads

        def share(owner: int, packed: Tensor, into: Tensor) -> None:
            here = do, q, *apart(packed, k, v), o, lse, delta
            self._pairs.backward(queries, self._part(j, owner), *here, (dq, *apart(into, k, v)), seed)

        shares = self._processes.around_and_home(together(k, v), dq.dtype, share)
        for total, made in zip(sums, apart(shares, k, v), strict=True):
            total += made

    def _part(self, i: int, rank: int) -> slice:
        """The tokens of range i that the process has, among all."""
        rows = self.rows(i)
        size = (rows.stop - rows.start) // self._processes.size
        return slice(rows.start + rank * size, rows.start + (rank + 1) * size)


class AllToAllTiles(TiledAttend):
    """Each process attends some of the heads, over tiles of all processes' tokens: what `pre` makes of its tile is
    exchanged before, and o afterwards.

    Of such a tile, of P times the tokens with a P-th of the heads, a process holds as many numbers as of its own.
    """

    stays = False

    def __init__(self, attend: AllToAllAttend, layout: Layout, tile: int) -> None:
        super().__init__(attend.of_heads, layout, tile * attend.processes.size)
        self._whole = attend
        heads, kv_heads = attend.n_heads, attend.n_kv_heads
        self._heads = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads}

    def to_attend(self, made: Named) -> Named:
        given = [(t, self._heads[n.removeprefix("d")]) for n, t in made.items()]
        layout = Layout(1, given[0][0].shape[0])
        return dict(zip(made, self._whole.to_heads(layout, *given), strict=True))

    def to_tokens(self, attended: Named) -> Named:
        given = [(t, self._heads[n.removeprefix("d")]) for n, t in attended.items()]
        layout = Layout(1, given[0][0].shape[0] // self._whole.processes.size)
        return dict(zip(attended, self._whole.to_tokens(layout, *given), strict=True))

    def attended(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0] * self._whole.processes.size, -1)

    def seed(self, seed: int | None) -> int | None:
        return None if seed is None else philox.derive(seed, _FIRST_SITE + self._whole.processes.rank)

    def sinks(self, sinks: Tensor) -> Tensor:
        return sinks[self._whole.own_heads]

    def sinks_backward(self, sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        share, own = sinks.new_zeros(self._whole.n_heads), self._whole.own_heads
        share[own] = sinks_backward(sinks, lse, delta)
        return share
