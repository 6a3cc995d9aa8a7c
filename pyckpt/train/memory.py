"""The memory of a run: of one step, counted; of the whole process or GPU, so far."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one forward and backward, above weights and optimiser.

    peak_bytes: most at once, with the gradients. saved_bytes: what autograd kept from forward to backward.
    """

    peak_bytes: int
    saved_bytes: int


def probe(model: Any, step: Callable[[], object]) -> StepMemory:
    """Measure `step`, a forward and backward that changes nothing but gradients."""
    from pyckpt.measure import memory

    with memory(model) as measured:
        step()
    return StepMemory(measured.peak_bytes, measured.saved_bytes)


def peak_so_far(device: torch.device) -> tuple[str, int]:
    """What is told, and bytes: on CUDA the allocator's peak, else the most this process has held in RAM."""
    if device.type == "cuda":
        return "GPU", torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return "RSS", 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "RSS", peak if sys.platform == "darwin" else peak * 1024
