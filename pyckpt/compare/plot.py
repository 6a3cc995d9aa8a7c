"""The results as a picture: memory and time over the length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyckpt.compare.results import CHECKPOINT, PLAIN, STREAMED, Results, Row, label
from pyckpt.compare.words import title
from pyckpt.extras import require
from pyckpt.files import replacing
from pyckpt.measure.units import format_seconds

# Okabe and Ito's colours, and a dark violet, which people with any colour vision can tell apart; styles differ too.
_STYLE: dict[str, dict[str, Any]] = {
    PLAIN: {"color": "#000000", "linestyle": "--", "marker": "s"},
    CHECKPOINT: {"color": "#d55e00", "linestyle": "--", "marker": "D"},
    "all": {"color": "#e69f00", "linestyle": "-", "marker": "v"},
    "attention+qkv": {"color": "#cc79a7", "linestyle": "-", "marker": "^"},
    "attention+mid": {"color": "#009e73", "linestyle": "-", "marker": "P"},
    "attention": {"color": "#0072b2", "linestyle": "-", "marker": "o", "linewidth": 2.8, "zorder": 5},
    "input": {"color": "#56b4e9", "linestyle": "-", "marker": "X"},
    STREAMED: {"color": "#5d3a9b", "linestyle": "-.", "marker": "*", "linewidth": 2.8},
}


def plot(results: Results, path: str | os.PathLike[str]) -> Path:
    """Draw peak memory over S and time, relative to plain PyTorch, over S into a PNG file; returns its path.

    Raises:
        RuntimeError: without matplotlib. ValueError: when there is nothing to draw.
    """
    require("the picture of compare", "matplotlib")
    from matplotlib.figure import Figure

    if not any(row.error is None for row in results.rows):
        raise ValueError("there is nothing to draw: every variant failed")
    figure = Figure(figsize=(12, 5.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"Forward + backward of {title(results)}", fontsize=12, x=0.01, ha="left")
    _draw_memory(left, results)
    _draw_time(right, results)
    figure.text(0.01, -0.02, _footnote(results), fontsize=8, color="#555555", va="top")
    return _save(figure, Path(path))


def _draw_memory(axes: Any, results: Results) -> None:
    lines = {v: [(r.length, (r.peak_bytes or 0) / 2**20) for r in _rows(results, v)] for v in results.variants}
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _draw(axes, lines, results)
    axes.set_title("Peak memory (MiB)", loc="left", fontsize=11)


def _draw_time(axes: Any, results: Results) -> None:
    relative = PLAIN in results.variants
    lines = {}
    for variant in results.variants:
        points = [
            (r.length, results.ratio(r, "seconds", PLAIN) if relative else r.seconds) for r in _rows(results, variant)
        ]
        lines[variant] = [(x, y) for x, y in points if y is not None]
    axes.set_yscale("linear" if relative else "log")
    if relative:
        # Never closer than this: a few percent of noise must not fill the picture.
        heights = [y for points in lines.values() for _, y in points]
        axes.set_ylim(min(0.5, 0.95 * min(heights, default=1.0)), max(1.5, 1.05 * max(heights, default=1.0)))
    _draw(axes, lines, results)
    if relative:
        axes.set_title("Time, relative to plain PyTorch", loc="left", fontsize=11)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        _plain_seconds(axes, results)
    else:
        axes.set_title("Time (s)", loc="left", fontsize=11)


def _plain_seconds(axes: Any, results: Results) -> None:
    """Under each length the time of plain, whose line is 1 everywhere: what the ratios are ratios of."""
    seconds = {row.length: row.seconds or 0.0 for row in _rows(results, PLAIN)}
    texts = [f"{n}\n{format_seconds(seconds[n]) if n in seconds else ''}" for n in results.lengths]
    axes.set_xticks(results.lengths, texts)
    axes.set_xlabel("S, tokens in the sequence; under it, the time of plain PyTorch")


def _draw(axes: Any, lines: dict[str, list[tuple[int, float]]], results: Results) -> None:
    lines = {variant: points for variant, points in lines.items() if points}
    for variant, points in lines.items():
        axes.plot(*zip(*points, strict=True), **{"linewidth": 1.7, "markersize": 5, **_STYLE[variant]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.lengths, [str(n) for n in results.lengths])
    axes.minorticks_off()
    axes.set_xlabel("S, tokens in the sequence")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.08)
    _label_ends(axes, {v: points[-1] for v, points in lines.items()})


def _label_ends(axes: Any, ends: dict[str, tuple[int, float]]) -> None:
    """A label at the end of each line, moved apart where they would overlap."""
    figure = axes.figure
    figure.draw_without_rendering()  # the data's place on the page is known from here on
    pixels = {v: axes.transData.transform(point) for v, point in ends.items()}
    gap = 12.5 * figure.dpi / 72
    order = sorted(pixels, key=lambda v: pixels[v][1])
    heights = _spread([float(pixels[v][1]) for v in order], gap)
    for variant, height in zip(order, heights, strict=True):
        points = (10.0, (height - pixels[variant][1]) * 72 / figure.dpi)
        weight = "bold" if variant == "attention" else "normal"
        axes.annotate(
            label(variant),
            ends[variant],
            points,
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=_STYLE[variant]["color"],
            weight=weight,
            annotation_clip=False,
        )


def _spread(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved to be ``gap`` apart at least: groups that touch are merged and centred."""
    groups: list[list[float]] = []  # [sum of wishes for the group's first place, members]
    for height in heights:
        groups.append([height, 1.0])
        while len(groups) > 1 and _start(groups[-1]) < _start(groups[-2]) + groups[-2][1] * gap:
            wish, members = groups.pop()
            below = groups[-1]
            below[0] += wish - members * below[1] * gap
            below[1] += members
    return [_start(group) + i * gap for group in groups for i in range(int(group[1]))]


def _start(group: list[float]) -> float:
    return group[0] / group[1]


def _rows(results: Results, variant: str) -> list[Row]:
    return sorted((r for r in results.rows if r.variant == variant and r.error is None), key=lambda r: r.length)


def _footnote(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return (
        "Peak memory is above weights, their gradients and the input. torch checkpoint: "
        f"torch.utils.checkpoint around each block.\n{results.device}; {versions}"
    )


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15)
    return path
