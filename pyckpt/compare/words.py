"""The results as text: a table, a caption and two or three plain sentences."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from pyckpt.compare.results import CHECKPOINT, PLAIN, Results, Row, label
from pyckpt.measure.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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
    return f"{what}: d_model {c['d_model']}, {heads}, d_ff {c['d_ff']}, batch {c['batch']}, {c['dtype']}"


def caption(results: Results) -> str:
    """How to read the figures, and where they come from."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        "One forward and backward over S tokens. peak: the most memory alive at once, above weights, "
        "gradients and the input, which exist before. saved: what the forward keeps for the backward, the "
        f"input included. time: median of {_runs(results)}. x plain, x ckpt: relative to plain PyTorch, which stores "
        "everything, and to torch.utils.checkpoint around each block. "
        f"Measured on {results.device}; {versions}."
    )


def table(results: Results) -> Table:
    """A rich table that fits in 80 columns, one section a length."""
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
    """What the figures of the longest length say, in plain words."""
    said = []
    for length in reversed(results.lengths):
        rows = {v: results.find(length, v) for v in results.variants}
        mine = _best_of(rows)
        if mine is None or mine.error:
            continue
        said += _against(results, mine, rows.get(PLAIN), "plain PyTorch")
        said += _against(results, mine, rows.get(CHECKPOINT), "torch.utils.checkpoint")
        said += _per_token(results)
        break
    return said + results.notes + [warning for warning in [unsteady(results)] if warning]


def unsteady(results: Results) -> str | None:
    """A warning when timed runs of the same thing differed too much to be trusted; None when they did not."""
    spreads = [
        row.iqr_seconds / row.seconds for row in results.rows if row.seconds and row.iqr_seconds is not None
    ]
    if not spreads or statistics.median(spreads) < UNSTEADY:
        return None
    return (
        f"The times of the same work varied by {statistics.median(spreads):.0%} from run to run: this "
        "machine is busy with something else, and only the memory figures can be relied on."
    )


def show(results: Results, console: Console | None = None) -> None:
    """Print the table, the sentences and the caption."""
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
    if max((row.peak_bytes or 0 for row in results.rows), default=0) >= 100 * 2**30:
        memory = ("GiB", 2.0**30)
    slow = max((row.seconds or 0.0 for row in results.rows), default=0.0) >= 100
    return memory, memory, ("s", 1.0) if slow else ("ms", 1e-3)


def _cells(results: Results, row: Row, scales: tuple[Scale, Scale, Scale]) -> list[str]:
    if row.error is not None:
        return [label(row.variant), row.error, *[""] * 6]
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
    return (
        f"{counts[0]} to {counts[-1]} runs" if len(counts) > 1 else f"{counts[0]} run{'s' * (counts[0] != 1)}"
    )


def _best_of(rows: dict[str, Any]) -> Row | None:
    """The save set that the sentences are about: the default one, else the first there is."""
    ours = [v for v in rows if v not in (PLAIN, CHECKPOINT)]
    name = "attention" if "attention" in ours else ours[0] if ours else CHECKPOINT
    return rows.get(name)


def _against(results: Results, mine: Row, base: Row | None, name: str) -> list[str]:
    if base is None or base.variant == mine.variant:
        return []
    subject = f"At S = {mine.length}, {_name(mine.variant)}"
    if base.error is not None:
        return [f"{subject} runs in {format_bytes(mine.peak_bytes or 0)}; {name} fails: {base.error}."]
    peak, saved, seconds = (
        (results.ratio(mine, figure, base.variant) or 1.0)
        for figure in ("peak_bytes", "saved_bytes", "seconds")
    )
    return [
        f"{subject} needs {_times(peak)} memory at its peak than {name} and keeps {_times(saved)} from "
        f"forward to backward, in {seconds:.2f}x its time."
    ]


def _per_token(results: Results) -> list[str]:
    """The slope of the peak between the two longest lengths that every variant reached."""
    names = [v for v in (PLAIN, CHECKPOINT, "attention", "input") if v in results.variants]
    done = [n for n in results.lengths if all((r := results.find(n, v)) and not r.error for v in names)]
    if len(done) < 2 or not names:
        return []
    short, long = done[-2:]
    parts = []
    for name in names:
        first, last = results.find(short, name), results.find(long, name)
        assert first is not None and last is not None
        slope = ((last.peak_bytes or 0) - (first.peak_bytes or 0)) * 1000 / (long - short)
        parts.append(f"{format_bytes(slope)} with {_name(name)}")
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [f"Every 1000 tokens more raise the peak by {listed}."]


def _name(variant: str) -> str:
    return {PLAIN: "plain PyTorch", CHECKPOINT: "torch.utils.checkpoint"}.get(variant, label(variant))


def _times(ratio: float) -> str:
    if 0.95 < ratio < 1.05:
        return "about the same"
    return f"{1 / ratio:.1f}x less" if ratio < 1 else f"{ratio:.1f}x more"
