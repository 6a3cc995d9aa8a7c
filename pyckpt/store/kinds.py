"""The stores that users choose from: "device", "host" and "file"."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from pyckpt.store import mapped
from pyckpt.store.file import ScratchFile
from pyckpt.store.host import HostMemory, LockedMemory, check_available
from pyckpt.store.interface import OpenStore, Store
from pyckpt.store.lanes import CudaLanes, ThreadLanes
from pyckpt.store.memory import InMemory, allocate
from pyckpt.store.plan import Plan
from pyckpt.store.staged import Staged

_LOCKED = "locked"


class _Reusing(Store):
    """A store that keeps the memory of its last run for the next one of the same plan."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise ValueError(f"limit must be None or a number of bytes >= 0, got {limit!r}")
        self.limit = limit

    _idle: tuple[Any, Any] | None = None

    def _memory(self, kind: Any, make: Any, fits: Callable[[Any], bool] = lambda memory: True) -> Any:
        idle = vars(self).pop("_idle", None)  # in one step: runs of other threads may be opened meanwhile
        if idle is not None and idle[0] == kind and fits(idle[1]):
            return idle[1]
        del idle
        return make()

    def _keep(self, kind: Any, memory: Any) -> None:
        self._idle = (kind, memory)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, as of a model that holds it: memory, or a file, is not to be shared with one."""
        return {name: value for name, value in self.__dict__.items() if name != "_idle"}


class DeviceStore(_Reusing):
    """Tiles stay in the device's own memory: streamed execution where only the transient is the problem."""

    kind = "device"

    def copies(self, device: torch.device) -> bool:
        return False

    def open(self, plan: Plan, device: torch.device) -> OpenStore:
        self.check(plan)
        # Of the stream too: compute on another one would not wait for the last run's, nor the allocator for that.
        kind = (plan, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None)
        slabs = self._memory(kind, lambda: allocate(plan, device))
        return InMemory(plan, device, slabs, lambda memory: self._keep(kind, memory))


class HostStore(_Reusing):
    """Tiles in the host's memory, page-locked. On a CPU that is the device's own memory, and nothing is copied."""

    kind = "host"

    def copies(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def open(self, plan: Plan, device: torch.device) -> OpenStore:
        self.check(plan)
        kind = (plan, device.type)
        if not self.copies(device):
            slabs = self._memory(kind, lambda: self._reserve(plan, lambda: allocate(plan, device)))
            return InMemory(plan, device, slabs, lambda memory: self._keep(kind, memory))
        with torch.cuda.device(device):  # locking makes a context of the current one, which may be another
            memory = self._locked(plan)
        return Staged(plan, device, HostMemory(plan, memory), CudaLanes(device), lambda: self._keep(_LOCKED, memory))

    def _locked(self, plan: Plan) -> LockedMemory:
        """The last run's memory where it is large enough, whatever its plan was: locking takes longer than a step."""
        nbytes = HostMemory.bytes_of(plan)
        return self._memory(
            _LOCKED, lambda: self._reserve(plan, lambda: LockedMemory(nbytes)), lambda memory: memory.nbytes >= nbytes
        )

    @staticmethod
    def _reserve(plan: Plan, make: Any) -> Any:
        check_available(
            plan.store_bytes, "keep less (save='input', segments), use store='file', or take a shorter sequence"
        )
        return make()


class FileStore(_Reusing):
    """Tiles in a scratch file of the folder `path` (default: the system's temporary one, which may be in memory)."""

    kind = "file"

    def __init__(self, path: str | os.PathLike[str] | None = None, limit: int | None = None) -> None:
        super().__init__(limit)
        self.path = scratch_folder(path)

    def copies(self, device: torch.device) -> bool:
        return device.type != "cpu" or not mapped.USABLE

    def device_bytes(self, plan: Plan, device: torch.device) -> int:
        return plan.buffer_bytes if self.copies(device) else 0  # tiles are lent where they are, in the file

    def open(self, plan: Plan, device: torch.device) -> OpenStore:
        self.check(plan)
        kind = (plan, device, os.getpid())  # a forked process has its parent's file, and needs one of its own
        if not self.copies(device):
            file = self._memory(kind, lambda: mapped.MappedFile(plan, self.path))
            return mapped.Mapped(plan, device, file, lambda: self._keep(kind, file))
        scratch = self._memory(kind, lambda: ScratchFile(plan, self.path, device))
        return Staged(plan, device, scratch, ThreadLanes(device), lambda: self._keep(kind, scratch))


def scratch_folder(path: str | os.PathLike[str] | None) -> str:
    """The folder for scratch files, by default the system's. Raises ValueError where none can be made there."""
    folder = os.fspath(path) if path is not None else tempfile.gettempdir()
    if not os.path.isdir(folder):
        raise ValueError(f"path={folder!r} is no folder; give one that exists, for the scratch file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"path={folder!r} can't be written to; give a folder of your own for the scratch file")
    return os.path.abspath(folder)  # whatever the working directory is when a run needs it


STORES = ("device", "host", "file")


def make_store(store: str | Store, path: str | os.PathLike[str] | None = None, limit: int | None = None) -> Store:
    """The store of this name; a `Store` as it is. Raises ValueError for an unknown one, or options it does not take."""
    if isinstance(store, Store):
        if path is not None or limit is not None:
            raise ValueError("path and limit belong to the Store that was given; set them there")
        return store
    if store not in STORES:
        raise ValueError(f"store={store!r} does not exist; expected one of {', '.join(map(repr, STORES))}, or a Store")
    if path is not None and store != "file":
        raise ValueError(f"path={os.fspath(path)!r} was given with store={store!r}; only store='file' has one")
    if store == "file":
        return FileStore(path, limit)
    return HostStore(limit) if store == "host" else DeviceStore(limit)
