"""A store away from the device: tiles pass through a ring of device buffers, copied beside compute.

The buffers are allocated once and are ours: no other stream's allocator ever sees them. A buffer and the memory behind
a tile are each a place with the events of its last write and of the reads since. A read waits for the write; a write
waits for all of them. That is every edge there is: compute to copy out, copy in to compute, copy in after the copy out
of the same tile, and a buffer's next use after its last one, on whichever side that was.

A tile stays in its buffer until the buffer is wanted, so that what was just put is read without a copy.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyckpt.store.interface import OpenStore
from pyckpt.store.lanes import Lanes, Place
from pyckpt.store.plan import Key, Plan


class Backing(Protocol):
    """The memory behind the tiles. Both copies run on a lane."""

    def read(self, key: Key, into: Tensor) -> None: ...

    def write(self, key: Key, source: Tensor) -> None: ...


@dataclasses.dataclass(eq=False)
class _Buffer:
    memory: Tensor
    place: Place = dataclasses.field(default_factory=Place)
    key: Key | None = None
    lent: bool = False
    expected: bool = False  # prefetched and not yet asked for
    last_use: int = 0


class Staged(OpenStore):
    """`OpenStore` over a `Backing`. `done` is called once, when the last copy is over."""

    def __init__(
        self, plan: Plan, device: torch.device, backing: Backing, lanes: Lanes, done: Callable[[], None]
    ) -> None:
        super().__init__(plan, device)
        self._backing, self._lanes, self._done = backing, lanes, done
        try:
            with torch.inference_mode(False):  # threads that copy are not in it
                self._rings = {
                    s.name: [
                        _Buffer(torch.empty(plan.tile * s.width, dtype=s.dtype, device=device))
                        for _ in range(s.buffers)
                    ]
                    for s in plan.slabs
                }
        except BaseException:
            lanes.close(done)  # nothing was queued: only its threads end
            raise
        # The allocator hands out memory that compute may still be using: the first copy waits for that.
        for buffer in itertools.chain.from_iterable(self._rings.values()):
            buffer.place.was_written(lanes.compute())
        self._widths = {s.name: s.width for s in plan.slabs}
        self._places: dict[Key, Place] = {}
        self._at: dict[Key, _Buffer] = {}
        self._clock = itertools.count(1)
        self._closed = False

    def new(self, key: Key) -> Tensor:
        self._held.discard(key)
        buffer = self._at.get(key) or self._take(key)
        return self._lend(key, buffer, writing=True)

    def get(self, key: Key) -> Tensor:
        return self._lend(key, self._present(key), writing=False)

    def change(self, key: Key) -> Tensor:
        buffer = self._present(key)
        self._held.discard(key)
        return self._lend(key, buffer, writing=True)

    def put(self, key: Key) -> None:
        buffer = self._give_back(key)
        buffer.place.was_written(self._lanes.compute())
        source, place = self._view(key, buffer), self._place(key)
        over = self._lanes.run(
            "out",
            lambda: self._backing.write(key, source),
            [*buffer.place.before_read(), *place.before_write()],
        )
        buffer.place.was_read("out", over)
        place.was_written(over)
        self._held.add(key)

    def release(self, key: Key) -> None:
        self._give_back(key).place.was_read("compute", self._lanes.compute())

    def prefetch(self, key: Key) -> None:
        if key not in self._held or key in self._at:
            return
        buffer = self._free_buffer(key[0], also_expected=False)
        if buffer is not None:
            self._load(key, buffer)
            buffer.expected = True

    def free(self, name: str, index: int) -> None:
        super().free(name, index)
        for key in [k for k in self._at if k[0] == name and k[1] == index]:
            self._forget(self._at[key])

    def close(self) -> None:
        if self.__dict__.get("_closed", True):
            return
        self._closed = True
        self._lanes.close(self._done)
        self._rings, self._at = {}, {}

    # --- buffers ---

    def _present(self, key: Key) -> _Buffer:
        self._check_held(key)
        buffer = self._at.get(key)
        if buffer is None:
            buffer = self._take(key)
            self._load(key, buffer)
        return buffer

    def _load(self, key: Key, buffer: _Buffer) -> None:
        self._assign(key, buffer)
        into, place = self._view(key, buffer), self._place(key)
        over = self._lanes.run(
            "in",
            lambda: self._backing.read(key, into),
            [*place.before_read(), *buffer.place.before_write()],
        )
        place.was_read("in", over)
        buffer.place.was_written(over)

    def _lend(self, key: Key, buffer: _Buffer, writing: bool) -> Tensor:
        if buffer.lent:
            raise RuntimeError(f"tile {key} is on loan already")
        self._lanes.hold(buffer.place.before_write() if writing else buffer.place.before_read())
        buffer.lent, buffer.expected, buffer.last_use = True, False, next(self._clock)
        return self._view(key, buffer)

    def _give_back(self, key: Key) -> _Buffer:
        buffer = self._at.get(key)
        if buffer is None or not buffer.lent:
            raise RuntimeError(f"tile {key} is not on loan")
        buffer.lent, buffer.last_use = False, next(self._clock)
        return buffer

    def _take(self, key: Key) -> _Buffer:
        buffer = self._free_buffer(key[0], also_expected=True)
        if buffer is None:
            raise RuntimeError(f"all {len(self._rings[key[0]])} buffers of {key[0]!r} are on loan")
        self._assign(key, buffer)
        return buffer

    def _free_buffer(self, name: str, also_expected: bool) -> _Buffer | None:
        """The one that was used longest ago; one that a prefetch has filled only if nothing else is left."""
        free = [b for b in self._rings[name] if not b.lent and (also_expected or not b.expected)]
        return min(free, key=lambda b: (b.expected, b.last_use), default=None)

    def _assign(self, key: Key, buffer: _Buffer) -> None:
        self._forget(buffer)
        buffer.key = key
        self._at[key] = buffer

    def _forget(self, buffer: _Buffer) -> None:
        if buffer.key is not None:
            del self._at[buffer.key]
        buffer.key, buffer.expected = None, False

    def _view(self, key: Key, buffer: _Buffer) -> Tensor:
        rows, width = self.plan.rows(key[2]), self._widths[key[0]]
        tokens = rows.stop - rows.start
        return buffer.memory[: tokens * width].view(tokens, width)

    def _place(self, key: Key) -> Place:
        return self._places.setdefault(key, Place())
