"""Does a GPU wait for the copies of a streamed run? A simulation of its schedule; a run on a GPU has to check it.

    python bench/stream_schedule.py    # needs no GPU; writes bench/results/stream_schedule.json

The executor itself runs, over the store's own ring of buffers and events, on tensors without memory (PyTorch's meta
device). Every op moves the compute clock by its FLOPs or its bytes, every copy that of its lane by its bytes; a lane
begins a copy when it is free and the events that the store gives are over, compute goes on when those it waits for are.
So the ring's size, the order of prefetches and every wait are those of the code. What is assumed are the rates below,
and that the host is always ahead. Blocks are Llama-8B's in bf16; model FLOPs count causal attention as half and
recomputation not at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common
from pyckpt.measure.flops import block_flops
from pyckpt.store import OpenStore, Plan, Store
from pyckpt.store.staged import Staged

LLAMA: dict[str, Any] = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336}
CASES = [(32_768, 1024), (32_768, 2048), (32_768, 4096), (131_072, 4096), (131_072, 8192)]


@dataclass(frozen=True)
class Rates:
    """Of an H100 with PCIe 5: assumed, a second. FLOPs of products and attention, bytes of memory and of a copy."""

    products: float = 600e12
    attention_forward: float = 450e12
    attention_backward: float = 300e12
    memory: float = 2.5e12
    copy: float = 50e9
    copy_start: float = 10e-6
    peak: float = 989e12  # dense bf16, of the data sheet


class Clocks:
    """`Lanes` whose events are points in time."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.now = {"compute": 0.0, "in": 0.0, "out": 0.0}
        self.busy = {"compute": 0.0, "in": 0.0, "out": 0.0}
        self.moved = 0

    def compute(self) -> float:
        return self.now["compute"]

    def run(self, lane: str, copy: Callable[[], None], after: Sequence[float]) -> float:
        copy()
        took = self.rates.copy_start + self.moved / self.rates.copy
        self.now[lane] = max(self.now[lane], *after, 0.0) + took
        self.busy[lane] += took
        return self.now[lane]

    def hold(self, events: Sequence[float]) -> None:
        self.now["compute"] = max(self.now["compute"], *events, 0.0)

    def spend(self, seconds: float) -> None:
        self.now["compute"] += seconds
        self.busy["compute"] += seconds

    def close(self, then: Callable[[], None]) -> None:
        then()


class Nowhere:
    """`Backing` without memory: it notes how much would move."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks

    def read(self, key: object, into: torch.Tensor) -> None:
        self.clocks.moved = into.nbytes

    def write(self, key: object, source: torch.Tensor) -> None:
        self.clocks.moved = source.nbytes


class SimulatedStore(Store):
    kind, limit = "host", None

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.plan: Plan | None = None

    def open(self, plan: Plan, device: torch.device) -> OpenStore:
        self.plan = plan
        return Staged(plan, device, Nowhere(self.clocks), self.clocks, lambda: None)


class Costs(TorchDispatchMode):
    """Moves the compute clock by what each op costs."""

    def __init__(self, clocks: Clocks) -> None:
        super().__init__()
        self.clocks = clocks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.clocks.spend(self._seconds(func, args, kwargs, out))
        return out

    def _seconds(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        rates, name = self.clocks.rates, func._schema.name
        if name in ("pyckpt::attention_tile_fwd_", "pyckpt::attention_tile_bwd_"):
            forward = name.endswith("fwd_")
            q, k = args[:2] if forward else args[1:3]
            starts = args[9:11] if forward else args[13:15]
            pairs = q.shape[1] * k.shape[1] * (0.5 if starts[0] == starts[1] else 1.0)
            flops = (4 if forward else 10) * pairs * q.shape[2] * q.shape[3]
            return flops / (rates.attention_forward if forward else rates.attention_backward)
        if name in ("aten::mm", "aten::addmm", "pyckpt::add_product_"):
            a, b = args[:2] if name == "aten::mm" else args[1:3]
            return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / rates.products
        if func.is_view or name.startswith("aten::empty"):
            return 0.0
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        return sum(t.numel() * t.element_size() for t in tensors.values()) / rates.memory


def simulate(length: int, tile: int, rates: Rates, **options: Any) -> dict[str, Any]:
    """One block's forward and backward inside a stack: the second of two, by the difference to one alone."""
    one, two = (_run(n, length, tile, rates, **options) for n in (1, 2))
    seconds = two["seconds"] - one["seconds"]
    busy = {lane: two["busy"][lane] - one["busy"][lane] for lane in one["busy"]}
    return {
        "length": length,
        "tile": tile,
        "seconds": seconds,
        "busy": busy,
        "copies_hidden": 1 - (seconds - busy["compute"]) / (busy["in"] + busy["out"]),
        "model_flops_utilisation": two["model_flops"] / seconds / rates.peak,
        "store_bytes_per_token": (two["store_bytes"] - one["store_bytes"]) / length,
        "buffer_bytes": two["buffer_bytes"],
    }


def _run(blocks: int, length: int, tile: int, rates: Rates, **options: Any) -> dict[str, Any]:
    clocks = Clocks(rates)
    store = SimulatedStore(clocks)
    kind = {**LLAMA, **options, "device": "meta", "dtype": torch.bfloat16, "tile": tile}
    stack = pyckpt.CkptTransformer([pyckpt.CkptTransformerBlock(**kind) for _ in range(blocks)])
    spec = stack[0].spec
    x = torch.empty(1, length, spec.d_model, device="meta", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty_like(x)
    with Costs(clocks):
        stack(x, stream=pyckpt.Stream(tile, store)).backward(dy)
    assert store.plan is not None
    return {
        "seconds": max(clocks.now.values()),
        "busy": clocks.busy,
        "model_flops": block_flops(spec, length),
        "store_bytes": store.plan.store_bytes,
        "buffer_bytes": store.plan.buffer_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    rates = Rates(**vars(parser.parse_args()))
    rows = []
    for length, tile in CASES:
        rows.append(simulate(length, tile, rates))
        r = rows[-1]
        print(
            f"S = {length:7,d}, tile {tile:5d}: {r['seconds']:8.3f} s a block, copies hidden "
            f"{r['copies_hidden']:6.1%}, "
            f"model FLOPs utilisation {r['model_flops_utilisation']:.1%}"
        )
    figures = {**common.stamp(), "assumed": asdict(rates), "block": LLAMA, "rows": rows}
    print(f"written to {common.write('stream_schedule', figures).relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
