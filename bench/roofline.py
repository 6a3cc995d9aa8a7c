"""What the attention kernels could reach on an H100, by arithmetic, beside what the compiler made of them.

    python bench/roofline.py        # compiles for sm_90, needs no GPU; writes bench/results/attention_static.json

Clocks of one multiprocessor for each score (query, key), from NVIDIA's H100 figures: 989 dense bf16 TFLOP/s on 132
multiprocessors at 1.83 GHz are 4096 FLOP a clock; 16 exponentials and 128 float32 operations a clock.
Two bounds: `apart` runs products, exponentials and arithmetic one after the other, `together` hides the smaller ones
behind the largest. A kernel without warp specialisation lies between, nearer to the first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common

PRODUCT, EXPONENTIALS, ARITHMETIC = 4096, 16, 128
PEAK_TFLOPS = 989
# Products of length head_dim a score, and float32 operations a score beside the exponential: scale and subtract, max,
# sum, rounding to bf16 (forward); scale and subtract, (dP - delta) P, two roundings (backward).
WORK = {"fwd": (2, 4), "dkdv": (4, 5), "dq": (3, 4)}
USEFUL = {"forward": 2, "backward": 5}


def clocks(op: str, head_dim: int) -> tuple[float, float, float]:
    """Of one score: products, exponentials, arithmetic."""
    products, operations = WORK[op]
    return products * 2 * head_dim / PRODUCT, 1 / EXPONENTIALS, operations / ARITHMETIC


def bounds(kind: str, head_dim: int) -> tuple[float, float]:
    """TFLOP/s of forward or backward, nothing overlapped and everything overlapped."""
    ops = ("fwd",) if kind == "forward" else ("dkdv", "dq")
    needed = USEFUL[kind] * 2 * head_dim / PRODUCT
    apart = sum(sum(clocks(op, head_dim)) for op in ops)
    together = sum(max(clocks(op, head_dim)) for op in ops)
    return PEAK_TFLOPS * needed / apart, PEAK_TFLOPS * needed / together


def kernels() -> list[dict[str, Any]]:
    """The compiler's report of the tuned kernels for sm_90, bf16, causal."""
    from pyckpt.triton_kernels.aot import attention
    from pyckpt.triton_kernels.aot import compile as aot

    found = []
    for report in aot.run(list(attention.cases("sm_90", quick=True))):
        case, config = report.case, report.case.config
        if case.op == "delta":
            continue
        figures = {f: getattr(report, f) for f in ("registers", "spilled", "shared", "unit", "programs")}
        tile = [config.block_m, config.block_n, config.num_warps, config.num_stages]
        dims = {"op": case.op, "head_dim": case.head_dim, "value_dim": case.value_dim}
        loads = "TMA" if config.tma and "pointers" not in case.features else "pointers"
        found.append({**dims, "config": tile, "loads": loads, **figures})
    return found


def main() -> None:
    dims = (64, 128, 256)
    reckoned = {
        kind: {str(d): dict(zip(("apart", "together"), bounds(kind, d), strict=True)) for d in dims} for kind in USEFUL
    }
    path = common.write("attention_static", {**common.stamp(), "bounds": reckoned, "kernels": kernels()})
    for kind, by_dim in reckoned.items():
        for d, both in by_dim.items():
            print(f"{kind:9} head dim {d:>3}: {both['apart']:4.0f} to {both['together']:4.0f} TFLOP/s")
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
