"""How evenly the forward's tiles fill a GPU under a causal mask, by simulation: hardware's order against persistent.

    python bench/schedule.py        # needs no GPU; writes bench/results/attention_schedule.json

Both take the tiles in the kernel's order (`split_program`: sections of heads, in each the longest tiles first). The
hardware gives the next tile to the first program that ends; persistent programs take one a round, by turns forwards
and backwards. Time is counted in key tiles; a tile costs its keys and a start and end worth `START`, of which a
persistent program saves `SAVED` (launch of a program; an assumption, to be replaced by the measured one). "largest" is
the hardware's order with sections as large as the L2 cache allows, and a last one of what is left.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from pyckpt.triton_kernels.sizes import cdiv, even_part

MULTIPROCESSORS, BLOCK_M, BLOCK_N = 132, 128, 128
START, SAVED = 1.5, 0.5
L2_BYTES = 50 << 20
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOKENS, ROW_BYTES = 16384, 512
HEADS = ((32, 8), (16, 16))  # queries', and keys' and values': Llama-8B, FlashAttention's benchmarks


def fit(seqlen: int) -> int:
    """Heads of keys and values that half the L2 cache holds."""
    return max(1, L2_BYTES // 2 // (seqlen * ROW_BYTES))


def tiles(seqlen: int, rows: int, section: int) -> Iterator[int]:
    """Key tiles of each query tile, in the kernel's order."""
    for first in range(0, rows, section):
        for tile in reversed(range(cdiv(seqlen, BLOCK_M))):
            yield from [cdiv((tile + 1) * BLOCK_M, BLOCK_N)] * min(section, rows - first)


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


def case(seqlen: int, heads: int, kv_heads: int) -> dict[str, float]:
    """Times over that of an even distribution, with a start and an end for each tile of the hardware's."""
    batch = max(1, TOKENS // seqlen)
    rows, keys, groups = heads * batch, kv_heads * batch, heads // kv_heads
    even = list(tiles(seqlen, rows, groups * even_part(keys, fit(seqlen))))
    largest = list(tiles(seqlen, rows, groups * min(keys, fit(seqlen))))
    least = (sum(even) + START * len(even)) / MULTIPROCESSORS
    times = {"even": by_hardware(even), "largest": by_hardware(largest), "persistent": persistent(even)}
    return {"seqlen": seqlen, "batch": batch, "heads": heads, "kv_heads": kv_heads} | {
        name: time / least for name, time in times.items()
    }


def main() -> None:
    rows = [case(seqlen, *heads) for heads in HEADS for seqlen in LENGTHS]
    for row in rows:
        print(
            f"{row['seqlen']:6.0f} x {row['batch']:2.0f}, {row['heads']:.0f}/{row['kv_heads']:.0f} heads: "
            f"{row['even']:.3f} of an even distribution's time (largest sections {row['largest']:.3f}), "
            f"persistent {row['persistent']:.3f}"
        )
    path = common.write(
        "attention_schedule", {**common.stamp(), "assumed": {"start": START, "saved": SAVED}, "rows": rows}
    )
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
