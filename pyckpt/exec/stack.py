"""What a streamed run is over: its blocks and its inputs, without weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyckpt.attend.dense import Layout
from pyckpt.exec.positions import positions_of
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.schedule import Schedule
from pyckpt.exec.tiling import count
from pyckpt.ops.chunks import acc_dtype
from pyckpt.tokenwise.positions import Positions


@dataclasses.dataclass(frozen=True)
class Stack:
    """The blocks of a streamed run and its inputs: all that does not change while it runs, and no weights."""

    plans: list[BlockPlan]
    layout: Layout
    positions: Tensor | None
    seeds: list[int | None]
    x_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device
    d_model: int
    tile: int
    schedule: Schedule

    @property
    def n_tiles(self) -> int:
        return count(self.layout.tokens, self.tile)

    def of_positions(self, rows: slice) -> Positions:
        return positions_of(self.layout, self.positions, rows, self.device)

    def kept(self, block: int) -> dict[str, tuple[int, torch.dtype]]:
        """What this block keeps beside x: width and dtype, by name."""
        plan, keep = self.plans[block], self.plans[block].save
        found: dict[str, tuple[int, torch.dtype]] = {}
        if keep.attention:
            found["o"] = (plan.d_o, self.dtype)
            found["lse"] = (plan.attend.n_heads, acc_dtype(self.dtype))
        if keep.qkv:
            found["k"], found["v"] = (plan.d_kv, self.dtype), (plan.d_v, self.dtype)
        found |= {t.name: (t.width, self.x_dtype if t.residual else self.dtype) for t in plan.post_tensors}
        return found
