"""The peak of a function on the CPU as PyTorch's CPU allocator itself reports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch


@dataclass(frozen=True)
class AllocatorPeak:
    """Bytes above the start: the most allocated at once, and what was still allocated at the end."""

    peak_bytes: int
    live_bytes: int


def allocator_peak(fn: Callable[[], Any]) -> AllocatorPeak:
    """Run ``fn()`` once under `torch.profiler` and add up every CPU allocation and release in order of time.

    This sees the scratch tensors inside ATen kernels, which `memory` does not. It does not see what a library
    mallocs by itself (the packing buffers of a matrix product), and it can tell neither who keeps what nor
    what it is. ``fn``'s result is dropped before the end. No other profiler may be active.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as prof:
        fn()
    results = prof.profiler.kineto_results if prof.profiler is not None else None
    if results is None:
        raise RuntimeError("torch.profiler gave no result; is another profiler active?")
    cpu = torch.profiler.DeviceType.CPU
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type() == cpu]
    events.sort(key=lambda event: event.start_ns())
    running = list(accumulate(event.nbytes() for event in events))
    return AllocatorPeak(max([0, *running]), running[-1] if running else 0)
