"""Attention: ours against PyTorch's flash, cuDNN and memory-efficient SDPA and FlexAttention.

    python bench/attention.py                    # on the GPU; without one, a few small sizes on the CPU
    python bench/attention.py --quick            # the sizes of `make gpu`, about two minutes on an H100
    python bench/attention.py --tune             # times candidate tiles, and prints rows for the table
    python bench/attention.py --plot RESULT.json # draw docs/attention_<device>.png from a result

Variants take turns in one process; medians of device events. Times and rates are the kernels' own: the device is busy
until all launches are queued, as in training, and as in FlashAttention's benchmarks, which run many in a row.
`forward_call_ms` and `backward_call_ms` begin with an idle device and count what the host takes for its launches. FLOPs
are 4 S² H D for the forward and 2.5 times that for the backward, half of it when causal, recomputation not counted (as
FlashAttention's papers count). The ceiling is a matrix product of that dtype in the same run. A variant whose result
is wrong gets no time.

Needs nothing beyond torch and triton (and matplotlib to plot).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyckpt
from bench import common, steps
from pyckpt.measure.timing import interleaved
from pyckpt.precision import exact_products

OURS = "pyckpt"
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX = "flex"
TOKENS = 16384
WIDTH = 2048
_HEAD_START = 4_000_000  # clocks, two milliseconds: what launches a backward takes half a one on a slow host


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: batch * length tokens, bf16 on a GPU."""

    length: int
    head_dim: int
    causal: bool
    heads: int
    kv_heads: int
    batch: int

    @staticmethod
    def of(length: int, head_dim: int, causal: bool, groups: int = 1) -> Case:
        """As many tokens and as wide as FlashAttention's benchmarks: 16K tokens, 2048 features."""
        heads = WIDTH // head_dim
        return Case(length, head_dim, causal, heads, heads // groups, max(1, TOKENS // length))

    @property
    def flops(self) -> float:
        """Of the forward."""
        return 4 * self.batch * self.heads * self.length**2 * self.head_dim * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        gqa = "" if self.heads == self.kv_heads else f" {self.heads}/{self.kv_heads} heads"
        return f"{self.length:6d} d{self.head_dim:<3d} {'causal' if self.causal else 'full':6}{gqa}"


def cases(which: str) -> list[Case]:
    """ "full", "quick", or "cpu"."""
    if which == "cpu":
        return [*(Case(n, 64, True, 4, 4, 1) for n in (128, 256, 512)), Case(256, 64, False, 4, 2, 1)]
    lengths = (1024, 4096, 16384) if which == "quick" else (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    dense = [Case.of(n, d, c) for d, c, n in itertools.product((128, 64, 256), (True, False), lengths)]
    grouped = [Case.of(16384, 128, True, 4)] + ([Case.of(65536, 128, True)] if which == "quick" else [])
    return dense + grouped


# --- variants -----------------------------------------------------------------------------------------------


def variants(case: Case, flex: bool, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """name -> attention of q (B, S, H, D), k, v (B, S, Hkv, D), as each likes its memory laid out."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        OURS: lambda q, k, v: pyckpt.attention(q, k, v, causal=case.causal)
    }
    if device == "cpu":
        return found | {"sdpa": lambda q, k, v: _sdpa(q, k, v, case)}
    for name, backend in SDPA.items():

        def run(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(q, k, v, case)

        found[name] = run
    if flex:
        found[FLEX] = _flex(case)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    heads = (t.transpose(1, 2) for t in (q, k, v))
    gqa = case.heads != case.kv_heads
    return scaled_dot_product_attention(*heads, is_causal=case.causal, enable_gqa=gqa).transpose(1, 2)


def _flex(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = steps.compiled(flex_attention, keep_graph=True)
    n = case.length
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n) if case.causal else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads, block_mask=mask, enable_gqa=case.heads != case.kv_heads).transpose(1, 2)

    return run


# --- measuring ----------------------------------------------------------------------------------------------


def measure(case: Case, flex: bool, device: str, repeats: int) -> list[dict[str, Any]]:
    """A row for every variant: milliseconds and TFLOP/s of forward, backward and both, or why there are none."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    shapes = [(case.batch, case.length, h, case.head_dim) for h in (case.heads, case.kv_heads, case.kv_heads)]
    leaves = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    do = torch.randn(shapes[0], device=device, dtype=dtype)
    rows, forwards, backwards = [], {}, {}
    truth: list[Tensor] | None = None
    for name, fn in variants(case, flex, device).items():
        row: dict[str, Any] = {"variant": name, "dtype": str(dtype).removeprefix("torch.")}
        rows.append(row)
        try:
            o = fn(*leaves)
            results = [o.detach(), *torch.autograd.grad(o, leaves, do, retain_graph=True)]
        except Exception as error:  # a backend that cannot take the case says so in many ways
            row["failed"] = steps.reason(error)
            continue
        truth = truth or _truth(leaves, do, case)
        row["error"] = steps.largest(_relative(got, want) for got, want in zip(results, truth, strict=True))
        if not row["error"] < 0.02:  # bf16 rounding gives 0.002 to 0.006; a wrong mask or a race far more
            row["failed"] = f"wrong: relative error {row['error']:.3g}"
            continue
        forwards[name] = lambda fn=fn: fn(*(t.detach() for t in leaves))
        backwards[name] = lambda o=o: torch.autograd.grad(o, leaves, do, retain_graph=True)
    for kind, runs, factor in (("forward", forwards, 1.0), ("backward", backwards, 2.5)):
        times = interleaved(runs, repeats, warmup=2, device=device, head_start=_HEAD_START) if runs else {}
        calls = interleaved(runs, max(3, repeats // 3), warmup=0, device=device) if runs else {}
        for row in rows:
            if row["variant"] in times:
                seconds = times[row["variant"]]
                row[f"{kind}_ms"] = seconds.median * 1e3
                row[f"{kind}_call_ms"] = calls[row["variant"]].median * 1e3
                row[f"{kind}_iqr_ms"] = seconds.iqr * 1e3
                row[f"{kind}_tflops"] = case.flops * factor / seconds.median / 1e12
    for row in rows:
        if "forward_ms" in row and "backward_ms" in row:
            row["both_tflops"] = case.flops * 3.5 / (row["forward_ms"] + row["backward_ms"]) / 1e9
    return rows


def _truth(leaves: list[Tensor], do: Tensor, case: Case) -> list[Tensor]:
    """o, dq, dk, dv of the first batch entry's first query heads that share a key/value head, in float32, by rows."""
    groups = case.heads // case.kv_heads
    q, k, v = (t[:1, :, :h].detach().float().transpose(1, 2) for t, h in zip(leaves, (groups, 1, 1), strict=True))
    d = do[:1, :, :groups].float().transpose(1, 2)
    scale, n = case.head_dim**-0.5, case.length
    o, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    j = torch.arange(n, device=q.device)
    with exact_products():
        for rows in torch.arange(n, device=q.device).split(2048):
            i = slice(int(rows[0]), int(rows[-1]) + 1)
            s = q[:, :, i] @ k.transpose(-1, -2) * scale
            if case.causal:
                s = s.masked_fill(j > rows.unsqueeze(-1), -math.inf)
            p = s.softmax(-1)
            o[:, :, i] = p @ v
            dv += (p.transpose(-1, -2) @ d[:, :, i]).sum(1, keepdim=True)
            dp = d[:, :, i] @ v.transpose(-1, -2)
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
            dq[:, :, i] = ds @ k
            dk += (ds.transpose(-1, -2) @ q[:, :, i]).sum(1, keepdim=True)
    return [t.transpose(1, 2) for t in (o, dq, dk, dv)]


def _relative(got: Tensor, want: Tensor) -> float:
    got = got[: want.shape[0], :, : want.shape[2]].float()
    return float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))


def run(
    which: str,
    flex: bool,
    budget: float,
    device: str,
    save: Callable[[dict[str, Any]], Any] = lambda figures: None,
) -> dict[str, Any]:
    """All figures, saved after every case. Cases that do not fit the budget (seconds) are left out, and named."""
    top = common.ceiling(device)
    print(f"{common.device_name(torch.device(device))}: matrix product {top:.3g} TFLOP/s\n{HEADER}", flush=True)

    def one(case: Case) -> list[dict[str, Any]]:
        repeats = max(3, min(30, int(2e14 / case.flops))) if device != "cpu" else 3
        return measure(case, flex and case.length in (4096, 16384), device, repeats)

    found = steps.sweep(
        cases(which),
        one,
        lambda case, row: line(case, row, top),
        lambda figures: save({"product_tflops": top, **figures}),
        budget,
        torch.device(device),
    )
    return {"product_tflops": top, **found}


HEADER = f"{'length':>6} dim  mask   {'variant':10}{'forward':>9}{'backward':>9}{'both':>9}   % of the product"


def line(case: Case, row: dict[str, Any], top: float) -> str:
    """TFLOP/s of one variant, and its share of the matrix product's."""
    if "failed" in row:
        return f"{case!s} {row['variant']:10} {row['failed']}"[:118]
    kinds = [row[f"{k}_tflops"] for k in ("forward", "backward")] + [row["both_tflops"]]
    shares = " ".join(f"{k / top:4.0%}" for k in kinds)
    digits = 1 if top > 10 else 3
    return f"{case!s} {row['variant']:10}" + "".join(f"{k:9.{digits}f}" for k in kinds) + f"   {shares}"


# --- tuning -------------------------------------------------------------------------------------------------


def tune(budget: float, save: Callable[[dict[str, Any]], Any] = lambda figures: None) -> dict[str, Any]:
    """Time candidate tiles of each kernel at 8K tokens, and print the table's rows with the fastest; saved after each.

    A tile that fails, for the compiler say, has no time; the table's own stops all.
    """
    from pyckpt.triton_kernels import attention, tuning

    start, found = time.monotonic(), []
    for op, head_dim, causal in itertools.product(("fwd", "dkdv", "dq"), (128, 64, 256), (True, False)):
        case = Case.of(8192, head_dim, causal)
        q, k, v, do = (
            torch.randn(case.batch, case.length, case.heads, head_dim, device="cuda", dtype=torch.bfloat16)
            for _ in range(4)
        )
        options = attention.Options(window=(-1, 0 if causal else -1), scale=head_dim**-0.5)
        o, lse = attention.forward(q, k, v, options)
        delta = attention.delta(do, o)
        mask = "causal" if causal else "full"
        key = tuning.Key(tuning.architecture(q.device), op, head_dim, head_dim, "half", mask, loads="tma")

        def go(config: Any, op: str = op, args: Any = (q, k, v, do, lse, delta, options)) -> None:
            q, k, v, do, lse, delta, options = args
            if op == "fwd":
                attention.forward(q, k, v, options, configs={op: config})
            else:
                attention.backward(do, q, k, v, lse, delta, options, configs={op: config}, only=(op,))

        times: list[tuple[float, Any]] = []
        for config in tuning.candidates(key):
            if time.monotonic() - start > budget:
                break
            ms, failed = None, {}
            with steps.noting_failure(failed) if times else contextlib.nullcontext():
                ms = tuning.time_config(config, go)
            times.append((math.inf if ms is None else ms, dataclasses.astuple(config)))
            if failed:
                print(f"{times[-1][1]}: {failed['failed']}"[:118], flush=True)
        if not times:
            break
        table = times[0]
        ms, best = min(times)
        print(f"{key}: {table[1]} {table[0]:.3f} ms -> {best} {ms:.3f} ms", flush=True)
        row = {f: getattr(key, f) for f in ("arch", "op", "dtype", "head_dim", "value_dim", "mask")}
        found.append(row | {"score": "plain", "config": best, "ms": ms, "table_ms": table[0], "all": sorted(times)})
        save({"tuned": found})
    return {"tuned": found}


# --- plot ---------------------------------------------------------------------------------------------------


def plot(figures: dict[str, Any], path: Path) -> None:
    """TFLOP/s over the length: a column for forward and backward, a row for each head dim, causal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in figures["rows"] if "failed" not in r and r["causal"] and r["heads"] == r["kv_heads"]]
    dims = sorted({r["head_dim"] for r in rows})
    fig, axes = plt.subplots(len(dims), 2, figsize=(9, 3 * len(dims)), squeeze=False, sharex=True)
    for (y, dim), (x, kind) in itertools.product(enumerate(dims), enumerate(("forward", "backward"))):
        ax = axes[y][x]
        for name in dict.fromkeys(r["variant"] for r in rows):
            points = sorted(
                (r["length"], r[f"{kind}_tflops"]) for r in rows if r["variant"] == name and r["head_dim"] == dim
            )
            ax.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2)
        ax.axhline(figures["product_tflops"], color="grey", linestyle=":", label="matrix product")
        ax.set(xscale="log", title=f"{kind}, head dim {dim}, causal", ylabel="TFLOP/s", ylim=(0, None))
        ax.set_xticks(
            ticks := sorted({r["length"] for r in rows}), [f"{n // 1024}K" if n >= 1024 else n for n in ticks]
        )
        ax.minorticks_off()
    axes[0][0].legend(fontsize=8)
    fig.suptitle(f"{figures['device']}, commit {figures['commit']}")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the sizes of `make gpu`")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention, whose compilation takes long")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of under bench/results/")
    parser.add_argument("--plot", type=Path, metavar="RESULT", help="only draw this result")
    options = parser.parse_args(argv)
    if options.plot:
        figures = json.loads(options.plot.read_text())
        plot(figures, common.ROOT / "docs" / f"{options.plot.stem}.png")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.tune and device == "cpu":
        parser.error("--tune needs a GPU")
    which = "cpu" if device == "cpu" else "quick" if options.quick else "full"
    name = f"attention_{'tuning_' if options.tune else ''}{common.short_name(torch.device(device))}"
    path = options.out or common.RESULTS / f"{name}.json"
    stamp = common.stamp(device)

    def save(found: dict[str, Any]) -> None:
        common.write_to(path, {**stamp, **found})

    if options.tune:
        found = tune(options.budget, save)
    else:
        found = run(which, not options.no_flex, options.budget, device, save)
    save(found)
    print(f"written to {path}")
    return int(steps.count_wrong({"rows": [], **found}, (OURS,)) > 0)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: the interpreter's times mean nothing")
    sys.exit(main())
