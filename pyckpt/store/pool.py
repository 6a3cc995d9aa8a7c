"""Memory off the device for single tensors of any size, used again from step to step: page-locking is slow.

Rooms are taken and given back. One is reused where it is large enough; where none is, a new one takes the place of an
idle one. So a pool holds at most as many rooms as were taken at once, whatever the lengths of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pyckpt.store.host import LockedMemory, as_like, check_available
from pyckpt.store.lanes import Event, Place


class Memory(Protocol):
    """`nbytes` bytes off the device. Both copies run on a lane."""

    nbytes: int

    def read(self, into: Tensor) -> None: ...

    def write(self, source: Tensor) -> None: ...


class Room:
    """Memory, and the events that its next copy has to wait for."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.place = memory, Place()


class Pool:
    """Rooms whose memory `make(nbytes)` gives. Used under the lock of the queue that it belongs to."""

    def __init__(
        self, make: Callable[[int], Memory], wait: Callable[[list[Event]], None] = lambda events: None
    ) -> None:
        self._make, self._wait = make, wait
        self._idle: list[Room] = []

    def take(self, nbytes: int) -> Room:
        """A room of at least so many bytes, the smallest that is idle."""
        large_enough = [r for r in self._idle if r.memory.nbytes >= nbytes]
        if large_enough:
            room = min(large_enough, key=lambda r: r.memory.nbytes)
            self._idle.remove(room)
            return room
        if self._idle:
            # The largest of those too small: it is the one whose tensor has grown.
            room = max(self._idle, key=lambda r: r.memory.nbytes)
            self._idle.remove(room)
            self._wait(room.place.before_write())  # a device may be behind, and copy from it or to it still
            del room
        return Room(self._make(nbytes))

    def give(self, room: Room) -> None:
        self._idle.append(room)

    @property
    def idle_bytes(self) -> int:
        return sum(r.memory.nbytes for r in self._idle)


class HostRoom:
    """Page-locked host memory, so that copies run beside compute."""

    def __init__(self, nbytes: int) -> None:
        check_available(nbytes, "keep less (save='input', segments) or place it in a file")
        self.nbytes, self._bytes = nbytes, LockedMemory(nbytes).bytes

    def read(self, into: Tensor) -> None:
        into.copy_(as_like(self._bytes, into), non_blocking=True)

    def write(self, source: Tensor) -> None:
        as_like(self._bytes, source).copy_(source, non_blocking=True)
