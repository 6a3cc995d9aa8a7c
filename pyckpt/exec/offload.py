"""Resident execution with tensors that wait for the backward off the device.

Each node hands over a `Parcel`. The newest ones stay on the device, since the backward wants them at once. When a
further one comes, the oldest of those begins to leave, and its memory is given up one parcel later, a block's time in
which the copy hides. In the backward a node's parcel asks for the one before it, whose copy hides behind the node's own
work. So beside the newest ones two parcels at most are on the device.

Nothing need be known about the model: the queue is that of the forwards of one device, whoever runs them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from pyckpt.save import Save
from pyckpt.store import scratch_folder
from pyckpt.store.file import Scratch, Staging
from pyckpt.store.lanes import CudaLanes, Event, Lanes, ThreadLanes, in_a_lane
from pyckpt.store.pool import HostRoom, Pool, Room


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """The way off the device and back: copies, and the memory at its end."""

    lanes: Lanes
    pool: Pool


class _Item:
    """One tensor: on the device (`tensor`), in a `room`, or in both."""

    def __init__(self, tensor: Tensor, route: Route) -> None:
        self.like = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        self.device, self.route = tensor.device, route
        self.tensor: Tensor | None = tensor.detach()  # which shares the version
        self.room: Room | None = None
        self._leaving: Tensor | None = None  # what is copied: the tensor, or its values row after row
        self.spoiled = False
        self._version: int | None = tensor._version
        self._going: Event | None = None
        self._coming: Event | None = None

    def leave(self) -> None:
        if self.room is not None:  # it went when another of the parcel found no room
            return
        assert self.tensor is not None
        self.check()
        source = self.tensor.contiguous()
        self.room = self.route.pool.take(source.nbytes)
        self._leaving = source
        memory, lanes = self.room.memory, self.route.lanes
        after = [*self.room.place.before_write(), *_events(lanes.compute())]
        self._going = lanes.run("out", lambda: memory.write(source), after)
        self.room.place.was_written(self._going)

    def come(self) -> None:
        if self.tensor is not None:
            return
        assert self.room is not None
        into = torch.empty_like(self.like, device=self.device)
        memory, lanes = self.room.memory, self.route.lanes
        after = [*self.room.place.before_read(), *_events(lanes.compute())]
        self._coming = lanes.run("in", lambda: memory.read(into), after)
        self.room.place.was_read("in", self._coming)
        self.tensor, self._version = into, None  # written by the copy, whenever that runs, and seen by nobody else

    def take(self) -> Tensor:
        """The tensor, for compute that is queued from here on."""
        assert self.tensor is not None
        if self._coming is not None:
            self.route.lanes.hold([self._coming])
            self._coming = None
        self.check()
        return self.tensor

    def drop(self) -> None:
        """Give up the memory on the device, for compute that is queued from here on."""
        self.check()
        self.route.lanes.hold(self._copies())
        self.tensor = self._leaving = None

    def wait(self) -> None:
        """Wait for the copies on the host: so that the memory may be given up in any thread and stream."""
        self.route.lanes.wait(self._copies())

    def _copies(self) -> list[Event]:
        copies = [*_events(self._going), *_events(self._coming)]
        self._going = self._coming = None
        return copies

    def check(self) -> None:
        """Note whether somebody has written to the tensor since it was handed over."""
        if self.tensor is not None and self._version is not None and self.tensor._version != self._version:
            self.spoiled = True

    def give_room(self) -> None:
        if self.room is not None:
            self.route.pool.give(self.room)
            self.room = None


def _events(event: Event | None) -> list[Event]:
    return [] if event is None else [event]


class Parcel:
    """What one node hands over to its queue, from its forward to its backward."""

    def __init__(self, queue: Queue, tensors: dict[str, Tensor], routes: dict[str, Route]) -> None:
        # First what `__del__` reads: an interrupt may come at any time.
        self._queue, self._process = queue, os.getpid()
        self._items: dict[str, _Item] = {}
        self.before: weakref.ref[Parcel] | None = None
        device = next(iter(tensors.values())).device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.state = "here"  # then "leaving", "away", and "gone" when the backward is over
        self._items |= {n: _Item(t, routes[n]) for n, t in tensors.items()}

    def _on_its_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Another one's forward or backward may be what moves it: its tensors are of the stream of its own forward."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def leave(self) -> None:
        with self._on_its_stream():
            for item in self._items.values():
                item.leave()
        self.state = "leaving"

    def left(self) -> None:
        with self._on_its_stream():
            for item in self._items.values():
                item.drop()
        self.state = "away"

    def come(self) -> None:
        with self._on_its_stream():
            for item in self._items.values():
                item.come()

    def fetch(self) -> dict[str, Tensor]:
        """The tensors, for compute that is queued from here on; the parcel before is sent for."""
        with self._queue.lock:
            self.come()
            before = self.before() if self.before is not None else None
            if before is not None and before.state == "away":
                before.come()
            found = {n: item.take() for n, item in self._items.items()}
            odd = sorted(n for n, item in self._items.items() if item.spoiled)
        if odd:
            raise RuntimeError(
                f"{', '.join(odd)} of a block was modified by an inplace operation between its forward and its "
                "backward, which needs what it was. Write to a copy of it"
            )
        return found

    def rest(self) -> None:
        """A backward is over, and there will be another: what is in a room stays there."""
        with self._queue.lock:
            for item in self._items.values():
                if item.room is not None:
                    item.drop()
            self.state = "here" if self.state == "here" else "away"

    def release(self) -> None:
        """The last backward is over."""
        with self._queue.lock:
            for item in self._items.values():
                item.drop()
                item.give_room()
            self._items, self.state = {}, "gone"

    def __del__(self) -> None:
        # In a forked process nobody makes the copies that its parent's were waiting for.
        if not sys.is_finalizing() and self._process == os.getpid():
            self._queue.bury(self._items)


class Queue:
    """The parcels of one device, in the order of their forwards."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a parcel may die while another is at work
        self._order: list[weakref.ref[Parcel]] = []
        self._dead: collections.deque[dict[str, _Item]] = collections.deque()

    def bury(self, items: dict[str, _Item]) -> None:
        """Wait for what a parcel that nobody has any more still copies, and give its rooms back: now, or later.

        A collector may find it in any thread: in one that copies, which can't wait for itself, or while another thread
        holds the lock and waits for that one.
        """
        self._dead.append(items)
        if not in_a_lane() and self.lock.acquire(blocking=False):
            try:
                self.clear()
            finally:
                self.lock.release()

    def clear(self) -> None:
        """Bury those that are left. Under the lock."""
        while self._dead:
            for item in self._dead.popleft().values():
                item.wait()
                item.give_room()

    def add(self, tensors: dict[str, Tensor], routes: dict[str, Route], last: int) -> Parcel:
        """A parcel of these tensors. The `last` newest ones, this one among them, stay on the device for now."""
        with self.lock:
            self.clear()
            parcel = Parcel(self, tensors, routes)
            parcel.before = self._order[-1] if self._order else None
            for p in self._with("leaving"):
                p.left()
            staying = [*self._with("here"), parcel]
            for p in staying[: max(0, len(staying) - last)]:
                p.leave()
            self._order = [weakref.ref(p) for p in (*self._with("leaving"), *self._with("here"), parcel)]
            return parcel

    def _with(self, state: str) -> list[Parcel]:
        return [p for ref in self._order if (p := ref()) is not None and p.state == state]


def keep(tensors: dict[str, Tensor], save: Save) -> tuple[Parcel | None, dict[str, Tensor]]:
    """Hand over those of a node's tensors that wait elsewhere; the parcel, if there are any, and the other tensors."""
    device = next(iter(tensors.values())).device
    away = {n: p for n, p in save.away(device).items() if n in tensors}
    if not away:
        return None, tensors
    path = None if save.path is None else os.fspath(save.path)
    routes = {n: route_of(device, place, path) for n, place in away.items()}
    parcel = queue_of(device).add({n: tensors[n] for n in away}, routes, save.last)
    return parcel, {n: t for n, t in tensors.items() if n not in away}


def queue_of(device: torch.device) -> Queue:
    return _queue_of(device, os.getpid())


def route_of(device: torch.device, place: str, path: str | None) -> Route:
    return _route_of(device, place, path, os.getpid())


# Of each process its own: a forked one has its parent's files, and none of the threads that copy.


@functools.cache
def _queue_of(device: torch.device, process: int) -> Queue:
    return Queue()


@functools.cache
def _route_of(device: torch.device, place: str, path: str | None, process: int) -> Route:
    if place == "host":
        lanes: Lanes = CudaLanes(device)
        return Route(lanes, Pool(lambda nbytes: _locked_for(device, nbytes), lanes.wait))
    folder, staging, lanes = scratch_folder(path), Staging.of(device), ThreadLanes(device)
    return Route(lanes, Pool(lambda nbytes: Scratch(nbytes, folder, staging), lanes.wait))


def _locked_for(device: torch.device, nbytes: int) -> HostRoom:
    with torch.cuda.device(device):  # locking makes a context of the current one, which may be another
        return HostRoom(nbytes)
