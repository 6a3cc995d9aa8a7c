"""Wall time of several variants of the same work, measured against each other in one process."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Stats:
    """Seconds: the median, the interquartile range, and every run in order."""

    median: float
    iqr: float
    all: tuple[float, ...]

    @staticmethod
    def of(seconds: list[float]) -> Stats:
        if len(seconds) < 2:
            return Stats(seconds[0], 0.0, tuple(seconds))
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Stats(median, high - low, tuple(seconds))


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    *,
    device: torch.device | str = "cpu",
    head_start: int = 0,
) -> dict[str, Stats]:
    """Time every variant ``repeats`` times, in turn: a machine that slows down or warms up slows all of them
    alike.

    Each round runs every variant once, and each round starts with the next one, so that none always runs
    first. ``warmup`` rounds are run and thrown away. On CUDA (``device="cuda"``, ``"cuda:1"``) time is taken
    between two events on that device's current stream, with a synchronisation after each run; elsewhere by the wall
    clock. ``head_start`` keeps a CUDA device busy for that many clocks before each run: launches queue up meanwhile,
    and the time is the kernels' alone, without what the host takes to launch them.

    Raises:
        ValueError: when there is no variant, ``repeats`` < 1 or ``warmup`` < 0.
    """
    if not variants:
        raise ValueError("variants is empty; give at least one name and function")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} must be at least 1 and warmup={warmup} at least 0")
    device = torch.device(device)
    clock = functools.partial(_cuda_seconds, device, head_start) if device.type == "cuda" else _wall_seconds
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = clock(variants[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Stats.of(times) for name, times in seconds.items()}


def _wall_seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _cuda_seconds(device: torch.device, head_start: int, fn: Callable[[], Any]) -> float:
    with torch.cuda.device(device):  # events are of the current device, which may not be the one that works
        torch.cuda.synchronize()
        if head_start:
            torch.cuda._sleep(head_start)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
