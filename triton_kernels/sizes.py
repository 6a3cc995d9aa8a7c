"""Arithmetic of sizes for launchers: Triton's functions of these names serve kernels too, and take microseconds."""

from __future__ import annotations

import functools


def cdiv(n: int, d: int) -> int:
    """n / d rounded up."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def even_part(n: int, most: int) -> int:
    """The size of parts of n things, at most `most` and at least half of it, by which the last part is fullest."""
    if most >= n:
        return n
    return max(range(most, (most - 1) // 2, -1), key=lambda size: ((n - 1) % size + 1) / size)
