"""The Gluon kernels for Hopper against the Triton kernels that the table has: every candidate's tiles, and who wins.

    python bench/hopper.py            # on an H100 or H200, some minutes, most of them the compiler's
    python bench/hopper.py --quick    # the table's own tiles alone: is it right, and how fast

bf16, one kernel at a time, 16K tokens of 16 heads of 128 (and 64, 256), causal and full; medians of device events, all
variants of a case by turns. TFLOP/s count what the kernel does: forward 4 S^2 H D, dK and dV 8, dQ 6, half of it when
causal. A variant is compared with the Triton kernel's result, and gets no time if they differ by more than roundings.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, steps
from bench.attention import Case
from pyckpt.measure.timing import interleaved
from pyckpt.triton_kernels import attention, tuning
from pyckpt.triton_kernels.tuning import Config, Key

TRITON = "triton"
PRODUCTS = {"fwd": 1.0, "dkdv": 2.0, "dq": 1.5}  # over the forward's
OPS = tuple(PRODUCTS)
_AGAIN = 5  # runs that a variant's first one is compared with, bit by bit
_HEAD_START = 1_000_000  # clocks
_ALLOWED = 0.01  # of the norm; two kernels of bf16 differ by 0.003 at most


class Problem:
    """One case's tensors, and its kernels by op and configuration."""

    def __init__(self, case: Case) -> None:
        self.case = case
        shapes = [(case.batch, case.length, h, case.head_dim) for h in (case.heads, case.kv_heads, case.kv_heads)]
        self.q, self.k, self.v = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
        self.do = torch.randn_like(self.q)
        self.options = attention.Options(window=(-1, 0 if case.causal else -1), scale=case.head_dim**-0.5)
        o, self.lse = attention.forward(self.q, self.k, self.v, self.options)
        self.delta = attention.delta(self.do, o)

    def run(self, op: str, config: Config | None) -> list[Tensor]:
        """The op's results; None is what the table has."""
        configs = {op: config} if config else None
        if op == "fwd":
            return list(attention.forward(self.q, self.k, self.v, self.options, configs=configs))
        given = (self.do, self.q, self.k, self.v, self.lse, self.delta, self.options)
        dq, dk, dv = attention.backward(*given, configs=configs, only=(op,))
        return [dq] if op == "dq" else [dk, dv]

    def candidates(self, op: str, quick: bool) -> list[Config]:
        mask = "causal" if self.case.causal else "full"
        dim = self.case.head_dim
        key = Key(tuning.HOPPER, f"hopper_{op}", dim, dim, "half", mask, loads="tma")
        return [tuning.lookup(key)] if quick else tuning.candidates(key)


def measure(
    problem: Problem, op: str, quick: bool, deadline: float, rows: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """A row for the table's kernel and each candidate; in `rows` too, also when this fails in the middle."""
    rows = [] if rows is None else rows
    case = {**dataclasses.asdict(problem.case), "op": op}
    rows.append({**case, "variant": TRITON})
    truth = problem.run(op, None)
    runs: dict[str, Callable[[], Any]] = {TRITON: lambda: problem.run(op, None)}
    for config in problem.candidates(op, quick):
        if time.monotonic() > deadline:
            break
        name = str(dataclasses.astuple(config))
        row = {**case, "variant": name, "config": dataclasses.astuple(config)}
        rows.append(row)
        try:
            error = _error(problem, op, config, truth)
        except Exception as reason:  # too large for the chip, or the compiler's fault: both are findings
            row["failed"] = steps.reason(reason)
            continue
        row["error"] = error
        if error <= _ALLOWED:
            runs[name] = lambda config=config: problem.run(op, config)
        else:
            row["failed"] = f"wrong: it differs by {error:.3g}"
    # A launch in Gluon takes more of the host's time than Triton's: the device waits until all are queued.
    times = interleaved(runs, 10, warmup=2, device="cuda", head_start=_HEAD_START)
    for row in rows:
        if row["variant"] in times:
            seconds = times[row["variant"]].median
            row["ms"] = seconds * 1e3
            row["tflops"] = problem.case.flops * PRODUCTS[op] / seconds / 1e12
    return rows


def _error(problem: Problem, op: str, config: Config, truth: list[Tensor]) -> float:
    """The largest relative error of its results; infinite where they are not the same bits every time."""
    first = problem.run(op, config)
    for _ in range(_AGAIN):
        if not all(map(torch.equal, problem.run(op, config), first)):
            return math.inf
    return float(torch.tensor([_relative(a, b) for a, b in zip(first, truth, strict=True)]).max())  # of NaN, NaN


def _relative(a: Tensor, b: Tensor) -> float:
    seen = b.float().isfinite()
    a, b = (t.float().where(seen, 0.0) for t in (a, b))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def show(rows: list[dict[str, Any]]) -> None:
    case = Case(**{f.name: rows[0][f.name] for f in dataclasses.fields(Case)})
    ours = [r for r in rows[1:] if "ms" in r]
    best = min(ours, key=lambda r: r["ms"]) if ours else None
    said = f"best {best['tflops']:.0f} with {best['variant']}" if best else "no candidate ran"
    print(f"{case!s} {rows[0]['op']:5} triton {rows[0].get('tflops', 0.0):.0f} TFLOP/s, {said}", flush=True)
    for row in rows:
        if "failed" in row:
            print(f"    {row['variant']}: {row['failed']}"[:118], flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the table's tiles alone")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of under bench/results/")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available() or tuning.architecture(torch.device("cuda")) != tuning.HOPPER:
        print("bench/hopper.py needs a Hopper GPU (sm_90)")
        return 0
    os.environ.pop("PYCKPT_ATTENTION", None)  # it would take these kernels where Triton's are meant
    deadline = time.monotonic() + given.budget
    device = torch.device("cuda")
    figures: dict[str, Any] = {**common.stamp(device), "rows": []}
    path = given.out or common.RESULTS / f"hopper_{common.short_name(device)}.json"
    for (dim, causal), op in itertools.product(itertools.product((128, 64, 256), (True, False)), OPS):
        if time.monotonic() > deadline or (dim == 256 and op != "fwd"):
            continue
        case, rows = Case.of(16384, dim, causal), []
        broke = {**dataclasses.asdict(case), "op": op, "variant": steps.EVERY}
        with steps.noting_failure(broke):  # a kernel may have cost the process its device
            measure(Problem(case), op, given.quick, deadline, rows)
        rows += [broke] if "failed" in broke else []
        show(rows)
        figures["rows"] += rows
        common.write_to(path, figures)
    print(f"written to {path}")
    return int(any("wrong" in r.get("failed", "") or r["variant"] == steps.EVERY for r in figures["rows"]))


if __name__ == "__main__":
    sys.exit(main())
