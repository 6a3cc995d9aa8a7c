"""Ctrl-C at a safe moment."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Inside the `with` block, the first SIGINT, SIGTERM or SIGHUP only sets `signal`; a second SIGINT interrupts as
    usual. SIGHUP (the terminal was closed) stays ignored where it is, as under nohup.

    A step that is under way is thus finished and a checkpoint written. Outside the main thread, where Python
    allows no handlers, signals work as they did.
    """

    def __init__(self, message: str = "") -> None:
        """message: what to write to stderr at the first signal."""
        # A process that was started without stderr may have any other file under its number.
        self._message = b"" if sys.stderr is None else message.encode()
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._came = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _handled():
                self._previous[number] = signal.signal(number, self._on_signal)
            # Handlers run in the main thread's Python, which waits in autograd's C++ while another thread runs a GPU's
            # backward. What arrives is written here at once.
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pipe is not None:
            signal.set_wakeup_fd(self._fd)
            for end in self._pipe:
                os.close(end)
            self._pipe = None
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def __bool__(self) -> bool:
        if self.signal is None and not self._came and self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                self._came = any(n in self._previous for n in os.read(self._pipe[0], 256))
        return self.signal is not None or self._came

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self._message:
            # Ctrl-C reaches all of a pipeline: who read our stderr may be gone.
            with contextlib.suppress(OSError):
                os.write(2, self._message)  # not print: the signal may have come in the middle of one


def _handled() -> list[int]:
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        numbers.append(hang_up)
    return numbers
