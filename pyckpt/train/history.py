"""The losses of a run, in memory and as lines of JSON in metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pyckpt.files import replacing


@dataclass
class History:
    """train[i]: loss of step i + 1. validation: (step, loss). In nats per token."""

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        return {"train": list(self.train), "validation": [list(point) for point in self.validation]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        return cls(list(state["train"]), [(int(step), float(loss)) for step, loss in state["validation"]])


class MetricsLog:
    """metrics.jsonl: a line for each step and each validation, written as they happen."""

    def __init__(self, path: Path, history: History) -> None:
        """Open the log for a run that has `history` behind it; lines of later steps are taken out."""
        lines = _lines_of(path, history)
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Raises RuntimeError where the disk is full, say."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise RuntimeError(
                f"{self._file.name} could not be written: {error.strerror}. The checkpoints are intact: make room, "
                f"then resume."
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written fails here once more
            self._file.close()


def _lines_of(path: Path, history: History) -> list[dict[str, Any]]:
    """One line a step and a validation of `history`, with the details that the old log still has."""
    old: dict[tuple[int, str], dict[str, Any]] = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                old[line["step"], "loss" if "loss" in line else "validation_loss"] = line
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a kill
    wanted = [(step, "loss", loss) for step, loss in enumerate(history.train, 1)]
    wanted += [(step, "validation_loss", loss) for step, loss in history.validation]
    wanted.sort(key=lambda point: point[0])  # stable: a step's loss comes before its validation
    lines = []
    for step, kind, loss in wanted:
        line = old.get((step, kind), {})
        lines.append(line if line.get(kind) == loss else {"step": step, kind: loss})
    return lines
