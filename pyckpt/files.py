"""Files that must not be lost: written under another name, synced, renamed; on the disk; with one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk itself."""
    folder = path.is_dir()
    # Windows can't open folders, and some network file systems can't sync them.
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def lock(file: Any, busy: str) -> None:
    """Lock an open file, or folder, until it is closed. Raises RuntimeError(busy) where another process has it.

    file: an object with fileno(), or a descriptor. Where the system or the file system has no locks nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(busy) from None
    except OSError:  # a file system without locks or, as NFS, without locks on folders
        return
