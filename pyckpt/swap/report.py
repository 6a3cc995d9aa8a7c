"""What a swap did: for each layer and for the loss, which path it takes, and why."""

from __future__ import annotations

import dataclasses

STANDARD, GENERIC, CHECKPOINTED, ORIGINAL = "standard", "generic", "checkpointed", "original"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its class, its path, and why.

    path: "standard", "generic", "checkpointed" or "original".
    """

    name: str
    kind: str
    path: str
    why: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The entries of a swap, in the model's order. Printed, it is a table."""

    entries: tuple[Entry, ...]

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The modules that were swapped."""
        return tuple(e for e in self.entries if e.path != ORIGINAL)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The modules that were left as they are."""
        return tuple(e for e in self.entries if e.path == ORIGINAL)

    def __str__(self) -> str:
        rows = [("module", "class", "path", "why"), *(dataclasses.astuple(e) for e in self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.left)} left as they are"])
