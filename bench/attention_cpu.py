"""Attention on a CPU: the compiled kernels against PyTorch's own.

    python bench/attention_cpu.py                # about 8 minutes on 2 cores
    python bench/attention_cpu.py --quick --out FILE

Each case runs by the kernels of csrc/cpu in every instruction set that the machine has, and by what a user of PyTorch
would call: `scaled_dot_product_attention` where it takes the case (with a mask for a window), products otherwise.
Variants take turns in one process; medians. FLOPs are 4 D for a visible pair of query and key in the forward and 2.5
times that in the backward. Writes bench/results/attention_cpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common
from pyckpt.measure.timing import interleaved
from pyckpt.ops.cpu_library import library

PYTORCH = "PyTorch"


@dataclasses.dataclass(frozen=True)
class Case:
    """One causal (or full) problem of one sequence."""

    name: str
    length: int
    heads: int = 16
    kv_heads: int = 4
    dim: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        n, w = self.length, self.length if self.window is None else self.window + 1
        return n * n if not self.causal else w * (w + 1) // 2 + (n - w) * w if w < n else n * (n + 1) // 2

    @property
    def flops(self) -> float:
        """Of the forward."""
        return 4.0 * self.pairs * self.heads * self.dim


CASES = (
    Case("causal", 512),
    Case("causal", 4096),
    Case("causal", 16384),
    Case("full", 4096, causal=False),
    Case("causal, as many K/V heads", 4096, kv_heads=16),
    Case("causal", 4096, heads=8, kv_heads=2, dim=128),
    Case("causal", 2048, heads=4, kv_heads=2, dim=256),
    Case("causal, bfloat16", 2048, dtype=torch.bfloat16),
    Case("causal, float16", 2048, dtype=torch.float16),
    Case("window of 512", 8192, window=511),
    Case("softcap", 2048, softcap=50.0),
    Case("dropout", 1024, heads=12, kv_heads=12, dropout=0.1),
)


def ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    options = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    return pyckpt.attention(q, k, v, **options, dropout=case.dropout, seed=1 if case.dropout else None)


def theirs(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What PyTorch has for it, q (B, S, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if case.softcap is not None:
        return _products(case, q, k, v).transpose(1, 2)
    mask = None
    if case.window is not None:
        at = torch.arange(case.length)
        distance = at.unsqueeze(1) - at
        mask = (distance >= 0) & (distance <= case.window)
    causal = case.causal and mask is None
    gqa = case.heads != case.kv_heads
    o = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=case.dropout, is_causal=causal, enable_gqa=gqa)
    return o.transpose(1, 2)


def _products(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert case.softcap is not None
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, dim=1) for t in (k, v))
    s = (q @ k.transpose(-1, -2)) * case.dim**-0.5
    s = case.softcap * torch.tanh(s / case.softcap)
    hidden = torch.ones(case.length, case.length, dtype=torch.bool).triu(1)
    return s.masked_fill(hidden, float("-inf")).softmax(-1) @ v


@contextlib.contextmanager
def chosen(variant: str) -> Iterator[None]:
    """With the instruction set of this name, unless it is PyTorch's."""
    before = os.environ.pop("PYCKPT_CPU_ISA", None)
    if variant != PYTORCH:
        os.environ["PYCKPT_CPU_ISA"] = variant
    try:
        yield
    finally:
        os.environ.pop("PYCKPT_CPU_ISA", None)
        if before is not None:
            os.environ["PYCKPT_CPU_ISA"] = before


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    shapes = [(1, case.length, h, case.dim) for h in (case.heads, case.kv_heads, case.kv_heads)]
    leaves = [torch.randn(s, dtype=case.dtype, requires_grad=True) for s in shapes]
    do = torch.randn(shapes[0]).to(case.dtype)
    forwards: dict[str, Callable[[], Any]] = {}
    backwards: dict[str, Callable[[], Any]] = {}
    results = {}
    for name in (*library.instruction_sets, PYTORCH):
        fn = theirs if name == PYTORCH else ours
        with chosen(name):
            o = fn(case, *leaves)
            results[name] = [o.detach(), *torch.autograd.grad(o, leaves, do, retain_graph=True)]
        forwards[name] = chosen(name)(lambda fn=fn: fn(case, *(t.detach() for t in leaves)))
        backwards[name] = chosen(name)(lambda o=o: torch.autograd.grad(o, leaves, do, retain_graph=True))
    if not case.dropout:  # which draws otherwise
        _check(case, results)
    times = [interleaved(runs, repeats, warmup=1, device="cpu") for runs in (forwards, backwards)]
    rows = []
    for name in forwards:
        row: dict[str, Any] = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "variant": name}
        for kind, factor, found in zip(("forward", "backward"), (1.0, 2.5), times, strict=True):
            seconds = found[name]
            row |= {f"{kind}_ms": seconds.median * 1e3, f"{kind}_iqr_ms": seconds.iqr * 1e3}
            row[f"{kind}_gflops"] = case.flops * factor / seconds.median / 1e9
        rows.append(row)
    return rows


def _check(case: Case, results: dict[str, list[Tensor]]) -> None:
    """All variants compute the same: to the rounding of the dtype, with room for sums."""
    for name, found in results.items():
        for got, want in zip(found, results[PYTORCH], strict=True):
            error = (got.double() - want.double()).norm() / want.double().norm()
            if not error < 100 * torch.finfo(case.dtype).eps:
                raise RuntimeError(f"{case}: {name} differs from PyTorch by {error:.2e}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the shorter cases, a few times")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of under bench/results/")
    options = parser.parse_args(argv)
    if library.problem:
        parser.error(f"no CPU kernels: {library.problem}; run make cpu")
    if options.quick and options.out is None:
        parser.error("--quick needs --out FILE: its figures are no results")
    top = 1e3 * common.ceiling("cpu")
    print(f"{common.device_name(torch.device('cpu'))}: matrix product {top:.0f} GFLOP/s")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if options.quick and case.length > 1024:
            continue
        new = measure(case, 3 if case.length > 8192 or options.quick else 9)
        rows += new
        for row in new:
            both = " ".join(f"{kind} {row[f'{kind}_gflops']:5.0f}" for kind in ("forward", "backward"))
            print(f"{case.length:6} d{case.dim:<3} {case.name:26} {row['variant']:8} {both} GFLOP/s", flush=True)
    figures = {**common.stamp(), "product_gflops": top, "rows": rows}
    path = common.write_to(options.out, figures) if options.out else common.write("attention_cpu", figures)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
