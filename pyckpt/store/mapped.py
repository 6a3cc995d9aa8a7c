"""A scratch file whose tiles are lent where they are: for a device that computes in the host's memory.

The file is mapped, and a tile is a view of its pages in the kernel's cache: nothing is copied, and no thread of ours
competes with those that compute. The pages of tiles that were lent are taken out of the process's page table when they
are more than a ring of buffers would hold, so that neither live tensors nor resident memory grow with the file. (Taken
out one by one as tiles are given back, they would stop the other threads each time.) When pages are written to the
disk, and which stay in memory, is the kernel's business; where memory may not hold them all, `prefetch` asks for them.
A disk that is full is found out when the file is reserved; one that fails to read ends the process (SIGBUS).
What each of these costs: bench/NOTES.md, "A mapped file".
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from pyckpt.store.available import available_bytes
from pyckpt.store.file import scratch_file
from pyckpt.store.interface import OpenStore
from pyckpt.store.plan import Key, Places, Plan

_ALIGNED = 64  # as PyTorch's own memory: how products round may depend on it
_POPULATE_WRITE = 23  # of Linux 5.14; before it pages are entered one by one, when they are touched
_RESIDENT = 16 << 20  # bytes of pages that may stay entered, however small the tiles
USABLE = all(hasattr(mmap, name) for name in ("MADV_DONTNEED", "MADV_WILLNEED"))


class MappedFile:
    """An unnamed scratch file of `folder`, reserved and mapped whole. Raises OSError where the disk has no room."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self._plan, self._places = plan, Places(plan, _ALIGNED)
        total = self._places.total
        with scratch_file(total, folder) as file:
            self._map = mmap.mmap(file, max(1, total))
        available = available_bytes()
        self._fits = available is not None and total < available // 2
        self._most = max(_RESIDENT, plan.buffer_bytes)
        self._entered: dict[tuple[int, int], bool] = {}  # spans, and whether for writing too
        self._entered_bytes = 0

    def view(self, key: Key) -> Tensor:
        slab, rows = self._plan.slab(key[0]), self._plan.rows(key[2])
        made = torch.empty(0, dtype=slab.dtype, device="cpu")
        shape = rows.stop - rows.start, slab.width
        count = shape[0] * shape[1]
        if count == 0:
            return made.view(shape)
        there = torch.frombuffer(self._map, dtype=slab.dtype, count=count, offset=self._places.start(key))
        # frombuffer is no op that a dispatch mode sees: one that counts memory would take the tile for an old tensor.
        return made.set_(there.untyped_storage(), 0, shape, (slab.width, 1))

    def enter(self, key: Key, writing: bool) -> None:
        """Account for the tile's pages in the page table; those to be written are entered all in one call.

        The kernel enters those that are read many at a time by itself.
        """
        span = self._span(key)
        if span in self._entered and self._entered[span] >= writing:
            return
        if span not in self._entered:
            nbytes = span[1] - span[0]
            if self._entered_bytes + nbytes > self._most:
                self.leave()
            self._entered_bytes += nbytes
        self._entered[span] = writing
        if writing:
            with contextlib.suppress(OSError):
                self._advise(_POPULATE_WRITE, span)

    def leave(self) -> None:
        """All pages out of it. What they hold stays in the file; those in use come back when they are touched."""
        self._advise(mmap.MADV_DONTNEED, (0, len(self._map)))
        self._entered.clear()
        self._entered_bytes = 0

    def fetch(self, key: Key) -> None:
        """Let the kernel read the tile's pages, beside whatever runs, if they may not be in memory."""
        span = self._span(key)
        if not self._fits and span not in self._entered:
            self._advise(mmap.MADV_WILLNEED, span)

    def _advise(self, what: int, span: tuple[int, int]) -> None:
        first = span[0] // mmap.PAGESIZE * mmap.PAGESIZE
        if span[1] > first:
            self._map.madvise(what, first, span[1] - first)

    def _span(self, key: Key) -> tuple[int, int]:
        """The tile's bytes in the file."""
        rows, start = self._plan.rows(key[2]), self._places.start(key)
        return start, start + (rows.stop - rows.start) * self._plan.slab(key[0]).token_bytes


class Mapped(OpenStore):
    """`OpenStore` of a mapped file. `done` is called once, when the run is over."""

    def __init__(self, plan: Plan, device: torch.device, file: MappedFile, done: Callable[[], None]) -> None:
        super().__init__(plan, device)
        self._file: MappedFile | None = file
        self._done = done

    def new(self, key: Key) -> Tensor:
        self._held.discard(key)
        return self._lend(key, writing=True)

    def get(self, key: Key) -> Tensor:
        self._check_held(key)
        return self._lend(key, writing=False)

    def change(self, key: Key) -> Tensor:
        self._check_held(key)
        self._held.discard(key)
        return self._lend(key, writing=True)

    def put(self, key: Key) -> None:
        self._held.add(key)

    def release(self, key: Key) -> None:
        pass

    def prefetch(self, key: Key) -> None:
        if key in self._held:
            assert self._file is not None, "the store is closed"
            self._file.fetch(key)

    def close(self) -> None:
        file = self.__dict__.get("_file")
        self._file = None
        if file is not None:
            file.leave()
            self._done()

    def _lend(self, key: Key, writing: bool) -> Tensor:
        assert self._file is not None, "the store is closed"
        self._file.enter(key, writing)
        return self._file.view(key)
