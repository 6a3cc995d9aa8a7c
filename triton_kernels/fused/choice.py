"""Which products run fused with what stands around them, and their tiles: looked up in a table of data.

`fused_tuned.json` is a list of rows; a row matches when its architecture, op, dtype and shape class match, where
what it does not name matches anything, and the first match counts. `use` is "fused", or "library" for the library's
product and a pointwise kernel: what runs by default until a measurement says that fusing wins.

PYCKPT_FUSED=all|none, or a list of ops (PYCKPT_FUSED=qkv,mlp), decides instead of the table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import tuning

TABLE = Path(__file__).resolve().parent / "fused_tuned.json"
OPS = ("qkv", "residual", "mlp", "delta", "wgrad", "dgrad")
VARIABLE = "PYCKPT_FUSED"
# Below this width a product is narrow: its loop over the width is short beside what stands around it.
_WIDE = 2048


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of block_m x block_n, gone through in steps of block_k; `exact` is how exact float32 products are made."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 3
    exact: str = "tf32x3"

    def rows(self, columns: int) -> int:
        """Rows of a tile that has to have more than block_n columns, a wide head's: as many fewer."""
        return self.block_m * self.block_n // max(columns, self.block_n)


@dataclasses.dataclass(frozen=True)
class Key:
    """dtype is half or float32; shape is narrow or wide, by the model's width."""

    arch: str
    op: str
    dtype: str
    shape: str


def key(op: str, width: int, dtype: torch.dtype, device: torch.device) -> Key:
    """For products in `dtype` behind a sum over `width` values."""
    kind = "float32" if dtype == torch.float32 else "half"
    return Key(tuning.architecture(device), op, kind, "wide" if width >= _WIDE else "narrow")


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """The table's rows, as they stand in the file."""
    return tuple(json.loads(TABLE.read_text())["rows"])


@functools.cache
def _row(wanted: Key) -> dict[str, Any]:
    known = {row["arch"] for row in rows() if "arch" in row}
    wanted = dataclasses.replace(wanted, arch=tuning.nearest(wanted.arch, known))
    fields = dataclasses.asdict(wanted).items()
    return next(row for row in rows() if all(row.get(name, value) == value for name, value in fields))


def config(wanted: Key) -> Config:
    return Config(*_row(wanted)["config"])


def forced() -> frozenset[str] | None:
    """The ops that PYCKPT_FUSED says to run fused; None where it is not set. Raises ValueError for others."""
    value = os.environ.get(VARIABLE, "").strip().lower()
    if not value:
        return None
    if value in ("all", "none"):
        return frozenset(OPS if value == "all" else ())
    names = frozenset(name.strip() for name in value.split(","))
    if not names <= set(OPS):
        raise ValueError(f"{VARIABLE}={value!r}: expected all, none, or some of {','.join(OPS)}")
    return names


def fuses(wanted: Key) -> bool:
    """Whether the op runs fused."""
    names = forced()
    return wanted.op in names if names is not None else _row(wanted)["use"] == "fused"
