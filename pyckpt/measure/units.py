"""Bytes and seconds as people read them."""

from __future__ import annotations

import re

from pyckpt.errors import as_int

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


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


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Bytes, given as their number or as text: ``"1.5 GiB"``, ``"800MB"``. ValueError names what was called `name`."""
    whole = as_int(size)
    if whole is not None and whole > 0:
        return whole
    if isinstance(size, str):
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]i?)?b?)?", size.strip().lower())
        if found and (given := int(float(found[1]) * _UNITS[found[2] or ""])) > 0:
            return given
    raise ValueError(
        f"{name}={size!r}: expected a number of bytes above 0, or text such as '20GiB' or '800 MB'"
        + ("; the number has to be an int, as int(1e9) is" if isinstance(size, float) else "")
    )


def format_seconds(seconds: float) -> str:
    """``seconds`` with the unit that fits and three significant digits: ``"41.2 ms"``."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if abs(seconds) * factor < 999.5:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
