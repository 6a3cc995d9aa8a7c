"""The streamed executor on a GPU: is memory flat over the length, are copies hidden, and what does a step take?

    python bench/stream_gpu.py                        # 32K to 128K tokens through two of Llama-8B's layers
    python bench/stream_gpu.py 1048576 --layers 1     # these lengths
    python bench/stream_gpu.py --quick                # two lengths and one tile

A causal language model in bf16, batch 1: token ids in, loss out, forward and backward. Streamed from page-locked host
memory, by our attention and by cuDNN's (PYCKPT_ATTENTION=cudnn), and, where it fits, the resident executor and
PyTorch's blocks under torch.utils.checkpoint over its best SDPA backend. Peaks are the allocator's, above weights,
gradients and token ids. Model FLOPs count causal attention as half and recomputation not at all; their utilisation is
of the bf16 rate in the chip's data sheet and, beside it, of a matrix product in the same run. "hidden" is the share
of the copies' time during which a kernel ran too, from a profiler's trace of a step. Writes
bench/results/stream_<device>.json after every case.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import block_gpu, common, steps
from pyckpt.compare.baseline import PlainCausalLM
from pyckpt.measure.flops import causal_lm_flops
from pyckpt.measure.units import format_bytes, format_seconds

STREAMED, CUDNN, RESIDENT, CHECKPOINT = "streamed", "cudnn", "resident", "checkpoint"
AIMS: dict[str, Any] = {"spread": 0.01, "hidden": 0.95, "utilisation": 0.40, "from_tokens": 131072}
PEAK = {"h100": 989.4, "h200": 989.4, "a100": 312.0}  # dense bf16 TFLOP/s, of the makers' data sheets
LLAMA: dict[str, Any] = {"vocab_size": 32000, "d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336}
SMALL: dict[str, Any] = {"vocab_size": 100, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 176}
Row = dict[str, Any]
Step = Callable[[torch.Tensor], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lengths", type=int, nargs="*")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tile", type=int, default=None, help="default 4096 and 8192")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps; 1: no other before it, and no trace")
    parser.add_argument("--quick", action="store_true", help="two lengths and one tile")
    parser.add_argument("--only", nargs="+", choices=(STREAMED, CUDNN, RESIDENT, CHECKPOINT))
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.out or common.RESULTS / f"stream_{common.short_name(device)}.json"
    if device.type == "cpu":
        raise SystemExit("this measures a GPU; bench/stream.py is for a CPU")
    lengths = options.lengths or ((32768, 131072) if options.quick else (32768, 65536, 131072))
    tiles = (options.tile,) if options.tile else (8192,) if options.quick else (4096, 8192)
    figures = Run(device, options.layers, options.repeats, LLAMA).all(
        lengths, tiles, options.only, options.budget, lambda found: common.write_to(path, found)
    )
    print(f"written to {path}")
    return int(any(r["variant"] == STREAMED and "failed" in r for r in figures["rows"]))


class Run:
    """One model, and what is measured of it."""

    def __init__(self, device: torch.device, layers: int, repeats: int, config: dict[str, Any]) -> None:
        self.device, self.layers, self.repeats, self.config = device, layers, repeats, config
        kind = {**config, "n_layers": layers, "device": device, "dtype": torch.bfloat16}
        self.ours = pyckpt.CkptCausalLM(**kind)
        self.plain = PlainCausalLM(**kind)
        self.plain.load_state_dict(self.ours.state_dict(), assign=True)
        for p in self.ours.parameters():
            p.grad = torch.zeros_like(p)
        ours = dict(self.ours.named_parameters())  # the two have them in different orders
        for name, p in self.plain.named_parameters():
            p.data, p.grad = ours[name].data, ours[name].grad
        self.product = common.ceiling(device.type)

    def all(
        self,
        lengths: Iterable[int],
        tiles: Iterable[int],
        only: list[str] | None,
        budget: float,
        save: Callable[[Row], Any],
    ) -> Row:
        """Every case, in the order of length."""
        start, rows = time.monotonic(), []
        head = {
            **common.stamp(self.device),
            "config": {**self.config, "n_layers": self.layers},
            "product_tflops": self.product,
            "peak_tflops": PEAK.get(common.short_name(self.device)),
            "aims": AIMS,
        }
        figures = {**head, "rows": rows, "spread": {}}
        print(f"{head['device']}: matrix product {self.product:.3g} TFLOP/s\n{HEADER}", flush=True)
        for length in sorted(lengths):
            for name, tile, step in self._variants(length, tiles):
                if only and name not in only:
                    continue
                row: Row = {"variant": name, "tile": tile, "length": length}
                if time.monotonic() - start > budget:
                    row["failed"] = "no time was left"
                else:
                    with steps.noting_failure(row):
                        row |= self._measure(length, step, name in (STREAMED, CUDNN) and self.repeats > 1)
                    steps.free(self.device)
                rows.append(row)
                figures["spread"] = spread(rows)
                print(line(row), flush=True)
                save(figures)
        print(f"spread of the streamed peaks: {figures['spread']}", flush=True)
        return figures

    def _variants(self, length: int, tiles: Iterable[int]) -> Iterable[tuple[str, int | None, Step]]:
        for tile in tiles:
            stream = pyckpt.Stream(tile, "host")
            for name, attention in ((STREAMED, "triton"), (CUDNN, "cudnn")):
                yield name, tile, functools.partial(self._streamed, stream, attention)
            del stream  # and its host memory with it, once the next case begins
        yield RESIDENT, None, lambda tokens: self.ours.loss(tokens).backward()
        best = functools.cache(lambda: self._best_sdpa(length))  # asked for once there is time for this variant

        def checkpointed(tokens: torch.Tensor) -> None:
            self.plain.model.layers.checkpointed = True
            with sdpa_kernel(block_gpu.attention.SDPA[best()]):
                self.plain.loss(tokens).backward()

        yield CHECKPOINT, None, checkpointed

    def _best_sdpa(self, length: int) -> str:
        if length > 65536:
            return "cudnn"
        config = {k: v for k, v in self.config.items() if k != "vocab_size"}
        found = block_gpu.best_sdpa(block_gpu.Setup(config, self.device, torch.bfloat16, 0), length)
        steps.free(self.device)
        return found["best"]

    def _streamed(self, stream: pyckpt.Stream, attention: str, tokens: torch.Tensor) -> None:
        with block_gpu.environment(PYCKPT_ATTENTION=attention):
            self.ours.loss(tokens, stream=stream).backward()

    def _measure(self, length: int, step: Step, traced: bool) -> Row:
        tokens = torch.randint(0, self.config["vocab_size"], (1, length), device=self.device)
        step(tokens[:, : 5 * 4096 // 2])  # compiles
        if self.repeats > 1:
            step(tokens)  # sets up the store's memory
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = [self._timed(step, tokens) for _ in range(self.repeats)]
        median = statistics.median(seconds)
        spec = self.ours.model.layers[0].spec
        flops = causal_lm_flops(spec, self.layers, self.config["vocab_size"], length)
        peak_rate = PEAK.get(common.short_name(self.device))
        found: Row = {
            "seconds": median,
            "all_seconds": seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "tflops": flops / median / 1e12,
            "of_product": flops / median / 1e12 / self.product,
        }
        if peak_rate:
            found["utilisation"] = flops / median / 1e12 / peak_rate
        if traced:
            untraced: Row = {}
            with steps.noting_failure(untraced):  # the times stay
                found |= trace(lambda: step(tokens))
            if untraced:
                found["untraced"] = untraced["failed"]
        return found

    def _timed(self, step: Step, tokens: torch.Tensor) -> float:
        start = time.perf_counter()
        step(tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - start


# --- a trace ------------------------------------------------------------------------------------------------


def trace(step: Callable[[], None]) -> Row:
    """Seconds of copies between host and device, the share of them under a kernel, and the kernels' by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as p:
        step()
        torch.cuda.synchronize()
    copies, kernels, by_name = [], [], {}
    for event in p.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        span = (event.time_range.start, event.time_range.end)
        host = "HtoD" in event.name or "DtoH" in event.name
        if host and "Pageable" not in event.name:
            copies.append(span)
        elif not host and span[1] > span[0]:
            kernels.append(span)
            by_name[event.name] = by_name.get(event.name, 0.0) + (span[1] - span[0]) / 1e6
    busy, total = union(kernels), sum(b - a for a, b in copies)
    top = sorted(by_name.items(), key=lambda pair: -pair[1])[:25]
    whole = max(b for _, b in kernels) - min(a for a, _ in kernels) if kernels else 0.0
    return {
        "copy_seconds": total / 1e6,
        "hidden": overlap(copies, busy) / total if total else None,
        "kernel_seconds": sum(b - a for a, b in busy) / 1e6,
        "traced_seconds": whole / 1e6,
        "kernels": {name[:100]: round(seconds, 6) for name, seconds in top},
    }


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans' union, as spans in order that do not touch."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def overlap(spans: list[tuple[float, float]], disjoint: list[tuple[float, float]]) -> float:
    """How long the spans are inside `disjoint`, each span counted by itself."""
    total, first = 0.0, 0
    for start, end in sorted(spans):
        while first < len(disjoint) and disjoint[first][1] <= start:
            first += 1
        for a, b in disjoint[first:]:
            if a >= end:
                break
            total += max(0.0, min(b, end) - max(a, start))
    return total


# --- what is shown ------------------------------------------------------------------------------------------


def spread(rows: list[Row]) -> dict[str, float]:
    """Of the streamed peaks over the lengths, tile by tile: the largest over the least, less one."""
    peaks: dict[str, list[int]] = {}
    for row in rows:
        if row["variant"] == STREAMED and "peak_bytes" in row:
            peaks.setdefault(str(row["tile"]), []).append(row["peak_bytes"])
    return {tile: max(found) / min(found) - 1 for tile, found in peaks.items()}


HEADER = f"{'length':>8} {'variant':11} {'tile':>5} {'time':>9} {'TFLOP/s':>8} {'MFU':>6} {'peak':>9} {'hidden':>7}"


def line(row: Row) -> str:
    start = f"{row['length']:8d} {row['variant']:11} {row['tile'] or '':>5}"
    if "failed" in row:
        return f"{start} {row['failed']}"[:118]
    used = f"{row['utilisation']:.1%}" if "utilisation" in row else "-"
    hidden = f"{row['hidden']:.1%}" if row.get("hidden") is not None else "-"
    return (
        f"{start} {format_seconds(row['seconds']):>9} {row['tflops']:8.4g} {used:>6} "
        f"{format_bytes(row['peak_bytes']):>9} {hidden:>7}"
    )


if __name__ == "__main__":
    sys.exit(main())
