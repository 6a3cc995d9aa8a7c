"""Attention of one block over pairs of (query tile, key/value tile) of a sequence that is somewhere else."""

from __future__ import annotations

from torch import Tensor

from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.attend.pairs import PairAttend
from pyckpt.ops.attention import sinks_backward

Named = dict[str, Tensor]


class TiledAttend:
    """`PairAttend` of tiles, which cut the flat axis of all tokens, by their numbers.

    stays: what is attended lies as `pre` makes it and `post` takes it, and `to_attend` and `to_tokens` change nothing.
    """

    stays = True

    def __init__(self, attend: DenseAttend, layout: Layout, tile: int) -> None:
        self._window, self._tile, self._tokens = attend.window, tile, layout.tokens
        self._pairs = PairAttend(attend, layout)

    @property
    def backward_looking(self) -> bool:
        """No query sees a key behind its own tile."""
        return self._window[1] == 0

    def keys_of(self, i: int) -> range:
        """The key tiles that some query of tile i sees, from the first to the last, and tile i itself."""
        left, right = self._window
        rows = self.rows(i)
        first, last = rows.start, rows.stop - 1
        a, b = self._pairs.sequence_of(first), self._pairs.sequence_of(last)
        low = a.keys.start if left < 0 else max(a.keys.start, a.place(first) - left)
        high = b.keys.stop if right < 0 else min(b.keys.stop, b.place(last) + right + 1)
        return range(min(low // self._tile, i), max((high - 1) // self._tile, i) + 1)

    def forward(
        self, i: int, j: int, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seed: int | None
    ) -> None:
        """Merge key tile j into the running (o, lse) of query tile i: see `PairAttend.forward`."""
        self._pairs.forward(self.rows(i), self.rows(j), q, k, v, o, lse, seed)

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
        self._pairs.backward(self.rows(i), self.rows(j), do, q, k, v, o, lse, delta, grads, seed)

    def delta(self, do: Tensor, o: Tensor) -> Tensor:
        return self._pairs.delta(do, o)

    def to_attend(self, made: Named) -> Named:
        """Of "q", "k", "v", "o" and "do", (t, heads * dims) of a tile, what `forward` and `backward` take."""
        return made

    def to_tokens(self, attended: Named) -> Named:
        """Of "o", "dq", "dk" and "dv" the inverse."""
        return attended

    def attended(self, t: Tensor) -> Tensor:
        """Memory for (t, heads * dims) of a tile, as what is attended lies in it."""
        return t

    def seed(self, seed: int | None) -> int | None:
        """Of what `forward` and `backward` drop, from attention's."""
        return seed

    def sinks(self, sinks: Tensor) -> Tensor:
        """Of all heads' those that `lse` begins as."""
        return sinks

    def sinks_backward(self, sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        """The share of a tile's queries in the gradient of all heads' sinks; `sinks` as `sinks` gives them."""
        return sinks_backward(sinks, lse, delta)

    def rows(self, i: int) -> slice:
        """Of all tokens those that are attended with tile i."""
        return slice(i * self._tile, min((i + 1) * self._tile, self._tokens))
