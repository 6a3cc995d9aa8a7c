"""Host memory behind a GPU's tiles, page-locked, so that copies run beside compute."""

from __future__ import annotations

import contextlib
import os
import weakref

import torch
from torch import Tensor

from pyckpt.store.available import available_bytes
from pyckpt.store.plan import Key, Places, Plan

_PORTABLE = 1  # cudaHostRegisterPortable
_ALIGNED = 64  # bytes, for any dtype


class LockedMemory:
    """`nbytes` of page-locked host memory.

    PyTorch's own page-locked allocator rounds up to a power of two, which at these sizes may be half of a machine's
    memory: we lock what we allocate ourselves.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        with torch.inference_mode(False):  # later runs, outside of it, write to it too
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        if nbytes:
            lock(self.bytes)


class HostMemory:
    """`Backing` in page-locked host memory, of which it takes what `bytes_of` says."""

    def __init__(self, plan: Plan, memory: LockedMemory) -> None:
        self._plan, self._places, self._bytes = plan, Places(plan, _ALIGNED), memory.bytes

    @staticmethod
    def bytes_of(plan: Plan) -> int:
        return Places(plan, _ALIGNED).total

    def read(self, key: Key, into: Tensor) -> None:
        into.copy_(self._rows(key), non_blocking=True)

    def write(self, key: Key, source: Tensor) -> None:
        self._rows(key).copy_(source, non_blocking=True)

    def _rows(self, key: Key) -> Tensor:
        slab, rows, start = self._plan.slab(key[0]), self._plan.rows(key[2]), self._places.start(key)
        count = rows.stop - rows.start
        return self._bytes[start : start + count * slab.token_bytes].view(slab.dtype).view(count, slab.width)


def as_like(memory: Tensor, t: Tensor) -> Tensor:
    """The first bytes of uint8 `memory` as a tensor of the shape and dtype of t."""
    return memory[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)


def lock(t: Tensor) -> None:
    """Page-lock a tensor's memory until it is freed."""
    code = int(torch.cuda.cudart().cudaHostRegister(t.data_ptr(), t.nbytes, _PORTABLE))
    if code != 0:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # CUDA keeps the error for the next launch, which may be of store="file"
        raise MemoryError(
            f"cudaHostRegister could not page-lock {t.nbytes:,} bytes of host memory (error {code}); free host memory, "
            "raise the locked-memory limit (ulimit -l), or use store='file'"
        )
    weakref.finalize(t.untyped_storage(), _unlock, t.data_ptr(), os.getpid())


def _unlock(address: int, process: int) -> None:
    if os.getpid() == process:  # a forked one has the memory too, and no CUDA
        torch.cuda.cudart().cudaHostUnregister(address)


def check_available(nbytes: int, else_do: str) -> None:
    """Raise MemoryError where the machine has not so much memory; `else_do` is what may help."""
    available = available_bytes()
    if available is not None and nbytes > available:
        raise MemoryError(f"this run needs {nbytes:,} bytes of host memory, and {available:,} are available; {else_do}")
