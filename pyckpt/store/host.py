"""Host memory behind a GPU's tiles, page-locked, so that copies run beside compute."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from pyckpt.store.memory import Slabs, allocate
from pyckpt.store.plan import Key, Plan

_PORTABLE = 1  # cudaHostRegisterPortable


class HostMemory:
    """`Backing` in page-locked host tensors.

    PyTorch's own page-locked allocator rounds up to a power of two, which at these sizes may be half of a machine's
    memory: we lock what we allocate ourselves.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._slabs: Slabs = allocate(plan, torch.device("cpu"))
        for t in self._slabs.values():
            lock(t)

    def read(self, key: Key, into: Tensor) -> None:
        into.copy_(self._rows(key), non_blocking=True)

    def write(self, key: Key, source: Tensor) -> None:
        self._rows(key).copy_(source, non_blocking=True)

    def _rows(self, key: Key) -> Tensor:
        name, index, tile = key
        return self._slabs[name, index][self._plan.rows(tile)]


def as_like(memory: Tensor, t: Tensor) -> Tensor:
    """The first bytes of uint8 `memory` as a tensor of the shape and dtype of t."""
    return memory[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)


def lock(t: Tensor) -> None:
    """Page-lock a tensor's memory until it is freed."""
    code = int(torch.cuda.cudart().cudaHostRegister(t.data_ptr(), t.nbytes, _PORTABLE))
    if code != 0:
        raise MemoryError(
            f"cudaHostRegister could not page-lock {t.nbytes:,} bytes of host memory (error {code}); free host memory, "
            "raise the locked-memory limit (ulimit -l), or use store='file'"
        )
    weakref.finalize(t.untyped_storage(), _unlock, t.data_ptr())


def _unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def available_bytes() -> int | None:
    """Host memory that can be had without swapping, None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def check_available(nbytes: int, else_do: str) -> None:
    """Raise MemoryError where the machine has not so much memory; `else_do` is what may help."""
    available = available_bytes()
    if available is not None and nbytes > available:
        raise MemoryError(f"this run needs {nbytes:,} bytes of host memory, and {available:,} are available; {else_do}")
