"""Lanes that delay every copy as long, or as little, as chance and its events have it: races show as wrong numbers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pyckpt.store import OpenStore, Plan, Store
from pyckpt.store.lanes import LANES
from pyckpt.store.memory import allocate
from pyckpt.store.staged import Staged


class Job:
    def __init__(self, work: Callable[[], None], after: Sequence[Job]) -> None:
        self.work, self.after, self.over = work, list(after), False


class DelayedLanes:
    """`Lanes` in one thread. A job runs when it is waited for, or by chance when its lane and its events allow.

    Compute runs at once, as on a CPU, unless a test queues it by `compute_job`, as a GPU does: then it is a third lane.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.queues: dict[str, deque[Job]] = {lane: deque() for lane in (*LANES, "compute")}
        self.last_compute: Job | None = None
        self.held: list[Job] = []
        self.deferred = False

    def compute(self) -> Job | None:
        return self.last_compute

    def compute_job(self, work: Callable[[], None]) -> None:
        self.last_compute = Job(work, self.held)
        self.queues["compute"].append(self.last_compute)
        self._perhaps()

    def run(self, lane: str, copy: Callable[[], None], after: Sequence[Job]) -> Job:
        job = Job(copy, after)
        self.queues[lane].append(job)
        self._perhaps()
        return job

    def hold(self, events: Sequence[Job]) -> None:
        if self.deferred:
            self.held = [*self.held, *events]
            return
        self.wait(events)

    def wait(self, events: Sequence[Job]) -> None:
        for job in events:
            while not job.over:
                self._one()

    def close(self, then: Callable[[], None]) -> None:
        while any(self.queues.values()):
            self._one()
        then()

    def _perhaps(self) -> None:
        while self.random.random() < 0.4 and self._one():
            pass

    def _one(self) -> bool:
        """Run the first job of some lane that may run; False when nothing is queued."""
        lanes = [q for q in self.queues.values() if q and all(j.over for j in q[0].after)]
        if not lanes:
            assert not any(self.queues.values()), "jobs wait for each other in a circle"
            return False
        queue = self.random.choice(lanes)
        job = queue.popleft()
        job.work()
        job.over = True
        return True


class MemoryBacking:
    """Tiles behind a ring, in plain memory."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.slabs = plan, allocate(plan, torch.device("cpu"))

    def read(self, key, into) -> None:
        into.copy_(self.slabs[key[:2]][self.plan.rows(key[2])])

    def write(self, key, source) -> None:
        self.slabs[key[:2]][self.plan.rows(key[2])].copy_(source)


class DelayedStore(Store):
    """A store whose every copy is delayed at random."""

    kind, limit = "host", None

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.opened: list[DelayedLanes] = []

    def open(self, plan: Plan, device: torch.device) -> OpenStore:
        self.opened.append(DelayedLanes(self.seed + len(self.opened)))
        return Staged(plan, device, MemoryBacking(plan), self.opened[-1], lambda: None)
