"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyckpt.files import replacing


def loss_curve(
    path: Path, losses: Sequence[float], validation: Sequence[tuple[int, float]], *, unit: str, title: str
) -> None:
    """Draw the training loss of every step, its running mean, and (step, validation loss) points into a PNG
    file.

    unit: what a token is ("byte" or "token"); losses are in nats per unit.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    numbers = range(1, len(losses) + 1)
    axes.plot(numbers, losses, color="#9db8d9", linewidth=0.8, label="training, each step")
    if len(losses) > 20:
        axes.plot(numbers, _running_mean(losses), color="#1f4e8c", linewidth=1.8, label="training, running mean")
    if validation:
        final = f"validation (last {validation[-1][1]:.3f})"
        axes.plot(*zip(*validation, strict=True), "o--", color="#d1495b", linewidth=1.0, markersize=6, label=final)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)  # a path may have two $ in it
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _running_mean(values: Sequence[float]) -> list[float]:
    """The mean over a twentieth of the steps around each one, over fewer near the ends.

    At the start as many on both sides, for the curve is steep there.
    """
    half = max(len(values) // 40, 2)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(half, i)
        first, end = i - reach, min(i + reach + 1, len(values))
        means.append((sums[end] - sums[first]) / (end - first))
    return means
