"""A scratch file, for a machine whose memory is the limit.

It is reserved whole before the run, so that a full disk shows then and not in the middle. It has no name from the
start: nothing is left of it when the process ends, however it ends. Tiles of a GPU are read and written by offset, not
mapped: their pages are the kernel's cache and never resident in the process. Those of a CPU: see `mapped`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from pyckpt.store.available import is_in_memory
from pyckpt.store.host import as_like, check_available
from pyckpt.store.plan import Key, Places, Plan


class ScratchFile:
    """`Backing` in a scratch file of `folder`."""

    def __init__(self, plan: Plan, folder: str, device: torch.device) -> None:
        self._places = Places(plan)
        self._scratch = Scratch(self._places.total, folder, Staging.of(device))

    def read(self, key: Key, into: Tensor) -> None:
        self._scratch.read(into, self._places.start(key))

    def write(self, key: Key, source: Tensor) -> None:
        self._scratch.write(source, self._places.start(key))


class Scratch:
    """`nbytes` bytes of an unnamed file of `folder`. Raises OSError where the disk has not enough room.

    Tensors that are read and written are contiguous; those of a GPU go through `staging`.
    """

    def __init__(self, nbytes: int, folder: str, staging: Staging | None) -> None:
        self.nbytes, self._staging = nbytes, staging
        with scratch_file(nbytes, folder) as file:
            self._file = os.dup(file)
        self.close = weakref.finalize(self, os.close, self._file)
        # At the process's end threads may still copy, and its number would be that of the next file to be opened.
        self.close.atexit = False

    def read(self, into: Tensor, offset: int = 0) -> None:
        host = into if self._staging is None else self._staging.like(into)
        _all(os.preadv, self._file, host, offset)
        if self._staging is not None:
            self._staging.copy(into, host)

    def write(self, source: Tensor, offset: int = 0) -> None:
        host = source
        if self._staging is not None:
            host = self._staging.like(source)
            self._staging.copy(host, source)
        _all(os.pwritev, self._file, host, offset)


class Staging(threading.local):
    """Page-locked memory between files and a GPU, for each thread that copies, and a stream to wait on."""

    def __init__(self, device: torch.device) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._stream = torch.cuda.Stream(device)

    @classmethod
    def of(cls, device: torch.device) -> Staging | None:
        """None for a device whose memory files are read into as they are."""
        return cls(device) if device.type == "cuda" else None

    def like(self, t: Tensor) -> Tensor:
        """Memory for a tensor, until the next call in this thread."""
        nbytes = t.numel() * t.element_size()
        if self._bytes.nbytes < nbytes:
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        return as_like(self._bytes, t)

    def copy(self, into: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        self._stream.synchronize()


@contextlib.contextmanager
def scratch_file(nbytes: int, folder: str) -> Iterator[int]:
    """A file of this folder that has no name, and so many bytes; closed at the end. Raises OSError where the disk has
    not enough room, and MemoryError where the folder is in memory that is not there."""
    if is_in_memory(folder):
        check_available(nbytes, f"{folder} is in memory: give a path on a disk, or keep less (save='input', segments)")
    file = _unnamed(folder)
    try:
        _reserve(file, nbytes, folder)
        yield file
    finally:
        os.close(file)


def _unnamed(folder: str) -> int:
    """A new file of this folder that has no name."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # not every file system has it
            return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
    file, name = tempfile.mkstemp(prefix="pyckpt-", dir=folder)
    os.unlink(name)
    return file


def _reserve(file: int, total: int, folder: str) -> None:
    """Let the file have so many bytes. Raises OSError where the disk has not."""
    if not hasattr(os, "posix_fallocate"):  # macOS: a full disk shows later there
        os.ftruncate(file, total)
        return
    try:
        os.posix_fallocate(file, 0, max(1, total))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        raise OSError(
            error.errno,
            f"the store needs a scratch file of {total:,} bytes in {folder}, which has {free:,} free "
            f"({error.strerror}); give another path, or keep less (save='input', segments)",
        ) from None


def _all(call: object, file: int, t: Tensor, offset: int) -> None:
    """Read or write all of a contiguous CPU tensor; the calls may stop short."""
    memory = memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr())).cast("B")
    done = 0
    while done < t.nbytes:
        moved = call(file, [memory[done:]], offset + done)  # type: ignore[operator]
        if moved <= 0:
            raise OSError(errno.EIO, f"the scratch file ends {t.nbytes - done} bytes early: was it truncated?")
        done += moved
