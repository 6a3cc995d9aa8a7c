"""How an executor and a store speak: tiles by key, buffers lent and given back."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from types import TracebackType

import torch
from torch import Tensor

from pyckpt.store.plan import Key, Plan


class OpenStore(ABC):
    """The tiles of one run. Every tensor it lends is (tokens of the tile, width), on the device that computes.

    A tile is written once by `new`, fill, `put`, and read by `get`, `release`, until it is written again or its
    tensor is freed. A running sum is `accumulate`, add, `put`. What was not put can't be read: no half-written tile
    is ever seen. Used by one thread.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self._held: set[Key] = set()
        self._process = os.getpid()

    def holds(self, key: Key) -> bool:
        return key in self._held

    @abstractmethod
    def new(self, key: Key) -> Tensor:
        """A buffer to be filled and then `put`."""

    @abstractmethod
    def get(self, key: Key) -> Tensor:
        """The tile, to be read until `release`."""

    @abstractmethod
    def change(self, key: Key) -> Tensor:
        """The tile, to be written over in part or whole, and `put`."""

    def accumulate(self, key: Key) -> Tensor:
        """The running sum, zeros where nothing was put yet; add to it and `put`."""
        return self.change(key) if self.holds(key) else self.new(key).zero_()

    @abstractmethod
    def put(self, key: Key) -> None:
        """The buffer of `new` or `change` is complete and goes to the store; it must not be used after this."""

    @abstractmethod
    def release(self, key: Key) -> None:
        """The tensor of `get` is not needed any more; it must not be used after this."""

    @abstractmethod
    def prefetch(self, key: Key) -> None:
        """Bring the tile on its way, if it exists and a buffer is free. Changes nothing but time."""

    def free(self, name: str, index: int) -> None:
        """Drop all tiles of one tensor. None of them may be on loan."""
        self._held -= {key for key in self._held if key[0] == name and key[1] == index}

    @abstractmethod
    def close(self) -> None:
        """Wait for the copies under way and give everything back. May be called twice."""

    def __enter__(self) -> OpenStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__.get("_process") == os.getpid():  # a forked one has neither the threads that copy nor CUDA
            self.close()

    def _check_held(self, key: Key) -> None:
        if key not in self._held:
            raise KeyError(f"tile {key} was never put into the store, or was freed")


class Store(ABC):
    """Where tiles are kept. Holds no tiles itself until `open`, which may be called for several runs at a time."""

    kind: str
    """"device", "host" or "file"."""
    limit: int | None
    """The most bytes that one run may take of it; None for what there is."""

    @abstractmethod
    def open(self, plan: Plan, device: torch.device) -> OpenStore:
        """Reserve all that the plan needs. Raises ValueError where the limit, MemoryError or OSError where the machine
        doesn't have it; nothing has run by then."""

    def copies(self, device: torch.device) -> bool:
        """Whether tiles come to the device by copies, into a ring of buffers there."""
        return True

    def device_bytes(self, plan: Plan, device: torch.device) -> int:
        """What it takes of the device's memory: the ring, or all tiles where they are there."""
        return plan.buffer_bytes if self.copies(device) else plan.store_bytes

    def check(self, plan: Plan) -> None:
        """Raise ValueError when the plan needs more than the limit."""
        if self.limit is not None and plan.store_bytes > self.limit:
            raise ValueError(
                f"this run needs {plan.store_bytes:,} bytes of {self.kind} storage, and the limit is {self.limit:,}; "
                "raise the limit, keep less (save='input', segments), or take a shorter sequence"
            )
