"""The state of NumPy's global generator, which takes NumPy 80 microseconds to give, and as long to take.

It is read where it lies (`BitGenerator.ctypes`), and asked for only where it has changed since it was last asked for.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_BYTES = 625 * 4  # of a Mersenne Twister: 624 words and a place among them
_last: tuple[bytes, Any] | None = None


def numpy_state() -> Any:
    """For `set_numpy_state`; None where NumPy is not there, which need not be installed."""
    global _last
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    raw, last = _raw(numpy), _last
    # A normal number that waits to be drawn lies elsewhere: then it has to be asked for.
    if raw is not None and last is not None and last[0] == raw and not _waits(last[1]):
        return last[1]
    state = numpy.random.get_state()
    _last = None if raw is None else (raw, state)
    return state


def set_numpy_state(state: Any) -> None:
    global _last
    if state is None or numpy_state() is state:
        return
    numpy = sys.modules["numpy"]
    numpy.random.set_state(state)
    raw = _raw(numpy)
    _last = None if raw is None else (raw, state)


def _waits(state: Any) -> bool:
    return bool(state[3])


def _raw(numpy: Any) -> bytes | None:
    """Its memory; None where it is no Mersenne Twister."""
    own = getattr(numpy.random, "get_bit_generator", None)
    generator = None if own is None else own()
    if generator is None or type(generator).__name__ != "MT19937":
        return None
    return ctypes.string_at(generator.ctypes.state_address, _BYTES)
