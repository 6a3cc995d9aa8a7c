"""In which order a streamed run walks over its blocks, and what it keeps meanwhile.

A schedule is a list of steps for the forward and one for the backward. `Advance` runs a block forward, from its input
to the next one's; `Back` runs one backward. What has to be made again is an `Advance` in the backward.
"""

from __future__ import annotations

import dataclasses
import functools
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

    @property
    def backward_blocks(self) -> list[int]:
        """The blocks that have a backward, the first one first."""
        return sorted(step.block for step in self.backward if isinstance(step, Back))


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


def by_slots(blocks: int, slots: int, first: int = 0) -> Schedule:
    """At most `slots` inputs are kept at a time (and up to two more while blocks are run again), and nothing else.

    The fewest repeated blocks that this allows: the binomial schedule of Griewank and Walther 2000 (algorithm 799,
    "revolve"), its splits found by dynamic programming instead of by their formula.
    """
    ahead: list[Step] = [Advance(i, keep=False, drop=True) for i in range(first)]
    if first == blocks:
        return Schedule(tuple(ahead), ())
    starts, free = [first], slots - 1
    while free and blocks - starts[-1] > 1:
        starts.append(starts[-1] + _split(blocks - starts[-1], free)[1])
        free -= 1
    # The last block goes backward first: its input is still there, in one of the two places that running again needs.
    ahead += [Advance(i, keep=False, drop=i not in (*starts, blocks - 1)) for i in range(first, blocks)]
    back: list[Step] = [Back(blocks - 1)]
    ends = [*starts[1:], blocks - 1]
    for n in reversed(range(len(starts))):
        if starts[n] == blocks - 1:
            continue
        stop = ends[n]
        _reverse(starts[n], stop, slots - 1 - n, back)
    return Schedule(tuple(ahead), tuple(back))


def _reverse(start: int, stop: int, free: int, steps: list[Step]) -> None:
    """Walk back over the blocks from `stop` to `start`, whose input is kept, with `free` slots for more."""
    if stop - start == 1:
        steps.append(Back(start))
        return
    ahead = _split(stop - start, free)[1] if free else stop - start - 1
    steps += [Advance(i, keep=False, drop=i != start) for i in range(start, start + ahead)]
    _reverse(start + ahead, stop, max(0, free - 1), steps)
    _reverse(start, start + ahead, free, steps)


@functools.cache
def _split(blocks: int, free: int) -> tuple[int, int]:
    """(repeated blocks, where to keep the next input) for so many blocks, of which the first one's input is kept."""
    if blocks == 1:
        return 0, 0
    if free == 0:
        return blocks * (blocks - 1) // 2, blocks - 1
    return min((m + _split(blocks - m, free - 1)[0] + _split(m, free)[0], m) for m in range(1, blocks))
