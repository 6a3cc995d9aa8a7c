"""One block of a streamed run, over all tiles: the order of query tiles and key tiles.

Forward of tile i: `pre` gives q, k, v, of which k and v go to the store; q meets every key tile that it sees, merging
by log-sum-exp; `post` gives the next layer's tile. Backward, for tile i from the last to the first: `post` backward
gives do, q is made again, and each key tile j that it sees (made again for the first query that needs it) gets its
share of dk and dv, float32 sums in the store. Causal queries see no later keys, so after tile i the sums of key tile
i are complete, and `pre` backward follows at once: neither q, do nor dq ever leave the device. Without a causal mask
dq waits in the store until all queries are through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pyckpt.exec.ends import Gradients, Named
from pyckpt.exec.places import HIDDEN
from pyckpt.exec.resident import POST_NAMES
from pyckpt.exec.stack import Stack
from pyckpt.exec.tiling import count, tiles
from pyckpt.ops import philox
from pyckpt.ops.chunks import acc_dtype
from pyckpt.store import Key, OpenStore
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile
from pyckpt.tokenwise.workspace import Workspace

Upstream = Callable[[slice, Tensor, Tensor], None]
"""Of a range of tokens, from what is in `HIDDEN`: fill the gradient of the block's output."""


def as_it_is(rows: slice, left: Tensor, out: Tensor) -> None:
    out.copy_(left)


class BlockPass:
    """One block, forward or backward over all tiles. `at` says which tensor of a slab holds its k, v, o, ..."""

    def __init__(
        self, stack: Stack, store: OpenStore, ws: Workspace, block: int, weights: Named, tiles: list[slice]
    ) -> None:
        self._stack, self._store, self._ws, self._tiles = stack, store, ws, tiles
        self._plan, self._seed = stack.plans[block], stack.seeds[block]
        self._given = weights
        self._w = self._plan.tokenwise.cast(weights, stack.dtype)
        self._attend = stack.tiled(self._plan)
        self._attention_seed = None if self._seed is None else self._attend.seed(philox.derive(self._seed, 0))
        self._acc = acc_dtype(stack.dtype)
        self._causal = self._attend.backward_looking
        sinks = self._plan.sinks(self._w)
        self._sinks = None if sinks is None else self._attend.sinks(sinks)

    def forward(
        self,
        x_at: tuple[str, int],
        y_at: tuple[str, int],
        at: dict[str, int],
        kept: frozenset[str],
        progress: Callable[[int], None],
    ) -> None:
        self._x_at, self._at = x_at, at
        for i, rows in enumerate(self._tiles):
            progress(i)
            x = self._store.get((*x_at, i))
            self._ahead((*x_at, i + 1))
            self._ahead_keys(i, self._attend.keys_of(i)[0])
            views: Named = {n: self._store.new((n, at[n], i)) for n in POST_NAMES if n in kept}
            own = self._own_keys(i) if self._causal else None
            q = self._queries(i, x, own)
            o = self._attention(i, x, q, own, kept)[0]
            y = self._store.new((*y_at, i))
            self._post(rows, x, views, o, y)
            for n in ("o", "lse"):
                if n in kept:
                    self._store.put((n, at[n], i))
            for n in views:
                self._store.put((n, at[n], i))
            self._store.put((*y_at, i))
            self._store.release((*x_at, i))

    def _own_keys(self, i: int) -> tuple[Tensor, Tensor]:
        k, v = (self._attend.attended(self._store.new((n, self._at[n], i))) for n in ("k", "v"))
        return k, v

    def _lend_keys(self, i: int, x: Tensor, j: int) -> tuple[Tensor, Tensor, Callable[[Key], None]]:
        """k and v of tile j for query tile i, whose x is at hand; and how to give them back.

        They are made where no query has needed them yet, behind whose attention the copy of tile j's x hides.
        """
        if self._store.holds(("k", self._at["k"], j)):
            k, v = (self._attend.attended(self._store.get((n, self._at[n], j))) for n in ("k", "v"))
            return k, v, self._store.release
        k, v = self._own_keys(j)
        if i == j:
            self._made(j, x, None, (k, v))
        else:
            self._made(j, self._store.get((*self._x_at, j)), None, (k, v))
            self._store.release((*self._x_at, j))
        return k, v, self._store.put

    def _give_back_keys(self, j: int, give_back: Callable[[Key], None]) -> None:
        for n in ("k", "v"):
            give_back((n, self._at[n], j))

    def _attention(
        self, i: int, x: Tensor, q: Tensor, own: tuple[Tensor, Tensor] | None, kept: frozenset[str]
    ) -> tuple[Tensor, Tensor]:
        """o and lse of query tile i, in the store's buffers where they are kept. Tile i's own keys come last."""
        rows = self._tiles[i]
        made = self._store.new(("o", self._at["o"], i)) if "o" in kept else self._scratch("o", rows, self._plan.d_o)
        in_place = self._attend.stays and made.dtype == self._acc
        o = made if in_place else self._sums("o", rows, self._plan.d_o)
        lse = self._lse("lse" in kept, i)
        o.zero_()
        if self._sinks is None:
            lse.fill_(float("-inf"))
        else:
            lse.copy_(self._sinks.view(1, -1, 1).expand_as(lse))
        keys = self._attend.keys_of(i)
        for j in keys:
            k, v, give_back = (*own, self._store.put) if own and j == i else self._lend_keys(i, x, j)
            if j + 1 in keys and not (own and j + 1 == i):
                self._ahead_keys(i, j + 1)
            self._attend.forward(i, j, q, k, v, o, lse, self._attention_seed)
            self._give_back_keys(j, give_back)
        if not self._attend.stays:
            o = self._attend.to_tokens({"o": self._as_products("o", o)})["o"]
        if made is not o:
            made.copy_(o)
        return made, lse

    def _lse(self, in_store: bool, i: int) -> Tensor:
        heads, t = self._plan.attend.n_heads, self._tiles[i].stop - self._tiles[i].start
        if in_store:
            flat = self._store.new(("lse", self._at["lse"], i))
        else:
            flat = self._ws.get("lse", (t, heads), self._acc)
        return self._by_head(flat)

    def _by_head(self, lse: Tensor) -> Tensor:
        """(1, H, t), of what is attended, from the memory for it."""
        return lse.view(1, -1, self._attend.attended(lse).shape[0])

    # --- backward ---

    def backward(
        self,
        x_at: tuple[str, int],
        at: dict[str, int],
        kept: frozenset[str],
        wanted: Collection[str],
        need_dx: bool,
        upstream: Upstream,
        progress: Callable[[int], None],
    ) -> Gradients:
        """From the output's gradient, which `upstream` makes of what is in `HIDDEN`, the input's in its place there
        (where it is needed); gives the weights' gradients."""
        self._upstream = upstream
        self._x_at, self._at, self._kept = x_at, at, kept
        parts = sum(count(rows.stop - rows.start, self._plan.tile) for rows in self._tiles)
        self._grads = WeightGradients(wanted, parts)
        self._need_dx = need_dx
        self._need_pre = need_dx or any(n in self._plan.pre_names for n in wanted)
        for i in reversed(range(len(self._tiles))):
            progress(i)
            self._query_tile(i)
        if self._need_pre and not self._causal:
            for i in reversed(range(len(self._tiles))):
                progress(i)
                self._key_tile(i)
        return {n: self._grads.result(n, self._given[n]) for n in wanted}

    def _query_tile(self, i: int) -> None:
        rows = self._tiles[i]
        x, h = self._store.get((*self._x_at, i)), self._store.change((*HIDDEN, i))
        views: Named = {n: self._store.get((n, self._at[n], i)) for n in POST_NAMES if n in self._kept}
        for place in (self._x_at, HIDDEN, *((n, self._at[n]) for n in ("o", "lse") if n in self._kept)):
            self._ahead((*place, i - 1))
        if self._need_pre or "o" not in self._kept:
            self._ahead_keys(i, self._attend.keys_of(i)[0], also_sums=self._need_pre)
        q = self._queries(i, x) if self._need_pre or "o" not in self._kept else None
        o, lse = self._kept_attention(i, x, q)
        dy = self._scratch("dy", rows, self._stack.d_model, self._stack.x_dtype)
        self._upstream(rows, h, dy)
        do = self._scratch("do", rows, self._plan.d_o) if self._need_pre else None
        self._post_bwd(rows, x, views, o, dy, h if self._need_dx else None, do)
        if do is not None:
            assert q is not None
            self._attention_bwd(i, rows, x, q, o, lse, do, h)
        for n in ("o", "lse"):
            if n in self._kept:
                self._store.release((n, self._at[n], i))
        for n in views:
            self._store.release((n, self._at[n], i))
        self._store.put((*HIDDEN, i))
        self._store.release((*self._x_at, i))

    def _kept_attention(self, i: int, x: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
        if "o" not in self._kept:
            assert q is not None
            return self._attention(i, x, q, None, frozenset())
        o, lse = (self._store.get((n, self._at[n], i)) for n in ("o", "lse"))
        return o, self._by_head(lse)

    def _attention_bwd(
        self, i: int, rows: slice, x: Tensor, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, h: Tensor
    ) -> None:
        given = self._attend.to_attend({"do": do, "o": o})
        do, o = given["do"], given["o"]
        delta = self._attend.delta(do, o)
        if self._sinks is not None:
            name = str(self._plan.attend.sinks)
            self._grads.add(name, self._attend.sinks_backward(self._sinks.to(self._acc), lse, delta))
        dq = self._sums("dq", rows, self._plan.d_q).zero_()
        keys = self._attend.keys_of(i)
        sums: tuple[Tensor, ...] = ()
        for j in keys:
            k, v, give_back = self._lend_keys(i, x, j)
            dk, dv = sums = tuple(self._attend.attended(self._store.accumulate((n, 0, j))) for n in ("dk", "dv"))
            if j + 1 in keys:
                self._ahead_keys(i, j + 1, also_sums=True)
            self._attend.backward(i, j, do, q, k, v, o, lse, delta, (dq, dk, dv), self._attention_seed)
            self._give_back_keys(j, give_back)
            if not (self._causal and j == i):
                for n in ("dk", "dv"):
                    self._store.put((n, 0, j))
        if self._causal:
            self._pre_bwd(rows, x, (dq, *sums), h if self._need_dx else None)
            for n in ("dk", "dv"):
                self._store.release((n, 0, i))
        else:
            self._attend.attended(self._store.new(("dq", 0, i))).copy_(dq)
            self._store.put(("dq", 0, i))

    def _key_tile(self, i: int) -> None:
        """Without a causal mask: the backward of `pre`, once all queries have been through."""
        x, h = self._store.get((*self._x_at, i)), self._store.change((*HIDDEN, i))
        names = ("dq", "dk", "dv")
        sums = tuple(self._attend.attended(self._store.change((n, 0, i))) for n in names)
        for place in (self._x_at, HIDDEN, *((n, 0) for n in names)):
            self._ahead((*place, i - 1))
        self._pre_bwd(self._tiles[i], x, sums, h if self._need_dx else None)
        for n in names:
            self._store.release((n, 0, i))
        self._store.put((*HIDDEN, i))
        self._store.release((*self._x_at, i))

    # --- between tokenwise parts and attention ---

    def _queries(self, i: int, x: Tensor, keys: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """q of tile i, as it is attended; where `keys` are given its k and v go there."""
        rows = self._tiles[i]
        return self._made(i, x, self._scratch("q", rows, self._plan.d_q), keys)["q"]

    def _made(self, i: int, x: Tensor, q: Tensor | None, keys: tuple[Tensor, Tensor] | None) -> Named:
        """What `pre` makes of tile i, as it is attended. q: memory for queries, as `pre` makes them; keys: for k and v
        as they are attended."""
        rows, (k, v) = self._tiles[i], keys or (None, None)
        if keys is not None and not self._attend.stays:
            k, v = self._scratch("k", rows, self._plan.d_kv), self._scratch("v", rows, self._plan.d_v)
        self._pre(rows, x, q, k, v)
        made = self._attend.to_attend({n: t for n, t in (("q", q), ("k", k), ("v", v)) if t is not None})
        if keys is not None and not self._attend.stays:
            for n, into in zip(("k", "v"), keys, strict=True):
                into.copy_(made[n])
        return made

    def _sums(self, name: str, rows: slice, width: int) -> Tensor:
        """Memory for a sum over keys, as it is attended."""
        return self._attend.attended(self._scratch(f"{name}_sum", rows, width, self._acc))

    # --- tokenwise parts, on the tile's own tiles ---

    def _parts(self, rows: slice, x: Tensor, views: Named) -> list[tuple[slice, Tile]]:
        first = rows.start
        return [
            (
                sl,
                Tile(
                    x[sl],
                    self._stack.of_positions(slice(first + sl.start, first + sl.stop)),
                    {n: t[sl] for n, t in views.items()},
                    first + sl.start,
                    self._seed,
                ),
            )
            for sl in tiles(rows.stop - first, self._plan.tile)
        ]

    def _pre(self, rows: slice, x: Tensor, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> None:
        for sl, part in self._parts(rows, x, {}):
            qs, ks, vs = (None if t is None else t[sl] for t in (q, k, v))
            self._plan.tokenwise.pre(self._w, part, qs, ks, vs, self._ws)

    def _post(self, rows: slice, x: Tensor, views: Named, o: Tensor, y: Tensor) -> None:
        for sl, part in self._parts(rows, x, views):
            self._plan.tokenwise.post(self._w, part, o[sl], y[sl], self._ws)

    def _post_bwd(
        self, rows: slice, x: Tensor, views: Named, o: Tensor, dy: Tensor, dx: Tensor | None, do: Tensor | None
    ) -> None:
        for sl, part in self._parts(rows, x, views):
            dxs, dos = (None if t is None else t[sl] for t in (dx, do))
            self._plan.tokenwise.post_bwd(self._w, part, o[sl], dy[sl], dxs, dos, self._grads, self._ws)

    def _pre_bwd(self, rows: slice, x: Tensor, sums: tuple[Tensor, ...], dx: Tensor | None) -> None:
        if not self._attend.stays:
            rounded = {n: self._as_products(n, t) for n, t in zip(("dq", "dk", "dv"), sums, strict=True)}
            sums = tuple(self._attend.to_tokens(rounded).values())
        for sl, part in self._parts(rows, x, {}):
            dq, dk, dv = (self._as_products(n, t[sl]) for n, t in zip(("dq", "dk", "dv"), sums, strict=True))
            into = None if dx is None else dx[sl]
            self._plan.tokenwise.pre_bwd(self._w, part, dq, dk, dv, into, self._grads, self._ws)

    def _as_products(self, name: str, t: Tensor) -> Tensor:
        """In the dtype that the products take, free to be overwritten."""
        if t.dtype == self._stack.dtype:
            return t
        rounded = self._ws.get(name, tuple(t.shape), self._stack.dtype)
        rounded.copy_(t)
        return rounded

    # --- store ---

    def _scratch(self, name: str, rows: slice, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._ws.get(f"tile {name}", (rows.stop - rows.start, width), dtype or self._stack.dtype)

    def _ahead(self, key: Key) -> None:
        if 0 <= key[2] < len(self._tiles):
            self._store.prefetch(key)

    def _ahead_keys(self, i: int, j: int, also_sums: bool = False) -> None:
        """Key tile j is the next one that query tile i needs."""
        if self._store.holds(("k", self._at["k"], j)):
            for n in ("k", "v"):
                self._ahead((n, self._at[n], j))
        elif i != j:
            self._ahead((*self._x_at, j))
        for n in ("dk", "dv") if also_sums else ():
            self._ahead((n, 0, j))
