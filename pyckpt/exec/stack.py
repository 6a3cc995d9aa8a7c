"""What a streamed run is over: its blocks and its inputs, without weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyckpt.attend.context import ContextParallel, processes_of
from pyckpt.attend.dense import Layout
from pyckpt.attend.tiled import TiledAttend
from pyckpt.exec.positions import positions_of
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.schedule import Schedule
from pyckpt.exec.tiling import count
from pyckpt.ops.chunks import acc_dtype
from pyckpt.tokenwise.positions import Positions


@dataclasses.dataclass(frozen=True)
class Stack:
    """The blocks of a streamed run and its inputs: all that does not change while it runs, and no weights.

    context: the processes that share the sequences, whose tokens `layout` and `positions` have, all of them.
    """

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
    context: ContextParallel | None = None

    @property
    def tokens(self) -> int:
        """Of this process."""
        return self.layout.tokens // processes_of(self.context)

    @property
    def n_tiles(self) -> int:
        return count(self.tokens, self.tile)

    def rows(self, tile: int) -> slice:
        """Where a tile's tokens are among all: `layout`, `positions` and both ends are of those."""
        rows = slice(tile * self.tile, min((tile + 1) * self.tile, self.tokens))
        return rows if self.context is None else self.context.tile(rows)

    def tiled(self, plan: BlockPlan) -> TiledAttend:
        """A block's attention."""
        if self.context is None:
            return TiledAttend(plan.attend, self.layout, self.tile)
        return self.context.tiled(plan.attend, self.layout, self.tile)

    def key_widths(self, plan: BlockPlan) -> tuple[int, int]:
        """Of k and v, for each of this process's tokens, as attention holds them."""
        repeats = 1 if self.context is None else self.context.repeats(plan.attend)
        return plan.d_kv * repeats, plan.d_v * repeats

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
            found["k"], found["v"] = ((width, self.dtype) for width in self.key_widths(plan))
        found |= {t.name: (t.width, self.x_dtype if t.residual else self.dtype) for t in plan.post_tensors}
        return found
