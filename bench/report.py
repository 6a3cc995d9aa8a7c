"""Write the measured tables of README.md and ARCHITECTURE.md from bench/results/.

    python bench/report.py             # rewrite them
    python bench/report.py --check     # fail when they are not what the results say

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parent.parent))

from bench import common

PAGES = ("README.md", "ARCHITECTURE.md", "bench/NOTES.md")
SAVE = "attention"


def block_cpu() -> str:
    """Time of one block over both baselines, beside the aims."""
    figures = common.read("block_cpu")
    lines = [
        "| S | plain | torch.utils.checkpoint | pyckpt | / checkpoint | aim | / plain | aim |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in (r for r in figures["rows"] if r["variant"] == SAVE):
        same = {r["variant"]: r for r in figures["rows"] if r["length"] == row["length"]}
        times = " | ".join(f"{same[v]['seconds'] * 1e3:,.0f} ms" for v in ("plain", "checkpoint", SAVE))
        aims = figures["aims"].get(str(row["length"]), (None, None))
        ratios = [
            f"{row[f'time_over_{base}']:.2f} | {'–' if aim is None else f'≤ {aim:.2f}'}"
            for base, aim in zip(("checkpoint", "plain"), aims, strict=True)
        ]
        lines.append(f"| {row['length']:,} | {times} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", source("bench/block.py", "block_cpu", figures)])


def save_sets() -> str:
    """What each save set keeps and what its peak grows by, measured and by arithmetic."""
    figures = common.read("memory_cpu")
    kept = {
        "plain": "everything autograd stores",
        "all": "x, q, k, v, o, lse, mid, gate, up",
        "attention+qkv": "x, q, k, v, o, lse, mid",
        "attention+mid": "x, o, lse, mid",
        "attention": "x, o, lse (the default)",
        "input": "x",
    }
    lines = [
        "| `save=` | kept from forward to backward | bytes a token, measured | by arithmetic | of plain |",
        "|---|---|--:|--:|--:|",
    ]
    plain = figures["rows"][0]["saved"]
    for row in figures["rows"]:
        name = "plain PyTorch" if row["save"] == "plain" else f'`"{row["save"]}"`'
        expected = "–" if row["saved_expected"] is None else f"{row['saved_expected']:,}"
        share = f"{row['saved'] / plain:.0%}"
        lines.append(f"| {name} | {kept[row['save']]} | {row['saved']:,.0f} | {expected} | {share} |")
    return "\n".join([*lines, "", source("bench/memory.py", "memory_cpu", figures)])


def peak_slopes() -> str:
    """Slope of the peak over the length, for ARCHITECTURE.md."""
    figures = common.read("memory_cpu")
    lines = ["| `save=` | slope of the peak, bytes a token | by arithmetic |", "|---|--:|--:|"]
    for row in figures["rows"]:
        expected = "–" if row["peak_slope_expected"] is None else f"{row['peak_slope_expected']:,}"
        lines.append(f"| {row['save']} | {row['peak_slope']:,.0f} | {expected} |")
    return "\n".join([*lines, "", source("bench/memory.py", "memory_cpu", figures)])


def stream_flat() -> str:
    """Memory of a streamed step over the length."""
    figures = common.read("stream_cpu")["flat"]
    lines = ["| S | live tensor bytes | peak resident memory of the process |", "|--:|--:|--:|"]
    lines += [f"| {r['length']:,} | {r['live_bytes']:,} | {r['rss_bytes'] / 2**20:,.0f} MiB |" for r in figures["rows"]]
    spread = figures["spread"]
    lines.append(f"| largest over smallest | +{spread['live']:.1%} | +{spread['rss']:.1%} |")
    return "\n".join([*lines, "", source("bench/stream.py --part flat", "stream_cpu", figures)])


def stream_time() -> str:
    """Time of a streamed step over the resident executor's."""
    figures = common.read("stream_cpu")["time"]
    c, aim = figures["config"], common.read("stream_cpu")["aims"]["time"]
    lines = [
        f"| fp32, d_model {c['d_model']}, {c['n_layers']} block(s), S = {c['length']:,}, tile {c['tile']:,} | a step | "
        "over resident | in CPU time | aim |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in figures["rows"]:
        resident = row["executor"] == "resident"
        ratios = (row[f"{kind}_over_resident"] for kind in ("seconds", "cpu_seconds"))
        over = "– | – | –" if resident else " | ".join([*(f"{r:.2f}" for r in ratios), f"≤ {aim:.2f}"])
        lines.append(f"| {row['executor']} | {row['seconds']:,.1f} s | {over} |")
    return "\n".join([*lines, "", source("bench/stream.py --part time", "stream_cpu", figures)])


def stream_schedule() -> str:
    """What a simulated H100 makes of the streamed schedule, for bench/NOTES.md."""
    figures = common.read("stream_schedule")
    lines = [
        "| S | tile | a block, simulated | copies under compute | model FLOPs utilisation |",
        "|--:|--:|--:|--:|--:|",
    ]
    for r in figures["rows"]:
        shares = f"{r['copies_hidden']:.0%} | {r['model_flops_utilisation']:.0%}"
        lines.append(f"| {r['length']:,} | {r['tile']:,} | {r['seconds']:.2f} s | {shares} |")
    return "\n".join([*lines, "", source("bench/stream_schedule.py", "stream_schedule", figures)])


def attention_bounds() -> str:
    """Roofline of attention on an H100, for bench/NOTES.md."""
    figures = common.read("attention_static")
    lines = [
        "| head dim | forward, nothing overlapped | everything | backward, nothing overlapped | everything |",
        "|--:|--:|--:|--:|--:|",
    ]
    for d in figures["bounds"]["forward"]:
        cells = (f"{figures['bounds'][k][d][b]:.0f}" for k in ("forward", "backward") for b in ("apart", "together"))
        lines.append(f"| {d} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source("bench/roofline.py", "attention_static", figures)])


def attention_kernels() -> str:
    """What the compiler made of the tuned kernels, for bench/NOTES.md."""
    figures = common.read("attention_static")
    lines = [
        "| kernel | head dim | queries × keys | loads | warps | stages | registers | spilled | shared | on an SM |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for k in figures["kernels"]:
        dim = str(k["head_dim"]) if k["head_dim"] == k["value_dim"] else f"{k['head_dim']}/{k['value_dim']}"
        m, n, warps, stages = k["config"]
        cells = (
            f"{m} × {n}",
            k["loads"],
            warps,
            stages,
            k["registers"],
            k["spilled"],
            f"{k['shared']:,}",
            k["programs"],
        )
        lines.append(f"| {k['op']} | {dim} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", source("bench/roofline.py", "attention_static", figures)])


def source(script: str, name: str, figures: dict[str, Any]) -> str:
    versions = figures["versions"]
    return (
        f"<sub>`python {script}` on {figures['device']}, {figures['threads']} threads, torch {versions['torch']}, "
        f"commit {figures['commit']}, {figures['date']}; every figure in `bench/results/{name}.json`.</sub>"
    )


TABLES: dict[str, Callable[[], str]] = {
    "block-cpu": block_cpu,
    "save-sets": save_sets,
    "peak-slopes": peak_slopes,
    "stream-flat": stream_flat,
    "stream-time": stream_time,
    "stream-schedule": stream_schedule,
    "attention-bounds": attention_bounds,
    "attention-kernels": attention_kernels,
}


def filled(page: str) -> str:
    """The page with every table as the results have it."""

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- begin: ([\w-]+) -->.*?<!-- end: \1 -->", put, page, flags=re.DOTALL)


def main() -> None:
    stale = []
    for name in PAGES:
        path = common.ROOT / name
        text = path.read_text()
        new = filled(text)
        if new == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            aside = path.with_suffix(".tmp")
            aside.write_text(new)
            os.replace(aside, path)
    if stale and "--check" in sys.argv:
        sys.exit(f"not what bench/results says: {', '.join(stale)}; run python bench/report.py")
    print(f"rewritten: {', '.join(stale)}" if stale else "up to date")


if __name__ == "__main__":
    main()
