"""Attributes of which each thread has its own."""

from __future__ import annotations

import threading
from typing import Any


class ByThread(threading.local):
    """None where the thread has set none. A copy, and one from a pickle, has none at all."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a protocol's, of which it has none
            raise AttributeError(name)
        return None

    def __reduce__(self) -> Any:
        return ByThread, ()
