"""Copies beside compute: lanes that run them in order, and the events that order them against each other.

There are two lanes, "in" (towards the device) and "out", since PCIe and most disks move both ways at once. A copy
begins after the events that it is given; it gives one back. So the staging logic (`staged`) is the same for CUDA
streams, for threads, and for the tests' lanes, which delay every copy as long as they may.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

LANES = ("in", "out")


class Event(Protocol):
    """The end of a copy, or of the compute queued so far. What it is, is the lanes' own business."""


class Lanes(Protocol):
    def compute(self) -> Event | None:
        """The end of all compute queued so far; None where that is over already."""

    def run(self, lane: str, copy: Callable[[], None], after: Sequence[Event]) -> Event:
        """Queue a copy, to begin when all of `after` are over."""

    def hold(self, events: Sequence[Event]) -> None:
        """What compute queues from here on begins when `events` are over."""

    def wait(self, events: Sequence[Event]) -> None:
        """Wait on the host until `events` are over."""

    def close(self, then: Callable[[], None]) -> None:
        """Wait for all that was queued, and do `then`."""


@dataclasses.dataclass
class Place:
    """Memory that compute and copies share: the end of the last write to it, and of the reads since, by who reads."""

    written: Event | None = None
    reads: dict[str, Event] = dataclasses.field(default_factory=dict)

    def before_read(self) -> list[Event]:
        return [] if self.written is None else [self.written]

    def before_write(self) -> list[Event]:
        return [*self.before_read(), *self.reads.values()]

    def was_written(self, event: Event | None) -> None:
        self.written = event
        self.reads = {}

    def was_read(self, who: str, event: Event | None) -> None:
        if event is not None:
            self.reads[who] = event  # a lane is in order: its last read is the end of all


class CudaLanes:
    """A stream for each lane. Nothing waits on the host; the allocator is never told, since all buffers are ours."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in LANES}

    def compute(self) -> Event | None:
        return torch.cuda.current_stream(self._device).record_event()

    def run(self, lane: str, copy: Callable[[], None], after: Sequence[Any]) -> Event:
        stream = self._streams[lane]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            copy()
        return stream.record_event()

    def hold(self, events: Sequence[Any]) -> None:
        stream = torch.cuda.current_stream(self._device)
        for event in events:
            stream.wait_event(event)

    def wait(self, events: Sequence[Any]) -> None:
        for event in events:
            event.synchronize()

    def close(self, then: Callable[[], None]) -> None:
        for stream in self._streams.values():
            stream.synchronize()
        then()


class ThreadLanes:
    """A thread for each lane: for copies that the host makes itself, as those of a file. Compute waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queues: dict[str, queue.SimpleQueue[_Job | None]] = {}
        self._threads: list[threading.Thread] = []
        for lane in LANES:
            jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
            thread = threading.Thread(target=_work, args=(jobs,), name=f"pyckpt-store-{lane}", daemon=True)
            thread.start()
            self._queues[lane] = jobs
            self._threads.append(thread)

    def compute(self) -> Event | None:
        if self._device.type != "cuda":
            return None
        return _Recorded(torch.cuda.current_stream(self._device).record_event(), self._device)

    def run(self, lane: str, copy: Callable[[], None], after: Sequence[Any]) -> Event:
        job = _Job(copy, after)
        self._queues[lane].put(job)
        return job

    def hold(self, events: Sequence[Any]) -> None:
        for event in events:
            event.hold()

    def wait(self, events: Sequence[Any]) -> None:
        for event in events:
            event.wait()

    def close(self, then: Callable[[], None]) -> None:
        for jobs in self._queues.values():
            jobs.put(None)
        threads, self._queues, self._threads = self._threads, {}, []
        if threading.current_thread() in threads:
            # What a user drops while copies are under way may go with the last one's reference to it: in its thread.
            threading.Thread(target=_end, args=(threads, then), name="pyckpt-store-close").start()
        else:
            _end(threads, then)


class _Recorded:
    """A CUDA event, waited for on the host."""

    def __init__(self, event: Any, device: torch.device) -> None:
        self._event, self._device = event, device

    def hold(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


class _Job:
    """A queued copy; also the event of its end. What it raises is raised again where it is waited for."""

    def __init__(self, copy: Callable[[], None], after: Sequence[Any]) -> None:
        self._copy: Callable[[], None] | None = copy
        self._after = after
        self._over = threading.Event()
        self._error: BaseException | None = None

    def __call__(self) -> None:
        try:
            for event in self._after:
                event.wait()
            assert self._copy is not None
            self._copy()
        except BaseException as error:
            self._error = error
        finally:
            self._copy, self._after = None, ()  # or events would chain every job to all before it
            self._over.set()

    def hold(self) -> None:
        self.wait()

    def wait(self) -> None:
        self._over.wait()
        if self._error is not None:
            raise self._error


def _end(threads: list[threading.Thread], then: Callable[[], None]) -> None:
    for thread in threads:
        thread.join()
    then()


_lane = threading.local()


def in_a_lane() -> bool:
    """In a thread that copies."""
    return hasattr(_lane, "here")


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    _lane.here = True
    while (job := jobs.get()) is not None:
        job()
        del job
