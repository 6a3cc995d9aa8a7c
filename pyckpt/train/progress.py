"""What a run shows while it works: a bar on a terminal, lines elsewhere, nothing without a console."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from pyckpt.measure import format_bytes

_SILENCE = 30.0  # seconds after which a log hears of a step that is still under way


class Progress:
    """Shows nothing; the base of the others. Losses are in nats per token."""

    def __init__(self, unit: str = "byte") -> None:
        self.unit = unit
        self.validation: float | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._tokens, self._seconds = 0, 0.0

    def start(self, done: int, total: int) -> None:
        """`done` of `total` steps lie behind."""

    def step(self, record: dict[str, Any], memory: tuple[str, int]) -> None:
        self._recent.append((record["tokens"], record["seconds"]))
        self._tokens += record["tokens"]
        self._seconds += record["seconds"]

    def validated(self, loss: float) -> None:
        self.validation = loss

    def tile(self, what: str, block: int, tile: int) -> None:
        """Inside a streamed step: on its way `what` ("forward", ...) through this tile of this block."""

    def note(self, text: str = "") -> None:
        """A line of text."""

    def command(self, text: str) -> None:
        """A line to be copied: in one piece, however long."""

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Rows of (what, text), aligned."""

    def quote(self, title: str, text: str) -> None:
        """Text that is not ours, between two rules."""

    def stop(self) -> None:
        """Take the bar away or leave it as it is; safe to call twice."""

    @property
    def rate(self) -> str:
        """Of the last steps."""
        tokens, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        return self._per_second(tokens, seconds)

    @property
    def summary(self) -> str:
        """Of all steps since the start."""
        if not self._tokens:
            return "no steps were left to do"
        return f"{self._per_second(self._tokens, self._seconds)} over {self._seconds:.0f} s of steps"

    def _per_second(self, tokens: int, seconds: float) -> str:
        rate = tokens / max(seconds, 1e-9)
        short = f"{rate:.1f}" if rate < 1e3 else f"{rate / 1e3:.1f}k" if rate < 1e6 else f"{rate / 1e6:.2f}M"
        return f"{short} {self.unit}s/s"


class _Console(Progress):
    def __init__(self, console: Any, unit: str) -> None:
        super().__init__(unit)
        self.console = console

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Where nobody reads any more (`| head`, a terminal that was closed), training goes on, untold."""
        try:
            yield
        except (OSError, SystemExit):  # rich makes SystemExit of a closed pipe
            self.console.quiet = True
            _discard(self.console.file)

    def note(self, text: str = "") -> None:
        with self._telling():
            self.console.print(text, markup=False, highlight=False)

    def command(self, text: str) -> None:
        with self._telling():
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, rows: list[tuple[str, str]]) -> None:
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for what, text in rows:
            grid.add_row(Text(what, style="bold"), Text(text, overflow="fold"))
        with self._telling():
            self.console.print(grid)

    def quote(self, title: str, text: str) -> None:
        from rich.text import Text

        with self._telling():
            self.console.rule(Text(title), align="left", style="dim")
            self.console.print(Text(text))
            self.console.rule(style="dim")


class Lines(_Console):
    """A line every `every` steps, for logs."""

    def __init__(self, console: Any, unit: str, every: int) -> None:
        super().__init__(console, unit)
        self.every = every
        self.last = self.total = 0
        self._told = time.monotonic()

    def start(self, done: int, total: int) -> None:
        self.last, self.total = done, total

    def step(self, record: dict[str, Any], memory: tuple[str, int]) -> None:
        super().step(record, memory)
        number = self.last = record["step"]
        if number % self.every == 0 or number in (1, self.total):
            width = len(str(self.total))
            self.note(
                f"step {number:{width}}/{self.total}  loss {record['loss']:.3f}  {self.rate}  "
                f"peak {memory[0]} {format_bytes(memory[1])}"
            )

    def tile(self, what: str, block: int, tile: int) -> None:
        now = time.monotonic()
        if now - self._told > _SILENCE:
            self.note(f"step {min(self.last + 1, self.total)}/{self.total}  {what}: block {block}, tile {tile}")
            self._told = now

    def note(self, text: str = "") -> None:
        super().note(text)
        self._told = time.monotonic()

    def validated(self, loss: float) -> None:
        super().validated(loss)
        self.note(f"step {self.last:{len(str(self.total))}}/{self.total}  validation loss {loss:.3f}")


class Bar(_Console):
    """One line that renews itself, of at most 80 columns."""

    def __init__(self, console: Any, unit: str) -> None:
        super().__init__(console, unit)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            refresh_per_second=4,
            expand=False,
        )
        self._task: Any = None
        self._text = ""

    def start(self, done: int, total: int) -> None:
        self._task = self._bar.add_task("starting", total=total, completed=done)
        with self._telling():
            self._bar.start()

    def step(self, record: dict[str, Any], memory: tuple[str, int]) -> None:
        super().step(record, memory)
        validation = "" if self.validation is None else f" val {self.validation:.3f}"
        text = f"loss {record['loss']:.3f}{validation} {self.rate} {memory[0]} {format_bytes(memory[1])}"
        self._bar.update(self._task, completed=record["step"], description=text)

    def tile(self, what: str, block: int, tile: int) -> None:
        if self._task is not None:
            self._bar.update(self._task, description=f"{what}: block {block}, tile {tile}")

    def stop(self) -> None:
        with self._telling():
            self._bar.stop()


def _discard(file: Any) -> None:
    """Send what stdout or stderr still holds nowhere: Python's own flush at the exit would fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not every file has a number
        if file.fileno() in (1, 2):  # other files are not ours to turn off
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, file.fileno())
            os.close(null)


def progress_for(console: Any, unit: str, every: int) -> Progress:
    """console: a rich.console.Console, or None to show nothing."""
    if console is None:
        return Progress(unit)
    renews = console.is_terminal and not console.is_dumb_terminal  # a dumb one would show the bar at the end only
    return Bar(console, unit) if renews else Lines(console, unit, every)
