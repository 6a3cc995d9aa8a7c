"""In which order a streamed run walks over its blocks, and what it keeps meanwhile.

A schedule is a list of steps for the forward and one for the backward. `Advance` runs a block forward, from its input
to the next one's; `Back` runs one backward. What has to be made again is an `Advance` in the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Advance:
    """Run `block` forward. `keep`: its save set is kept for its `Back`. `drop`: its input is not needed any more."""

    block: int
    keep: bool
    drop: bool


@dataclasses.dataclass(frozen=True)
class Back:
    """Run `block` backward, making again what was not kept of it, up to attention; its input is dropped."""

    block: int


Step = Advance | Back


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps before and after the loss, over blocks of which those from `first` on need gradients."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        yield from self.forward
        yield from self.backward


def without_gradient(blocks: int) -> Schedule:
    return Schedule(tuple(Advance(i, keep=False, drop=True) for i in range(blocks)), ())


def by_segments(blocks: int, length: int, first: int = 0) -> Schedule:
    """Every `length`-th block's input is kept, and the backward makes the inputs in between again.

    A segment of one block keeps its save set. In longer ones it is kept of all blocks but the last while the segment
    is walked back through.
    """
    ahead = [Advance(i, keep=False, drop=True) for i in range(first)]
    if length == 1:
        ahead += [Advance(i, keep=True, drop=False) for i in range(first, blocks)]
        return Schedule(tuple(ahead), tuple(Back(i) for i in reversed(range(first, blocks))))
    starts = list(range(first, blocks, length))
    ahead += [Advance(i, keep=False, drop=i not in starts) for i in range(first, blocks)]
    back: list[Step] = []
    for start in reversed(starts):
        segment = range(start, min(start + length, blocks))
        back += [Advance(i, keep=True, drop=False) for i in segment[:-1]]
        back += [Back(i) for i in reversed(segment)]
    return Schedule(tuple(ahead), tuple(back))
