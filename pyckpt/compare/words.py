"""The results as text: a table, a caption and two or three plain sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyckpt.compare.results import CHECKPOINT, PLAIN, Results, Row, label
from pyckpt.measure.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


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
        "One forward and backward over S tokens. peak: the most memory alive at once, above weights, gradients "
        "and the input, which exist before. saved: what the forward keeps for the backward, the input included. "
        "time: median of the runs. x plain, x ckpt: relative to plain PyTorch, which stores everything, and to "
        f"torch.utils.checkpoint around each block. Measured on {results.device}; {versions}."
    )


def table(results: Results) -> Table:
    """A rich table that fits in 80 columns, one section a length."""
    from rich import box
    from rich.table import Table

    out = Table(title=title(results), box=box.SIMPLE_HEAD, padding=(0, 1), title_style="bold", pad_edge=False)
    out.add_column("S", justify="right")
    out.add_column("variant", no_wrap=True)
    for name in ("peak", "x plain", "saved", "x plain", "time", "x plain", "x ckpt"):
        out.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for length in results.lengths:
        rows = [row for row in results.rows if row.length == length]
        for i, row in enumerate(rows):
            style = "bold" if row.variant == "attention" else None
            out.add_row(
                str(length) if i == 0 else "", *_cells(results, row), end_section=row is rows[-1], style=style
            )
    return out


def sentences(results: Results) -> list[str]:
    """What the figures of the longest length say, in plain words. Empty without the variants to compare."""
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
    return said + results.notes


def show(results: Results, console: Console | None = None) -> None:
    """Print the table, the sentences and the caption."""
    from rich.console import Console

    console = console or Console()
    console.print(table(results))
    for sentence in sentences(results):
        console.print(sentence, highlight=False, markup=False)
    console.print()
    console.print(caption(results), style="dim", highlight=False, markup=False)


def _cells(results: Results, row: Row) -> list[str]:
    if row.error is not None:
        return [label(row.variant), row.error, *[""] * 6]
    return [
        label(row.variant),
        format_bytes(row.peak_bytes or 0),
        _ratio(results.ratio(row, "peak_bytes", PLAIN)),
        format_bytes(row.saved_bytes or 0),
        _ratio(results.ratio(row, "saved_bytes", PLAIN)),
        format_seconds(row.seconds or 0.0),
        _ratio(results.ratio(row, "seconds", PLAIN)),
        _ratio(results.ratio(row, "seconds", CHECKPOINT)),
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


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
        f"{subject} needs {_times(peak)} memory at its peak than {name} and keeps {_times(saved)} from forward "
        f"to backward, in {seconds:.2f}x its time."
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
    return [
        f"Every 1000 tokens more raise the peak by {', '.join(parts[:-1])}{' and ' * (len(parts) > 1)}{parts[-1]}."
    ]


def _name(variant: str) -> str:
    return {PLAIN: "plain PyTorch", CHECKPOINT: "torch.utils.checkpoint"}.get(variant, label(variant))


def _times(ratio: float) -> str:
    if 0.95 < ratio < 1.05:
        return "about the same"
    return f"{1 / ratio:.1f}x less" if ratio < 1 else f"{ratio:.1f}x more"
