"""How evenly the forward's tiles fill a GPU under a causal mask, by simulation: hardware's order against persistent.

    python bench/schedule.py        # needs no GPU; writes bench/results/attention_schedule.json

Both take the tiles in the kernel's order (`split_program`: sections of heads, in each the longest tiles first). The
hardware gives the next tile to the first program that ends; persistent programs take one a round, by turns forwards
and backwards. Time is counted in key tiles; a tile costs its keys and a start and end worth `START`, of which a
persistent program saves `SAVED` (launch of a program; an assumption, to be replaced by the measured one).
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common

MULTIPROCESSORS, BLOCK_M, BLOCK_N = 132, 128, 128
START, SAVED = 1.5, 0.5
L2_BYTES = 50 << 20
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOKENS, HEADS, KV_HEADS, ROW_BYTES = 16384, 32, 8, 512


def tiles(seqlen: int, batch: int) -> Iterator[int]:
    """Key tiles of each query tile, in the kernel's order."""
    n_tiles, rows = -(-seqlen // BLOCK_M), HEADS * batch
    groups = HEADS // KV_HEADS
    section = groups * max(1, L2_BYTES // 2 // (seqlen * ROW_BYTES))
    for first in range(0, rows, section):
        for tile in reversed(range(n_tiles)):
            yield from [-(-(tile + 1) * BLOCK_M // BLOCK_N)] * min(section, rows - first)


def by_hardware(work: list[int]) -> float:
    """Time until the last program ends."""
    ends = [0.0] * MULTIPROCESSORS
    for n in work:
        heapq.heapreplace(ends, ends[0] + n + START)
    return max(ends)


def persistent(work: list[int]) -> float:
    """As above, every program taking one tile of each round, in turn from the left and from the right."""
    programs = range(MULTIPROCESSORS)
    rounds = [work[i : i + MULTIPROCESSORS] for i in range(0, len(work), MULTIPROCESSORS)]
    ends = [0.0] * MULTIPROCESSORS
    for k, taken in enumerate(rounds):
        for n, p in zip(taken, reversed(programs) if k % 2 else programs, strict=False):
            ends[p] += n + START - SAVED
    return max(ends)


def main() -> None:
    rows = []
    for seqlen in LENGTHS:
        batch = max(1, TOKENS // seqlen)
        work = list(tiles(seqlen, batch))
        least = sum(work) / MULTIPROCESSORS
        row = {
            "seqlen": seqlen,
            "batch": batch,
            "hardware": by_hardware(work) / least,
            "persistent": persistent(work) / least,
        }
        rows.append(row)
        print(
            f"{seqlen:6d} x {batch:2d}: hardware {row['hardware']:.3f}, persistent {row['persistent']:.3f} of the time"
            " with nothing idle"
        )
    path = common.write(
        "attention_schedule", {**common.stamp(), "assumed": {"start": START, "saved": SAVED}, "rows": rows}
    )
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
