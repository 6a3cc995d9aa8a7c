"""The results as text: a table, a caption and two or three plain sentences."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from pyckpt.compare.results import BASELINES, CHECKPOINT, OUT_OF_MEMORY, PLAIN, STREAMED, Results, Row, label
from pyckpt.extras import require
from pyckpt.measure.units import format_bytes
from pyckpt.spec import BlockSpec, canonical_window

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_NAMED_OPTIONS = (
    *("norm", "norm_offset", "norm_placement", "mlp", "residual", "residual_multiplier", "bias", "qk_norm"),
    *("rope_theta", "rope_dim", "rope_interleaved", "rope_axes", "causal", "window", "softcap", "attention_scale"),
)
UNSTEADY = 0.25  # interquartile range over median
Scale = tuple[str, float]  # a unit's name and size


def title(results: Results) -> str:
    """What was trained, on what: one line."""
    c = results.config
    what = f"{c['n_layers']} block{'s' if c['n_layers'] > 1 else ''}"
    if c.get("vocab_size"):
        what = f"causal LM, {what}, vocabulary {c['vocab_size']}"
    heads = f"{c['n_heads']} heads"
    if c["n_kv_heads"] != c["n_heads"]:
        heads += f" ({c['n_kv_heads']} KV)"
    usual = {f.name: f.default for f in dataclasses.fields(BlockSpec)}
    usual["window"] = canonical_window(c["causal"], None)
    given = {name: _shown(c.get(name, usual[name])) for name in _NAMED_OPTIONS}  # older results lack newer options
    odd = [f", {name} {value}" for name, value in given.items() if value != _shown(usual[name])]
    shape = f"d_model {c['d_model']}, {heads}, d_ff {c['d_ff']}, batch {c['batch']}, {c['dtype']}"
    return f"{what}: {shape}{''.join(odd)}"


def _shown(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, (tuple, list)) else str(value)


def caption(results: Results) -> str:
    """How to read the figures, and where they come from."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        "One forward and backward over S tokens. peak: the most memory alive at once, above weights, "
        "gradients and the input, which exist before. saved: what the forward keeps for the backward, the "
        f"input included. time: median of {_runs(results)}. x plain, x ckpt: relative to plain PyTorch, "
        "which stores everything, and to torch.utils.checkpoint around each block. OOM: out of memory. "
        f"Measured on {results.device}; {versions}."
    )


def table(results: Results) -> Table:
    """A rich table that fits in 80 columns, one section a length. RuntimeError without rich."""
    require("the table of compare", "rich")
    from rich import box
    from rich.table import Table

    out = Table(title=title(results), box=box.SIMPLE_HEAD, collapse_padding=True, title_style="bold")
    scales = _scales(results)
    out.add_column("S", justify="right")
    out.add_column("variant", no_wrap=True)
    for name, unit in zip(("peak", "saved", "time"), scales, strict=True):
        out.add_column(f"{name}\n{unit[0]}", justify="right", no_wrap=True)
        out.add_column("x\nplain", justify="right", no_wrap=True)
    out.add_column("x\nckpt", justify="right", no_wrap=True)
    for length in results.lengths:
        rows = [row for row in results.rows if row.length == length]
        for i, row in enumerate(rows):
            style = "bold" if row.variant == "attention" else None
            shown = str(length) if i == 0 else ""
            out.add_row(shown, *_cells(results, row, scales), end_section=row is rows[-1], style=style)
    return out


def sentences(results: Results) -> list[str]:
    """What the figures say, in plain words: at the longest length, of the growth, and what to beware of."""
    said = []
    mine = _subject(results)
    if mine is not None:
        said += _against(results, mine, PLAIN) + _against(results, mine, CHECKPOINT)
    warning = unsteady(results)
    return [*said, *_growth(results), *results.notes, *([warning] if warning else [])]


def unsteady(results: Results) -> str | None:
    """A warning when timed runs of the same thing differed too much to be trusted; None when they did not."""
    spreads = [row.iqr_seconds / row.seconds for row in results.rows if row.seconds and row.iqr_seconds is not None]
    if not spreads or statistics.median(spreads) < UNSTEADY:
        return None
    return (
        f"The times of the same work varied by {statistics.median(spreads):.0%} from run to run: this "
        "machine is busy with something else, and only the memory figures can be relied on."
    )


def show(results: Results, console: Console | None = None) -> None:
    """Print the table, the sentences and the caption. RuntimeError without rich."""
    require("the table of compare", "rich")
    from rich.console import Console

    console = console or Console()
    console.print(table(results))
    for sentence in sentences(results):
        console.print(sentence, highlight=False, markup=False)
    console.print()
    console.print(caption(results), style="dim", highlight=False, markup=False)


def _scales(results: Results) -> tuple[Scale, Scale, Scale]:
    """One unit for each column, so that its figures can be compared at a glance."""
    memory: Scale = ("MiB", 2.0**20)
    if max((row.peak_bytes or 0 for row in results.rows), default=0) >= 10000 * 2**20:
        memory = ("GiB", 2.0**30)
    slow = max((row.seconds or 0.0 for row in results.rows), default=0.0) >= 10
    return memory, memory, ("s", 1.0) if slow else ("ms", 1e-3)


def _cells(results: Results, row: Row, scales: tuple[Scale, Scale, Scale]) -> list[str]:
    if row.error is not None:
        return [label(row.variant), "OOM" if row.error == OUT_OF_MEMORY else "failed", *[""] * 6]
    cells = [label(row.variant)]
    for figure, (_, unit) in zip(("peak_bytes", "saved_bytes", "seconds"), scales, strict=True):
        cells += [_figure((getattr(row, figure) or 0) / unit), _ratio(results.ratio(row, figure, PLAIN))]
    return [*cells, _ratio(results.ratio(row, "seconds", CHECKPOINT))]


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _runs(results: Results) -> str:
    counts = sorted({len(row.all_seconds) for row in results.rows if row.all_seconds}) or [0]
    return f"{counts[0]} to {counts[-1]} runs" if len(counts) > 1 else f"{counts[0]} run{'s' * (counts[0] != 1)}"


def _subject(results: Results) -> Row | None:
    """Whom the sentences are about: the default save set, else the first one, at the longest length it reached."""
    ours = [v for v in results.variants if v not in BASELINES] or [v for v in results.variants if v == CHECKPOINT]
    name = "attention" if "attention" in ours else ours[0] if ours else None
    reached = [row for row in results.rows if row.variant == name and row.error is None]
    return max(reached, key=lambda row: row.length, default=None)


def _against(results: Results, mine: Row, other: str) -> list[str]:
    base = results.find(mine.length, other)
    if base is None or other == mine.variant:
        return []
    subject, name = f"At S = {mine.length}, {_name(mine.variant)}", _name(other)
    if base.error is not None:
        return [f"{subject} runs in {format_bytes(mine.peak_bytes or 0)}; {name} fails: {base.error}."]
    ratios = (results.ratio(mine, figure, other) for figure in ("peak_bytes", "saved_bytes", "seconds"))
    peak, saved, seconds = (1.0 if ratio is None else ratio for ratio in ratios)
    needs = f"{_times(peak)} memory at its peak than" if _differs(peak) else "about the same memory at its peak as"
    keeps = "nothing on the device" if not saved else _times(saved) if _differs(saved) else "about as much"
    return [f"{subject} needs {needs} {name} and keeps {keeps} from forward to backward, in {seconds:.2f}x its time."]


def _growth(results: Results) -> list[str]:
    """The slope of the peak between the two longest lengths that every variant named here reached."""
    names = [v for v in (PLAIN, CHECKPOINT, "attention", "input", STREAMED) if v in results.variants]
    figures = {v: {r.length: r.peak_bytes or 0 for r in results.rows if r.variant == v and not r.error} for v in names}
    done = [n for n in results.lengths if all(n in figures[v] for v in names)]
    if len(done) < 2 or not names:
        return []
    short, long = done[-2:]
    slopes = {v: (figures[v][long] - figures[v][short]) * 1000 / (long - short) for v in names}
    parts = [f"{format_bytes(slope)} with {_name(v)}" for v, slope in slopes.items()]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [f"Every 1000 tokens more raise the peak by {listed}."]


def _name(variant: str) -> str:
    return {PLAIN: "plain PyTorch", CHECKPOINT: "torch.utils.checkpoint"}.get(variant, label(variant))


def _differs(ratio: float) -> bool:
    return not 0.95 < ratio < 1.05


def _times(ratio: float) -> str:
    return f"{1 / ratio:.1f}x less" if ratio < 1 else f"{ratio:.1f}x more"
