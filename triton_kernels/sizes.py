"""Arithmetic of sizes for launchers: Triton's functions of these names serve kernels too, and take microseconds."""

from __future__ import annotations


def cdiv(n: int, d: int) -> int:
    """n / d rounded up."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()
