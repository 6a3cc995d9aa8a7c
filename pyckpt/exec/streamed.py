"""The streamed executor: blocks over a sequence that is in a store, of which only tiles visit the device.

Layer by layer, as the schedule has it, and within a layer query tile by query tile (`streamed_block.py`). Nothing on
the device has the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from pyckpt.exec.ends import Gradients, Named, Sink, Source
from pyckpt.exec.places import HIDDEN, Places
from pyckpt.exec.schedule import Advance, Back, Step
from pyckpt.exec.stack import Stack
from pyckpt.exec.streamed_block import BlockPass, as_it_is
from pyckpt.store import OpenStore
from pyckpt.tokenwise.workspace import Workspace

Progress = Callable[[str, int, int], None]


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
        self._places = Places(stack)
        self._ws = Workspace(stack.device)
        self._tiles = [stack.rows(i) for i in range(stack.n_tiles)]

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
        pass_ = BlockPass(self._stack, self._store, self._ws, block, self._weights(block), self._tiles)
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
        pass_ = BlockPass(self._stack, self._store, self._ws, block, w, self._tiles)
        kept = places.kept.get(block, {})
        numbers = {n: places.numbers.take(n) for n in ("k", "v") if n not in kept}
        grads = pass_.backward(
            places.input(block),
            {**numbers, **kept},
            frozenset(kept),
            wanted,
            need_dx,
            self._sink.upstream if block == len(self._stack.plans) - 1 else as_it_is,
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
