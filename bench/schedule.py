"""How evenly attention's tiles fill a GPU under a causal mask, by simulation: hardware's order against persistent.

    python bench/schedule.py        # needs no GPU; writes bench/results/attention_schedule.json

Both take the tiles in the kernel's order (`split_program`: sections of heads, in each the longest tiles first). The
hardware gives the next tile to the first program that ends; persistent programs take one a round, by turns forwards
and backwards. Time is counted in tiles that one meets; a tile costs those and a start and end worth `START`, of which a
persistent program saves `SAVED` (launch of a program; an assumption, to be replaced by the measured one). "largest" is
the hardware's order with sections as large as half the L2 cache allows, and a last one of what is left.
"""

from __future__ import annotations

import dataclasses
import heapq
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from pyckpt.triton_kernels.sizes import cdiv, even_part

MULTIPROCESSORS = 132
START, SAVED = 1.5, 0.5
L2_BYTES = 50 << 20
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
TOKENS, ROW_BYTES = 16384, 512
HEADS = (
    (32, 8),
    (16, 16),
    (64, 8),
)  # queries', and keys' and values': Llama-8B, FlashAttention's benchmarks, Llama-70B


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Tokens of a tile, and programs that a multiprocessor holds."""

    block: int
    resident: int

    @property
    def programs(self) -> int:
        return self.resident * MULTIPROCESSORS


KERNELS = {"forward": Kernel(128, 1), "dkdv": Kernel(64, 2)}


def fit(tokens: int) -> int:
    """Heads of so many tokens of two tensors that half the L2 cache holds."""
    return L2_BYTES // 2 // (tokens * ROW_BYTES)


def tiles(seqlen: int, block: int, rows: int, section: int) -> Iterator[int]:
    """How many tiles each tile meets, in the kernel's order."""
    for first in range(0, rows, section):
        for tile in reversed(range(cdiv(seqlen, block))):
            yield from [tile + 1] * min(section, rows - first)


def by_hardware(work: list[int], programs: int) -> float:
    """Time until the last program ends."""
    ends = [0.0] * programs
    for n in work:
        heapq.heapreplace(ends, ends[0] + n + START)
    return max(ends)


def persistent(work: list[int], programs: int) -> float:
    """As above, every program taking one tile of each round, in turn from the left and from the right."""
    rounds = [work[i : i + programs] for i in range(0, len(work), programs)]
    ends, places = [0.0] * programs, range(programs)
    for k, taken in enumerate(rounds):
        for n, p in zip(taken, reversed(places) if k % 2 else places, strict=False):
            ends[p] += n + START - SAVED
    return max(ends)


def least(work: list[int], programs: int) -> float:
    """The time of an even distribution, with a start and an end for each tile."""
    return (sum(work) + START * len(work)) / programs


def case(name: str, seqlen: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Times over that of an even distribution."""
    kernel, batch = KERNELS[name], max(1, TOKENS // seqlen)
    keys, groups = kv_heads * batch, heads // kv_heads
    # A row of the forward is a head's queries, which go by its keys; of dK/dV a head's keys, which go by its queries.
    share, tokens = (groups, seqlen) if name == "forward" else (1, seqlen * groups)
    busy = cdiv(2 * MULTIPROCESSORS, share * cdiv(seqlen, kernel.block))
    sections = {"even": even_part(keys, max(fit(tokens), busy)), "largest": min(keys, max(1, fit(tokens)))}
    work = {k: list(tiles(seqlen, kernel.block, share * keys, share * n)) for k, n in sections.items()}
    even = least(work["even"], kernel.programs)
    times = {k: by_hardware(w, kernel.programs) / even for k, w in work.items()}
    times["persistent"] = persistent(work["even"], kernel.programs) / even
    return {"kernel": name, "seqlen": seqlen, "batch": batch, "heads": heads, "kv_heads": kv_heads, **times}


def main() -> None:
    rows = [case(name, seqlen, *heads) for name in KERNELS for heads in HEADS for seqlen in LENGTHS]
    for row in rows:
        print(
            f"{row['kernel']:7} {row['seqlen']:6} x {row['batch']:2}, {row['heads']}/{row['kv_heads']} heads: "
            f"{row['even']:.3f} of an even distribution's time (largest sections {row['largest']:.3f}), "
            f"persistent {row['persistent']:.3f}"
        )
    path = common.write(
        "attention_schedule", {**common.stamp(), "assumed": {"start": START, "saved": SAVED}, "rows": rows}
    )
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
