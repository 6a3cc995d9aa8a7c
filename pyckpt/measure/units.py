"""Bytes and seconds as people read them."""

from __future__ import annotations


def format_bytes(n: float) -> str:
    """``n`` bytes with a binary unit and three significant digits: ``"1.50 MiB"``."""
    value = float(n)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.5 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    return f"{_three_digits(value)} {unit}"


def format_seconds(seconds: float) -> str:
    """``seconds`` with the unit that fits and three significant digits: ``"41.2 ms"``."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if abs(seconds) * factor < 999.5:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
