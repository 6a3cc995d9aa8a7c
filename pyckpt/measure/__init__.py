"""Memory, time and FLOPs, measured.

``memory()`` measures the peak of a piece of code and what autograd keeps from forward to backward;
``allocator_peak()`` asks PyTorch's CPU allocator for the same peak, as a cross-check; ``interleaved()`` times
variants against each other; ``block_flops()`` and ``causal_lm_flops()`` count model FLOPs.
"""

from __future__ import annotations

from pyckpt.measure.allocator import AllocatorPeak, allocator_peak
from pyckpt.measure.flops import attention_pairs, block_flops, causal_lm_flops
from pyckpt.measure.memory import Mark, MemoryMeasurement, memory
from pyckpt.measure.timing import Stats, interleaved
from pyckpt.measure.units import format_bytes, format_seconds

__all__ = [
    "AllocatorPeak",
    "Mark",
    "MemoryMeasurement",
    "Stats",
    "allocator_peak",
    "attention_pairs",
    "block_flops",
    "causal_lm_flops",
    "format_bytes",
    "format_seconds",
    "interleaved",
    "memory",
]
