"""The streamed executor: blocks over a sequence that is in a store, of which only tiles visit the device.

Layer by layer, and within a layer query tile by query tile. Forward of tile i: `pre` gives q, k, v, of which k and v go
to the store; q meets every key tile that it sees, merging by log-sum-exp; `post` gives the next layer's tile. Backward,
for tile i from the last to the first: `post` backward gives do, q is made again, and each key tile j that it sees (made
again for the first query that needs it) gets its share of dk and dv, float32 sums in the store. Causal queries see no
later keys, so after tile i the sums of key tile i are complete, and `pre` backward follows at once: neither q, do nor
dq ever leave the device. Without a causal mask dq waits in the store until all queries are through.

Nothing on the device has the length of the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pyckpt.attend.dense import Layout
from pyckpt.attend.tiled import TiledAttend
from pyckpt.exec.ends import Gradients, Named, Sink, Source
from pyckpt.exec.positions import positions_of
from pyckpt.exec.resident import POST_NAMES, BlockPlan
from pyckpt.exec.schedule import Advance, Back, Schedule, Step
from pyckpt.exec.tiling import count, tiles
from pyckpt.ops import philox
from pyckpt.ops.attention import sinks_backward
from pyckpt.ops.chunks import acc_dtype
from pyckpt.store import Key, OpenStore, Plan, Slab
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile
from pyckpt.tokenwise.positions import Positions
from pyckpt.tokenwise.workspace import Workspace

HIDDEN = ("h", 0)
"""The last block's output; from the loss on, the gradient of the present block's output, and then of its input."""

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Stack:
    """The blocks of a streamed run and its inputs: all that does not change while it runs, and no weights."""

    plans: list[BlockPlan]
    layout: Layout
    positions: Tensor | None
    seeds: list[int | None]
    x_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device
    d_model: int
    tile: int
    schedule: Schedule

    @property
    def n_tiles(self) -> int:
        return count(self.layout.tokens, self.tile)

    def of_positions(self, rows: slice) -> Positions:
        return positions_of(self.layout, self.positions, rows, self.device)

    def kept(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """What this block keeps beside x: width and dtype, by name."""
        plan, keep = self.plans[block], self.plans[block].save
        found: dict[str, tuple[int, torch.dtype]] = {}
        if keep.attention:
            found["o"] = (plan.d_o, self.dtype)
            found["lse"] = (plan.attend.n_heads, acc_dtype(self.dtype))
        if keep.qkv:
            found["k"], found["v"] = (plan.d_kv, self.dtype), (plan.d_v, self.dtype)
        found |= {t.name: (t.width, self.x_dtype if t.residual else self.dtype) for t in plan.post_tensors}
        return found


class Numbers:
    """Which tensors of each slab are in use; the lowest free number is taken first."""

    def __init__(self) -> None:
        self._used: dict[str, set[int]] = {}
        self.most: dict[str, int] = {}

    def take(self, name: str) -> int:
        used = self._used.setdefault(name, set())
        number = next(i for i in range(len(used) + 1) if i not in used)
        used.add(number)
        self.most[name] = max(self.most.get(name, 0), number + 1)
        return number

    def give(self, name: str, number: int) -> None:
        self._used[name].remove(number)


class _Places:
    """Where each block's input and what is kept of it are: the same while planning and while running."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._last = stack, len(stack.plans)
        self.numbers = Numbers()
        self.x: dict[int, tuple[str, int]] = {}
        self.kept: dict[int, dict[str, int]] = {}

    def input(self, block: int) -> tuple[str, int]:
        """Of the block; that of the one after the last is the stack's output."""
        if block not in self.x:
            self.x[block] = HIDDEN if block == self._last else ("x", self.numbers.take("x"))
        return self.x[block]

    def keep(self, block: int) -> dict[str, int]:
        self.kept[block] = {name: self.numbers.take(name) for name in self._stack.kept(block)}
        return self.kept[block]

    def forget(self, block: int) -> list[tuple[str, int]]:
        """Give back the block's input and all that was kept of it."""
        found = [*self.kept.pop(block, {}).items()]
        place = self.x.pop(block, None)
        found += [place] if place is not None else []
        for name, number in found:
            if name != HIDDEN[0]:
                self.numbers.give(name, number)
        return found


def store_plan(stack: Stack) -> Plan:
    """The slabs that this run needs: the numbers of its schedule, walked through without running it."""
    places = _Places(stack)
    places.input(0)
    needs_back = False
    for step in stack.schedule:
        with_kept = isinstance(step, Advance) and step.keep
        scratch = [n for n in ("k", "v") if not (with_kept and n in stack.kept(step.block))]
        if isinstance(step, Back):
            needs_back = True
            scratch = [n for n in scratch if n not in places.kept.get(step.block, {})]
        numbers = [(n, places.numbers.take(n)) for n in scratch]
        if isinstance(step, Advance):
            places.input(step.block + 1)
            if step.keep:
                places.keep(step.block)
        for n, number in numbers:
            places.numbers.give(n, number)
        if isinstance(step, Back) or step.drop:
            places.forget(step.block)
    return Plan(stack.layout.tokens, stack.tile, tuple(_slabs(stack, places.numbers.most, needs_back)))


# Tiles on the device at a time: what compute holds, the next one on its way in, the last one on its way out.
_BUFFERS = {"x": 4, "h": 3, "k": 4, "v": 4, "dk": 3, "dv": 3, "dq": 2}


def _slabs(stack: Stack, most: dict[str, int], needs_back: bool) -> list[Slab]:
    acc = acc_dtype(stack.dtype)
    shapes: dict[str, tuple[int, torch.dtype]] = {
        "x": (stack.d_model, stack.x_dtype),
        "h": (stack.d_model, stack.x_dtype),
    }
    for block, plan in enumerate(stack.plans):
        widths = {"k": (plan.d_kv, stack.dtype), "v": (plan.d_v, stack.dtype)}
        if needs_back:
            widths |= {"dk": (plan.d_kv, acc), "dv": (plan.d_v, acc)}
            if plan.attend.window[1] != 0:
                widths["dq"] = (plan.d_q, stack.dtype)
        for name, shape in {**widths, **stack.kept(block)}.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"block {block} has {name} of width {shape[0]}, an earlier one of {shapes[name][0]}; a "
                    "streamed stack needs blocks with the same heads, head_dim and d_ff"
                )
    always = {"h": 1, "dk": 1, "dv": 1, "dq": 1}
    counts = {name: most.get(name, always.get(name, 0)) for name in shapes}
    return [Slab(n, *shapes[n], counts[n], _BUFFERS.get(n, 2)) for n in shapes if counts[n]]


class Streamed:
    """One run of a stack over an open store: `forward`, then `backward`. `weights(i)` gives those of block i."""

    def __init__(
        self,
        stack: Stack,
        store: OpenStore,
        source: Source,
        sink: Sink,
        weights: Callable[[int], Named],
        progress: Progress | None = None,
    ) -> None:
        self._stack, self._store, self._source, self._sink = stack, store, source, sink
        self._weights, self._progress = weights, progress or (lambda what, block, tile: None)
        self._places = _Places(stack)
        self._ws = Workspace(stack.device)
        self._tiles = [store.plan.rows(i) for i in range(stack.n_tiles)]

    def forward(self, ends: Named) -> Tensor:
        """The sink's result. `ends` are the weights of source and sink."""
        self.begin_forward(ends)
        for step in self._stack.schedule.forward:
            self._advance(step)
        return self.end_forward(ends)

    # The same in parts: `begin_forward`, `advance` of one block after the other, `end_forward`.

    def begin_forward(self, ends: Named) -> None:
        place = self._places.input(0)
        for i, rows in enumerate(self._tiles):
            self._progress("embed", 0, i)
            self._source.fill(ends, rows, self._store.new((*place, i)))
            self._store.put((*place, i))
        self._left = iter(self._stack.schedule.forward)

    def advance(self, block: int) -> None:
        step = next(self._left)
        assert step.block == block
        self._advance(step)

    def end_forward(self, ends: Named) -> Tensor:
        for i, rows in enumerate(self._tiles):
            self._progress("head", 0, i)
            self._prefetch(HIDDEN, i + 1)
            key = (*HIDDEN, i)
            self._sink.forward(ends, rows, self._store.change(key) if self._sink.leaves else self._store.get(key))
            (self._store.put if self._sink.leaves else self._store.release)(key)
        self._ws = Workspace(self._stack.device)
        return self._sink.result()

    def backward(
        self, ends: Named, upstream: Tensor, wanted: list[Collection[str]], need_dx: bool
    ) -> tuple[Gradients, list[Gradients]]:
        """Gradients of the ends' weights, and of each block's `wanted` ones, from that of the result, `upstream`.

        `need_dx`: the source wants its own.
        """
        self.begin_backward(ends, upstream)
        found: list[Gradients] = [{} for _ in self._stack.plans]
        first = 0 if need_dx else next((i for i, names in enumerate(wanted) if names), len(found))
        for step in self._stack.schedule.backward:
            if isinstance(step, Back):
                found[step.block] = self.back(step.block, wanted[step.block], need_dx or step.block > first)
        return self.end_backward(ends, need_dx), found

    # The same in parts: `begin_backward`, `back` of one block after the other from the last on, `end_backward`.

    def begin_backward(self, ends: Named, upstream: Tensor) -> None:
        self._sink.take(ends, upstream)
        if self._sink.deferred and not self._stack.schedule.backward:
            self._sink_alone()
        self._left = iter(self._stack.schedule.backward)

    def back(self, block: int, wanted: Collection[str], need_dx: bool) -> Gradients:
        """The gradients of a block's weights. `need_dx`: that of its input is needed."""
        for step in self._left:
            if isinstance(step, Back):
                assert step.block == block
                return self._back(block, wanted, need_dx)
            self._advance(step)
        raise AssertionError(f"the schedule has no backward of block {block}")

    def end_backward(self, ends: Named, need_dx: bool) -> Gradients:
        """The gradients of the ends' weights. `need_dx`: the source wants its own."""
        if need_dx:
            for i in reversed(range(len(self._tiles))):
                self._prefetch(HIDDEN, i - 1)
                self._source.backward(ends, self._tiles[i], self._store.get((*HIDDEN, i)))
                self._store.release((*HIDDEN, i))
        self._ws = Workspace(self._stack.device)
        return {**self._sink.gradients(ends), **self._source.gradients(ends)}

    def _sink_alone(self) -> None:
        """The backward of the sink where no block has one."""
        for i in reversed(range(len(self._tiles))):
            self._prefetch(HIDDEN, i - 1)
            self._sink.upstream(self._tiles[i], self._store.get((*HIDDEN, i)), None)
            self._store.release((*HIDDEN, i))

    # --- one block forward ---

    def _advance(self, step: Step) -> None:
        assert isinstance(step, Advance)
        block, places = step.block, self._places
        pass_ = _BlockPass(self._stack, self._store, self._ws, block, self._weights(block), self._tiles)
        scratch = [n for n in ("k", "v") if not (step.keep and n in self._stack.kept(block))]
        numbers = {n: places.numbers.take(n) for n in scratch}
        x, y = places.input(block), places.input(block + 1)
        kept = places.keep(block) if step.keep else {}
        pass_.forward(x, y, {**numbers, **kept}, frozenset(kept), lambda i: self._progress("forward", block, i))
        for n, number in numbers.items():
            self._store.free(n, number)
            places.numbers.give(n, number)
        if step.drop:
            self._forget(block)

    def _forget(self, block: int) -> None:
        for place in self._places.forget(block):
            if place != HIDDEN:
                self._store.free(*place)

    # --- one block backward ---

    def _back(self, block: int, wanted: Collection[str], need_dx: bool) -> Gradients:
        places = self._places
        w = self._weights(block)
        pass_ = _BlockPass(self._stack, self._store, self._ws, block, w, self._tiles)
        kept = places.kept.get(block, {})
        numbers = {n: places.numbers.take(n) for n in ("k", "v") if n not in kept}
        grads = pass_.backward(
            places.input(block),
            {**numbers, **kept},
            frozenset(kept),
            wanted,
            need_dx,
            self._sink.upstream if block == len(self._stack.plans) - 1 else _as_it_is,
            lambda i: self._progress("backward", block, i),
        )
        for n, number in numbers.items():
            self._store.free(n, number)
            places.numbers.give(n, number)
        for n in ("dk", "dv", "dq"):
            self._store.free(n, 0)
        self._forget(block)
        return grads

    def _prefetch(self, place: tuple[str, int], tile: int) -> None:
        if 0 <= tile < len(self._tiles):
            self._store.prefetch((*place, tile))


Upstream = Callable[[slice, Tensor, Tensor], None]
"""Of a range of tokens, from what is in `HIDDEN`: fill the gradient of the block's output."""


def _as_it_is(rows: slice, left: Tensor, out: Tensor) -> None:
    out.copy_(left)


class _BlockPass:
    """One block, forward or backward over all tiles. `at` says which tensor of a slab holds its k, v, o, ..."""

    def __init__(
        self, stack: Stack, store: OpenStore, ws: Workspace, block: int, weights: Named, tiles: list[slice]
    ) -> None:
        self._stack, self._store, self._ws, self._tiles = stack, store, ws, tiles
        self._plan, self._seed = stack.plans[block], stack.seeds[block]
        self._given = weights
        self._w = self._plan.tokenwise.cast(weights, stack.dtype)
        self._attend = TiledAttend(self._plan.attend, stack.layout, stack.tile)
        self._attention_seed = None if self._seed is None else philox.derive(self._seed, 0)
        self._acc = acc_dtype(stack.dtype)
        self._causal = self._attend.backward_looking
        self._sinks = self._plan.sinks(self._w)

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
            q = self._scratch("q", rows, self._plan.d_q)
            own = self._own_keys(i) if self._causal else None
            self._pre(rows, x, q, *(own or (None, None)))
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
        return self._store.new(("k", self._at["k"], i)), self._store.new(("v", self._at["v"], i))

    def _lend_keys(self, i: int, x: Tensor, j: int) -> tuple[Tensor, Tensor, Callable[[Key], None]]:
        """k and v of tile j for query tile i, whose x is at hand; and how to give them back.

        They are made where no query has needed them yet, behind whose attention the copy of tile j's x hides.
        """
        if self._store.holds(("k", self._at["k"], j)):
            k, v = (self._store.get((n, self._at[n], j)) for n in ("k", "v"))
            return k, v, self._store.release
        k, v = self._own_keys(j)
        if i == j:
            self._pre(self._tiles[j], x, None, k, v)
        else:
            self._pre(self._tiles[j], self._store.get((*self._x_at, j)), None, k, v)
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
        o = made if made.dtype == self._acc else self._scratch("o_sum", rows, self._plan.d_o, self._acc)
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
        if made is not o:
            made.copy_(o)
        return made, lse

    def _lse(self, in_store: bool, i: int) -> Tensor:
        heads, t = self._plan.attend.n_heads, self._tiles[i].stop - self._tiles[i].start
        if in_store:
            flat = self._store.new(("lse", self._at["lse"], i))
        else:
            flat = self._ws.get("lse", (t, heads), self._acc)
        return flat.view(1, heads, t)

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
        q = None
        if self._need_pre or "o" not in self._kept:
            q = self._scratch("q", rows, self._plan.d_q)
            self._pre(rows, x, q, None, None)
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
        return o, lse.view(1, self._plan.attend.n_heads, o.shape[0])

    def _attention_bwd(
        self, i: int, rows: slice, x: Tensor, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, h: Tensor
    ) -> None:
        delta = self._attend.delta(do, o)
        if self._sinks is not None:
            name = str(self._plan.attend.sinks)
            self._grads.add(name, sinks_backward(self._sinks.to(self._acc), lse, delta))
        dq = self._scratch("dq_sum", rows, self._plan.d_q, self._acc).zero_()
        keys = self._attend.keys_of(i)
        sums: tuple[Tensor, ...] = ()
        for j in keys:
            k, v, give_back = self._lend_keys(i, x, j)
            dk, dv = sums = tuple(self._store.accumulate((n, 0, j)) for n in ("dk", "dv"))
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
            self._store.new(("dq", 0, i)).copy_(dq)
            self._store.put(("dq", 0, i))

    def _key_tile(self, i: int) -> None:
        """Without a causal mask: the backward of `pre`, once all queries have been through."""
        x, h = self._store.get((*self._x_at, i)), self._store.change((*HIDDEN, i))
        names = ("dq", "dk", "dv")
        sums = tuple(self._store.change((n, 0, i)) for n in names)
        for place in (self._x_at, HIDDEN, *((n, 0) for n in names)):
            self._ahead((*place, i - 1))
        self._pre_bwd(self._tiles[i], x, sums, h if self._need_dx else None)
        for n in names:
            self._store.release((n, 0, i))
        self._store.put((*HIDDEN, i))
        self._store.release((*self._x_at, i))

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
