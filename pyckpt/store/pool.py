"""Memory off the device for single tensors of any size, used again from step to step: page-locking is slow.

Rooms are taken and given back. One is reused where it is large enough; where none is, a new one takes the place of an
idle one. So a pool holds at most as many rooms as were taken at once, whatever the lengths of the steps.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pyckpt.store.file import Staging, move_all, reserve, unnamed_file
from pyckpt.store.host import check_available, lock
from pyckpt.store.lanes import Event


class Memory(Protocol):
    """`nbytes` bytes off the device. Both copies run on a lane."""

    nbytes: int

    def read(self, into: Tensor) -> None: ...

    def write(self, source: Tensor) -> None: ...


@dataclasses.dataclass(eq=False)
class Room:
    """Memory, and the events that its next write has to wait for."""

    memory: Memory
    written: Event | None = None
    reads: list[Event] = dataclasses.field(default_factory=list)

    def before_read(self) -> list[Event]:
        return [] if self.written is None else [self.written]

    def before_write(self) -> list[Event]:
        return [*self.before_read(), *self.reads]

    def was_written(self, event: Event) -> None:
        self.written, self.reads = event, []


class Pool:
    """Rooms whose memory `make(nbytes)` gives. Used under the lock of the queue that it belongs to."""

    def __init__(self, make: Callable[[int], Memory]) -> None:
        self._make = make
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
            self._idle.remove(max(self._idle, key=lambda r: r.memory.nbytes))
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
        self.nbytes = nbytes
        self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            lock(self._bytes)

    def read(self, into: Tensor) -> None:
        into.copy_(self._like(into), non_blocking=True)

    def write(self, source: Tensor) -> None:
        self._like(source).copy_(source, non_blocking=True)

    def _like(self, t: Tensor) -> Tensor:
        return self._bytes[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)


class FileRoom:
    """A scratch file without a name: nothing of it is left when the process ends, however it ends."""

    def __init__(self, nbytes: int, folder: str, staging: Staging | None) -> None:
        self.nbytes, self._staging = nbytes, staging
        self._file = unnamed_file(folder)
        try:
            reserve(self._file, nbytes, folder)
        except BaseException:
            self.__del__()
            raise

    def read(self, into: Tensor) -> None:
        host = into if self._staging is None else self._staging.like(into)
        move_all(os.preadv, self._file, host, 0)
        if self._staging is not None:
            self._staging.copy(into, host)

    def write(self, source: Tensor) -> None:
        host: Any = source.contiguous()
        if self._staging is not None:
            host = self._staging.like(source)
            self._staging.copy(host, source)
        move_all(os.pwritev, self._file, host, 0)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
