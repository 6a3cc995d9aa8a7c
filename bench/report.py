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

from bench import common, steps
from pyckpt.measure.units import format_bytes, format_seconds

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


def swap() -> str:
    """Time and peak of a swapped Llama's step, beside transformers' own."""
    figures = common.read("swap_cpu")
    c = figures["config"]
    lines = [
        f"| fp32, {c['layers']} layers, d_model {c['hidden_size']}, S = {c['tokens']:,} | a step | peak over weights "
        "| in training |",
        "|---|--:|--:|--:|",
    ]
    for run in figures["rows"]:
        vocab = f"vocabulary {run['vocab']:,}"
        for what, rows in ((vocab, run["full"]), (f"{vocab}, LoRA", run["lora"])):
            for row in rows:
                ours = row["variant"].replace("swap", "`pyckpt.swap`")
                peaks = (row.get(key) for key in ("peak_bytes", "training_peak_bytes"))
                shown = " | ".join(format_bytes(p) if p else "–" for p in peaks)
                lines.append(f"| {what}: {ours} | {row['seconds']:.2f} s | {shown} |")
    return "\n".join([*lines, "", source("bench/swap.py", "swap_cpu", figures)])


def mixture() -> str:
    """Time and peak of a swapped mixture of experts, beside its own checkpointing, for bench/NOTES.md."""
    figures = common.read("mixture_cpu")
    c = figures["config"]
    experts = f"{c['num_experts_per_tok']} of {c['num_experts']} experts"
    what = f"fp32, {c['layers']} layers, d_model {c['hidden_size']}, {experts}"
    lines = [f"| {what}, S = {c['tokens']:,} | a step | / checkpointing | peak over weights |", "|---|--:|--:|--:|"]
    (again,) = (row["seconds"] for row in figures["rows"] if row["variant"] == "its gradient checkpointing")
    for row in figures["rows"]:
        numbers = f"{row['seconds']:.2f} s | {row['seconds'] / again:.3f} | {format_bytes(row['peak_bytes'])}"
        lines.append(f"| {row['variant']} | {numbers} |")
    return "\n".join([*lines, "", source("bench/mixture.py", "mixture_cpu", figures)])


def own_model() -> str:
    """Time and peak of a swapped model of one's own, beside torch.utils.checkpoint, for bench/NOTES.md."""
    figures = common.read("own_model_cpu")
    c = figures["config"]
    what = f"fp32, {c['layers']} layers, d_model {c['width']}"
    lines = [
        f"| {what} | tokens | a step | / stored | / checkpoint | peak over weights |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for run in figures["rows"]:
        stored, again = (row["seconds"] for row in run["variants"][:2])
        for row in run["variants"]:
            t = row["seconds"]
            numbers = f"{t:.2f} s | {t / stored:.3f} | {t / again:.3f} | {format_bytes(row['peak_bytes'])}"
            lines.append(f"| {row['variant']} | {run['tokens']:,} | {numbers} |")
    return "\n".join([*lines, "", source("bench/own_model.py", "own_model_cpu", figures)])


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


def cuda_kernels() -> str:
    """What nvcc made of the CUDA C++ kernels, and the bytes they keep in flight, for bench/NOTES.md."""
    figures = common.read("cuda_static")
    lines = [
        "| bf16 on sm_90 | registers | threads | blocks on an SM | in flight | over what is needed | issuing |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for k in figures["rows"]:
        cells = (k["registers"], k["threads"], k["blocks"], f"{k['bytes_in_flight'] / 1024:.0f} KiB")
        issue = "" if k["issue"] is None else f"{k['issue']:.0%}"
        lines.append(f"| {k['what']} | {' | '.join(map(str, cells))} | {k['over_needed']:.1f} | {issue} |")
    return "\n".join([*lines, "", source("bench/cuda_static.py", "cuda_static", figures)])


def cuda_build() -> str:
    """What building the extension takes, for bench/NOTES.md."""
    figures = common.read("cuda_static")
    build = figures["build"]
    lines = [
        "| for | kernels | bytes spilled | most registers | CPU time | wall time | library |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| {build['architectures']} | {build['kernels']} | {build['spilled']} | {build['most_registers']} "
        f"| {build['cpu_seconds']:.0f} s | {build['seconds']:.0f} s on {build['cores']} cores "
        f"| {build['bytes'] / 2**20:.1f} MiB |",
    ]
    return "\n".join([*lines, "", source("bench/cuda_static.py", "cuda_static", figures)])


# --- tables of every device that a benchmark ran on ---------------------------------------------------------


def loss() -> str:
    """Linear cross entropy, for bench/NOTES.md."""
    ratios = (
        "seconds_over_eager",
        "seconds_over_eager_fp32",
        "beyond_bytes_over_eager",
        "beyond_bytes_over_eager_fp32",
    )

    def cells(row: dict[str, Any]) -> list[str]:
        time, memory = [steps.shown_ratio(row, r) for r in ratios[:2]], [steps.shown_ratio(row, r) for r in ratios[2:]]
        return [format_seconds(row["seconds"]), *time, steps.shown_bytes(row, "beyond_bytes"), *memory]

    columns = ("time", "/ eager", "/ eager fp32", "memory beyond", "/ eager", "/ eager fp32")
    return _by_device("loss", lambda r: f"{r['tokens']:,} × {r['d_model']:,} × {r['vocab']:,}", columns, cells)


def mlp() -> str:
    """A whole MLP, for bench/NOTES.md."""

    def cells(row: dict[str, Any]) -> list[str]:
        made = row.get("products")
        return [
            f"{made:.3g}" if isinstance(made, float) else "–",
            format_seconds(row["seconds"]),
            *(steps.shown_ratio(row, f"seconds_over_{base}") for base in ("eager", "checkpoint")),
            f"{row['tflops']:.3g}",
            f"{row['of_product']:.0%}",
            steps.shown_bytes(row, "beyond_bytes"),
            steps.shown_bytes(row, "saved_bytes"),
        ]

    columns = ("products", "time", "/ eager", "/ checkpoint", "TFLOP/s", "of a product's", "memory beyond", "saved")
    return _by_device(
        "mlp", lambda r: f"{r['kind']}, {r['tokens']:,} × {r['d_model']:,} × {r['d_ff']:,}", columns, cells
    )


def block_gpu() -> str:
    """Llama-8B's block, for README.md."""
    ratios = ("seconds_over_all", "seconds_over_checkpoint", "beyond_bytes_over_plain")

    def cells(row: dict[str, Any]) -> list[str]:
        aimed = row["variant"] == SAVE and row["length"] == row["aims"]["at_length"]
        aims = [f" (aim ≤ {row['aims'][r]:.2f})" if aimed else "" for r in ratios]
        over = [steps.shown_ratio(row, r) + aim for r, aim in zip(ratios, aims, strict=True)]
        memory = [steps.shown_bytes(row, k) for k in ("beyond_bytes", "saved_bytes")]
        return [format_seconds(row["seconds"]), f"{row['tflops']:.3g}", *over[:2], memory[0], over[2], memory[1]]

    columns = ("time", "TFLOP/s", "/ all", "/ checkpoint", "memory beyond", "/ plain", "saved")
    return _by_device("block", lambda r: f"{r['length']:,}" + _blocks(r["layers"]), columns, cells)


def gpu_memory() -> str:
    """What the allocator counts without a GPU, beside what the H200 counted before, for README.md."""
    figures = common.read("gpu_memory")
    h200 = common.read("block_h200")
    measured = {(r["length"], r["variant"]): r["beyond_bytes"] for r in h200["rows"]}
    streamed = {r["length"]: r["peak_bytes"] for r in common.read("stream_h200")["rows"] if r["variant"] == "streamed"}
    before = figures["plain"]["commit"]
    lines = [f"| size | kept | memory beyond | / plain | on the H200, commit {before} |", "|---|---|--:|--:|--:|"]
    for row in figures["rows"]:
        if row["what"] == "block":
            kept, over, then = row["save"], f"{row['over_plain']:.3f}", measured[row["length"], row["save"]]
            aims = h200["aims"]
            if (kept, row["length"]) == (SAVE, aims["at_length"]):
                over += f" (aim ≤ {aims['beyond_bytes_over_plain']:.2f})"
        else:
            kept, over, then = f"streamed, {row['layers']} layers", "–", streamed.get(row["length"])
        shown = "–" if then is None else format_bytes(then)
        lines.append(f"| {row['length']:,} | {kept} | {format_bytes(row['bytes'])} | {over} | {shown} |")
    return "\n".join([*lines, "", source("bench/gpu_memory.py", "gpu_memory", figures)])


def _blocks(layers: int) -> str:
    return f", {layers} blocks" if layers > 1 else ""


def _by_device(
    benchmark: str,
    case: Callable[[dict[str, Any]], str],
    columns: tuple[str, ...],
    cells: Callable[[dict[str, Any]], list[str]],
) -> str:
    """A table for each result of a benchmark, a row for each variant; or that there is none."""
    tables = []
    for path in sorted(common.RESULTS.glob(f"{benchmark}_*.json")):
        if path.stem == "block_cpu":  # of another form
            continue
        figures = common.read(path.stem)
        lines = [f"| size | variant | {' | '.join(columns)} |", f"|---|---|{'--:|' * len(columns)}"]
        for row in figures["rows"]:
            shown = (
                [row["failed"].replace("|", "\\|"), *[""] * (len(columns) - 1)]
                if "failed" in row
                else cells({**figures, **row})
            )
            lines.append(f"| {case(row)} | {row['variant']} | {' | '.join(shown)} |")
        if figures["left_out"]:
            lines += ["", f"Left out, for want of time: {'; '.join(figures['left_out'])}."]
        tables.append("\n".join([*lines, "", source(f"bench/{benchmark}.py", path.stem, figures)]))
    where = " on a GPU" if benchmark == "block" else ""
    return (
        "\n\n".join(tables)
        or f"Not run{where} yet; `python bench/{benchmark}.py`{where and ' there'} writes this table."
    )


def stream_gpu() -> str:
    """A streamed step on a GPU, for README.md."""
    lines = [
        "| S | layers | executor | a step | model FLOPs | of the data sheet's | peak | copies hidden |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    paths = [p for p in sorted(common.RESULTS.glob("stream_*.json"), reverse=True) if p.stem not in _STREAMED_ELSEWHERE]
    found = [(path.stem, common.read(path.stem)) for path in paths]
    for _, figures in found:
        for row in figures["rows"]:
            lines.append(_streamed(row, figures["config"]["n_layers"]))
    return "\n".join([*lines, *("\n" + source("bench/stream_gpu.py", name, figures) for name, figures in found)])


# On a CPU, simulated, and by an older commit.
_STREAMED_ELSEWHERE = ("stream_cpu", "stream_schedule", "stream_first_h200")


def _streamed(row: dict[str, Any], layers: int) -> str:
    tile = f", tile {row['tile']:,}" if row["tile"] else ""
    start = f"| {row['length']:,} | {layers} | {row['variant']}{tile} |"
    if "failed" in row:
        return f"{start} {row['failed']} | | | | |"
    hidden = f"{row['hidden']:.0%}" if row.get("hidden") is not None else "–"
    used = f"{row['utilisation']:.1%}" if "utilisation" in row else "–"
    return (
        f"{start} {format_seconds(row['seconds'])} | {row['tflops']:.0f} TFLOP/s | {used} "
        f"| {format_bytes(row['peak_bytes'])} | {hidden} |"
    )


def attention_gpu() -> str:
    """Attention on a GPU, TFLOP/s, for bench/NOTES.md."""
    figures = common.read("attention_h200")
    by_case: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in figures["rows"]:
        shared = row["heads"] // row["kv_heads"]
        by_case.setdefault((row["head_dim"], row["causal"], row["length"], shared), {})[row["variant"]] = row
    lines = [
        "| head dim | mask | S | ours | flash | cuDNN | efficient | ours, backward | flash | cuDNN | efficient |",
        f"|--:|---|--:|{'--:|' * 8}",
    ]
    for (dim, causal, length, shared), variants in sorted(by_case.items()):
        mask = ("causal" if causal else "full") + (f", {shared} heads a key head" if shared > 1 else "")
        cells = [
            f"{variants[v][f'{part}_tflops']:.0f}" if f"{part}_tflops" in variants.get(v, {}) else "–"
            for part in ("forward", "backward")
            for v in ("pyckpt", "flash", "cudnn", "efficient")
        ]
        lines.append(f"| {dim} | {mask} | {length:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source("bench/attention.py", "attention_h200", figures)])


def norm_gpu() -> str:
    """Norms on a GPU as shares of a copy's bandwidth, for bench/NOTES.md."""
    figures = common.read("norm_h200")
    variants = {"pyckpt": "Triton", "pyckpt-cuda": "CUDA C++", "eager": "eager", "compiled": "compiled"}
    by_case: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in figures["rows"]:
        by_case.setdefault((row["op"], row["tokens"], row["width"]), {})[row["variant"]] = row
    names = list(variants.values())
    columns = [*names, *(f"{name}, backward" for name in names)]
    lines = [f"| op | tokens | width | {' | '.join(columns)} |", f"|---|--:|--:|{'--:|' * len(columns)}"]
    for (op, tokens, width), found in by_case.items():
        cells = [
            f"{found[v][f'{part}_of_copy']:.0%}" if f"{part}_of_copy" in found.get(v, {}) else "–"
            for part in ("forward", "backward")
            for v in variants
        ]
        lines.append(f"| {op} | {tokens:,} | {width:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source("bench/norm.py", "norm_h200", figures)])


def fused_break_even() -> str:
    """From which share of the library's rate on a fused product pays, by arithmetic."""
    figures = common.read("fused_static")
    lines = ["| fused | saves | pays from |", "|---|---|--:|"]
    lines += [f"| {op['name']} | {op['saves']} | {op['break_even']:.0%} |" for op in figures["ops"]]
    return "\n".join([*lines, "", source("bench/fused_static.py", "fused_static", figures)])


def fused_kernels() -> str:
    """What the compiler made of the fused products."""
    figures = common.read("fused_static")
    lines = [
        "| kernel | form | tile | registers | spilled | shared | on an SM |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {k['op']} | {' '.join(k['features']) or '–'} | {k['tile']} | {k['registers']} | {k['spilled']} | "
        f"{k['shared']:,} | {k['programs']} |"
        for k in figures["kernels"]
    ]
    return "\n".join([*lines, "", source("bench/fused_static.py", "fused_static", figures)])


def host() -> str:
    """What calls cost the host, at first and now."""
    first, now = common.read("host_first_cpu"), common.read("host_cpu")
    before = {row["name"]: row for row in first["rows"]}
    lines = ["| call | before | now | launches before | now |", "|---|--:|--:|--:|--:|"]
    for row in now["rows"]:
        pair = (before[row["name"]], row)
        times = " | ".join(f"{r['microseconds']:,.0f} µs" for r in pair)
        lines.append(f"| {row['name']} | {times} | {' | '.join(str(sum(r['launches'].values())) for r in pair)} |")
    notes = [source("bench/host.py", name, f) for name, f in (("host_first_cpu", first), ("host_cpu", now))]
    return "\n".join([*lines, "", *notes])


def attention_cpu() -> str:
    """GFLOP/s of attention's forward and backward on a CPU, ours in each instruction set and PyTorch's."""
    figures = common.read("attention_cpu")
    variants = list(dict.fromkeys(r["variant"] for r in figures["rows"]))
    theirs = variants[-1]
    heads = " | ".join(f"{v}: forward | backward" for v in variants)
    lines = [
        f"| GFLOP/s | tokens | head dim | {heads} | ours over {theirs}'s |",
        "|---|--:|--:|" + "--:|--:|" * len(variants) + "--:|",
    ]
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in figures["rows"]:
        cases.setdefault((r["name"], r["length"], r["dim"]), {})[r["variant"]] = r
    for (name, length, dim), by in cases.items():
        rates = " | ".join(f"{by[v]['forward_gflops']:.0f} | {by[v]['backward_gflops']:.0f}" for v in variants)
        ratio = " and ".join(
            f"{by[theirs][f'{k}_ms'] / by[variants[0]][f'{k}_ms']:.1f}" for k in ("forward", "backward")
        )
        lines.append(f"| {name} | {length:,} | {dim} | {rates} | {ratio} |")
    product = f"A matrix product in the same run: {figures['product_gflops']:.0f} GFLOP/s."
    return "\n".join([*lines, "", product, "", source("bench/attention_cpu.py", "attention_cpu", figures)])


def precision() -> str:
    """Float32 attention's errors by how its products are made."""
    figures = common.read("precision_cpu")
    names = ("o", "dq", "dk", "dv")
    lines = ["| head dim | products | o | dQ | dK | dV |", "|--:|---|--:|--:|--:|--:|"]
    for r in figures["rows"]:
        errors = " | ".join(f"{r[n]:.1e} ({r[f'{n}_ratio']:.2f})" for n in names)
        lines.append(f"| {r['head_dim']} | {r['kind']} | {errors} |")
    return "\n".join([*lines, "", source("bench/precision.py", "precision_cpu", figures)])


def context(name: str = "context_cpu") -> str:
    """A step that processes share beside one process, for ARCHITECTURE.md."""
    figures = common.read(name)
    o = figures["options"]
    tiles = "" if o["stream"] is None else f", tile {o['stream']:,}"
    lines = [
        f"| fp32, {o['layers']} layers, d_model {o['d_model']}, S = {o['tokens']:,}{tiles}, {o['processes']} processes "
        "| a step | of alone | kept by each | peak of each | sent by each | by arithmetic |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in figures["rows"]:
        sent = " | ".join(format_bytes(row[n]) if row[n] else "–" for n in ("sent_bytes", "sent_by_arithmetic"))
        memory = " | ".join(format_bytes(row[n]) for n in ("saved_bytes", "peak_bytes"))
        lines.append(f"| {row['variant']} | {row['seconds']:.2f} s | {row['over_alone']:.2f} | {memory} | {sent} |")
    return "\n".join([*lines, "", source("bench/context.py", name, figures)])


def tensor_parallel() -> str:
    """A step of a model whose weights processes share, for ARCHITECTURE.md."""
    name = "tensor_parallel_cpu"
    figures = common.read(name)
    o = figures["options"]
    lines = [
        f"| fp32, {o['layers']} layers, d_model {o['d_model']}, S = {o['tokens']:,}, vocabulary {o['vocab']:,}, "
        f"{o['processes']} processes | a step | of checkpointing | kept by each | peak of each | summed by each |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in figures["rows"]:
        memory = " | ".join(format_bytes(row[n]) for n in ("saved_bytes", "peak_bytes", "summed_bytes"))
        lines.append(f"| {row['variant']} | {row['seconds']:.2f} s | {row['over_checkpointing']:.2f} | {memory} |")
    return "\n".join([*lines, "", source("bench/tensor_parallel.py", name, figures)])


def source(script: str, name: str, figures: dict[str, Any]) -> str:
    versions = figures["versions"]
    return (
        f"<sub>`python {script}` on {_machine(figures)}, torch {versions['torch']}, "
        f"commit {figures['commit']}, {figures['date']}; every figure in `bench/results/{name}.json`.</sub>"
    )


def _machine(figures: dict[str, Any]) -> str:
    """The device, which names the threads where it is a CPU."""
    device, count = figures["device"], figures["threads"]
    threads = f"{count} thread{'' if count == 1 else 's'}"
    return device if threads in device else f"{device}, {threads}"


TABLES: dict[str, Callable[[], str]] = {
    "block-cpu": block_cpu,
    "save-sets": save_sets,
    "peak-slopes": peak_slopes,
    "fused-break-even": fused_break_even,
    "fused-kernels": fused_kernels,
    "stream-flat": stream_flat,
    "stream-time": stream_time,
    "stream-schedule": stream_schedule,
    "context": context,
    "context-stream": lambda: context("context_stream_cpu"),
    "tensor-parallel": tensor_parallel,
    "swap": swap,
    "mixture": mixture,
    "own-model": own_model,
    "attention-bounds": attention_bounds,
    "attention-kernels": attention_kernels,
    "cuda-kernels": cuda_kernels,
    "cuda-build": cuda_build,
    "block-gpu": block_gpu,
    "gpu-memory": gpu_memory,
    "loss": loss,
    "mlp": mlp,
    "stream-gpu": stream_gpu,
    "attention-cpu": attention_cpu,
    "attention-gpu": attention_gpu,
    "norm-gpu": norm_gpu,
    "host": host,
    "precision": precision,
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
