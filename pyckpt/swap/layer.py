"""The forward of a swapped decoder layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from pyckpt.block import CheckpointedBlock, run_blocks
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.generic import OwnModulesBlock
from pyckpt.swap.replaced import Replaced

CALL = "pyckpt_call"


@dataclasses.dataclass(frozen=True)
class Call:
    """What a model's forward tells its layers: positions (B, S), (1, S) or None, and cu_seqlens of the flat batch.

    `runs`: by a layer's place, the blocks that it runs, its own first; none where an earlier layer has run it.
    """

    positions: Tensor | None
    cu_seqlens: Tensor | None
    runs: dict[int, list[CheckpointedBlock]] = dataclasses.field(default_factory=dict)


class SwappedLayer(Replaced):
    """Runs the block where the model's forward says so, by a `Call`; else the layer's original forward.

    Hidden states (B, S, d_model) in and out. `place`: which of the model's layers it is.
    """

    def __init__(self, module: nn.Module, block: MappedBlock | OwnModulesBlock, place: int) -> None:
        super().__init__(module)
        self.block, self.place = block, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None:
            return self.original(*args, **kwargs)
        given = self.given(args, kwargs)
        x = given["hidden_states"]
        blocks = call.runs[self.place] if call.runs else [self.block]
        if not blocks:
            return x
        return self.run(blocks, x, call, given)

    def run(self, blocks: list[CheckpointedBlock], x: Tensor, call: Call, given: dict[str, Any]) -> Any:
        """What the layer returns: `blocks` of x, of a call with the arguments `given`."""
        if call.cu_seqlens is None:
            return run_blocks(blocks, x, call.positions, None)
        positions = None if call.positions is None else call.positions.expand(x.shape[:2]).reshape(-1)
        return run_blocks(blocks, x.flatten(0, 1), positions, call.cu_seqlens, checked=True).view(x.shape)
