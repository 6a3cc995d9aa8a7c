"""What a comparison found: rows of figures that can be written as JSON and read back."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyckpt.files import write_json

PLAIN = "plain"
CHECKPOINT = "checkpoint"
STREAMED = "streamed"
BASELINES = (PLAIN, CHECKPOINT)
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Row:
    """One variant at one length; bytes and seconds of one forward and backward.

    ``peak_bytes`` is above weights, gradients and inputs; ``seconds`` is the median and ``iqr_seconds`` the
    interquartile range of ``all_seconds``. A variant that failed has ``error`` and no figures.
    """

    length: int
    variant: str
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    seconds: float | None = None
    iqr_seconds: float | None = None
    all_seconds: tuple[float, ...] = ()
    gradient_error: float | None = None
    model_flops: float | None = None
    error: str | None = None


@dataclass
class Results:
    """The figures of `pyckpt.compare.run`, with the configuration, device and versions behind them."""

    config: dict[str, Any]
    device: str
    versions: dict[str, str]
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return sorted({row.length for row in self.rows})

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(row.variant for row in self.rows))

    def find(self, length: int, variant: str) -> Row | None:
        """The row of a length and a variant; None where there is none."""
        return next((r for r in self.rows if r.length == length and r.variant == variant), None)

    def ratio(self, row: Row, figure: str, to: str) -> float | None:
        """``figure`` (the name of a field) over variant ``to``'s at the same length; None without both."""
        base = self.find(row.length, to)
        mine, theirs = getattr(row, figure), None if base is None else getattr(base, figure)
        return mine / theirs if mine is not None and theirs else None

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            ratios = {
                f"{name}_over_{base}": self.ratio(row, figure, base)
                for figure, name in (("peak_bytes", "peak"), ("saved_bytes", "saved"), ("seconds", "time"))
                for base in BASELINES
            }
            rows.append({**dataclasses.asdict(row), **ratios})
        return {
            "config": self.config,
            "device": self.device,
            "versions": self.versions,
            "notes": self.notes,
            "rows": rows,
        }

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to ``path``, whole or not at all."""
        path = Path(path)
        write_json(path, self.to_dict())
        return path

    @staticmethod
    def load_json(path: str | os.PathLike[str]) -> Results:
        """Read what `save_json` wrote. Raises ValueError when the file holds something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            fields = {field.name for field in dataclasses.fields(Row)}
            rows = [Row(**{k: v for k, v in row.items() if k in fields}) for row in data["rows"]]
            rows = [dataclasses.replace(row, all_seconds=tuple(row.all_seconds)) for row in rows]
            return Results(data["config"], data["device"], data["versions"], rows, data["notes"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no results of pyckpt compare ({error!r})") from error


def label(variant: str) -> str:
    """A variant's name as it is shown: ``plain PyTorch``, ``torch checkpoint``, ``save="attention"``."""
    return {PLAIN: "plain PyTorch", CHECKPOINT: "torch checkpoint", STREAMED: "streamed"}.get(
        variant, f'save="{variant}"'
    )
