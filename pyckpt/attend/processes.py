"""The processes that share a sequence, which of its tokens each one has, and how tensors pass between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_KEYS, _GRADIENTS = 1, 2  # tags: two kinds of messages are under way between the same two processes


@dataclasses.dataclass(frozen=True)
class Spans:
    """Which tokens of `rows` sequences of `seq` tokens each of `processes` has: as many of every row as the others.

    balanced: a row is cut in two chunks for each process, of which process r has the r-th and the r-th from the end, so
    that each has as many pairs of a query and a key before it. Otherwise it is cut in one for each, in their order.
    """

    processes: int
    rows: int
    seq: int
    balanced: bool

    @property
    def chunks(self) -> int:
        """Of a row, all of one length."""
        return self.processes * (2 if self.balanced else 1)

    @property
    def here(self) -> int:
        """Tokens of a row that a process has."""
        return self.seq // self.processes

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The numbers of a process's chunks of a row."""
        return (rank, self.chunks - 1 - rank) if self.balanced else (rank,)

    def of(self, rank: int, row: int) -> list[tuple[slice, slice]]:
        """A process's ranges of a row: where they are among its own tokens, and on the flat axis of all."""
        length, own = self.seq // self.chunks, row * self.here
        found = []
        for i, chunk in enumerate(self.chunks_of(rank)):
            here, there = own + i * length, row * self.seq + chunk * length
            found.append((slice(here, here + length), slice(there, there + length)))
        return found

    def order(self) -> list[int]:
        """The number of each chunk of a row, as they lie when each process's are put one after another."""
        return [chunk for rank in range(self.processes) for chunk in self.chunks_of(rank)]


@dataclasses.dataclass(frozen=True)
class Processes:
    """A group of processes, and this one's place in it."""

    group: Any
    rank: int
    size: int

    def around(self, t: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Of each process its tensor, with that one's rank, this process's own first; all have one shape.

        The next one is under way while one is used, until which nobody may write to it.
        """
        for step in range(self.size):
            coming = self._pass_on(t, _KEYS) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, t
            if coming is not None:
                t = coming.wait()

    def around_and_home(self, t: Tensor, dtype: torch.dtype, add: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """As `around`; and a sum of t's shape, of what all processes `add` for it.

        add: called with a process's rank, its tensor, and where to add this process's share for it.
        """
        passing: Passing | None = None
        for owner, theirs in self.around(t):
            share = torch.zeros_like(theirs, dtype=dtype)
            add(owner, theirs, share)
            if passing is not None:
                share += passing.wait()
                passing = None  # what it held makes room for what comes next
            passing = self._pass_on(share, _GRADIENTS)
            del share
        assert passing is not None
        return passing.wait()

    def _pass_on(self, t: Tensor, tag: int) -> Passing:
        if self.size == 1:
            return Passing(t, t, [])
        into = torch.empty_like(t)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        send = dist.P2POp(dist.isend, t, group=self.group, group_peer=after, tag=tag)
        receive = dist.P2POp(dist.irecv, into, group=self.group, group_peer=before, tag=tag)
        return Passing(t, into, dist.batch_isend_irecv([send, receive]))

    def exchange(self, t: Tensor) -> Tensor:
        """t (processes, ...): the i-th goes to process i; gives what each of them has for this one."""
        into = torch.empty_like(t, memory_format=torch.contiguous_format)
        dist.all_to_all_single(into, t.contiguous(), group=self.group)
        return into


@dataclasses.dataclass(frozen=True)
class Passing:
    """A tensor on its way to the next process, and another one that comes from the one before."""

    leaves: Tensor  # held until it has left
    comes: Tensor
    work: list[Any]

    def wait(self) -> Tensor:
        for one in self.work:
            one.wait()
        return self.comes
