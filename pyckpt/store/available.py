"""How much host memory can be had: the machine's, and what the control group of a container leaves of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_MEMINFO, _OWN_GROUPS, _MOUNTS = "/proc/meminfo", "/proc/self/cgroup", "/proc/self/mounts"
_IN_MEMORY = ("tmpfs", "ramfs")


def available_bytes() -> int | None:
    """Host memory that can be had without swapping, None where the system does not say."""
    known = [n for n in (_of_machine(), *_of_groups()) if n is not None]
    return min(known, default=None)


def is_in_memory(folder: str) -> bool:
    """What is written to files of this folder takes host memory."""
    folder, found = os.path.realpath(folder), ("", "")
    for line in _lines(_MOUNTS):
        place, kind = line.split()[1:3]
        place = place.replace("\\040", " ")
        inside = folder == place or folder.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(found[0]):  # of two at one place the later one
            found = place, kind
    return found[1] in _IN_MEMORY


def _of_machine() -> int | None:
    for line in _lines(_MEMINFO):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_groups() -> Iterator[int | None]:
    """Of each control group that this process is in, of either version: its limit less what it uses and can't drop."""
    for line in _lines(_OWN_GROUPS):
        _, controllers, path = line.rstrip("\n").split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        inside = Path(path.lstrip("/"))
        for group in (root / inside, *(root / parent for parent in inside.parents), root):
            yield _of_group(group, "" if controllers else "v2")


def _of_group(group: Path, version: str) -> int | None:
    limit, used = ("memory.max", "memory.current") if version else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    droppable = "inactive_file" if version else "total_inactive_file"
    most, now = (next(iter(_lines(str(group / name))), "").strip() for name in (limit, used))
    if not most.isdecimal() or not now.isdecimal():  # "max", or no such group in this namespace
        return None
    stat = dict(line.split()[:2] for line in _lines(str(group / "memory.stat")) if len(line.split()) == 2)
    return max(0, int(most) - int(now) + int(stat.get(droppable, 0)))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readlines()
    except OSError:
        return []
