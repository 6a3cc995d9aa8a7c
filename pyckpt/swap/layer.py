"""The forward of a swapped decoder layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from pyckpt.attend.dense import Layout
from pyckpt.block import CheckpointedBlock, run_blocks
from pyckpt.exec.lm_ends import Ends, Targets
from pyckpt.stream import Stream, stream_blocks, stream_loss
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.generic import GenericMappedBlock
from pyckpt.swap.replaced import Replaced

CALL = "pyckpt_call"


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How layers are streamed: by this `Stream`, keeping the input of every `segments`-th."""

    stream: Stream
    segments: int


@dataclasses.dataclass(frozen=True)
class Call:
    """What a model's forward tells its layers: positions (B, S), (1, S) or None, and cu_seqlens of the flat batch.

    `runs`: by a layer's place, the blocks that it runs, its own first; none where an earlier layer has run it.
    `stream`: how those are streamed, where they are.
    """

    positions: Tensor | None
    cu_seqlens: Tensor | None
    runs: dict[int, list[CheckpointedBlock]] = dataclasses.field(default_factory=dict)
    stream: Streaming | None = None

    def run(self, place: int, block: CheckpointedBlock, x: Tensor) -> Tensor:
        """What follows from hidden states (B, S, d_model) where the layer at `place`, of this block, stands."""
        blocks = self.runs[place] if self.runs else [block]
        if not blocks:
            return x
        positions = None if self.positions is None else self.positions.expand(x.shape[:2]).reshape(-1)
        if self.stream is not None:
            rows = x if self.cu_seqlens is None else x.flatten(0, 1)
            options = (self.stream.segments, rows, positions, self.cu_seqlens, self.stream.stream)
            return stream_blocks(blocks, *options).view(x.shape)
        if self.cu_seqlens is None:
            return run_blocks(blocks, x, self.positions, None)
        return run_blocks(blocks, x.flatten(0, 1), positions, self.cu_seqlens, checked=True).view(x.shape)

    def stream_loss(self, layers: list[SwappedLayer], ids: Tensor, targets: Targets, ends: Ends) -> Tensor:
        """The loss of token ids (B, S) over all of a model's layers and its ends."""
        assert self.stream is not None
        positions = None if self.positions is None else self.positions.expand(ids.shape).reshape(-1)
        layout = Layout(*ids.shape) if self.cu_seqlens is None else Layout(1, ids.numel(), self.cu_seqlens)
        blocks: list[CheckpointedBlock] = [s.block for s in layers]
        return stream_loss(blocks, self.stream.segments, ids, targets, ends, layout, positions, self.stream.stream)


class SwappedLayer(Replaced):
    """Runs the block where the model's forward says so, by a `Call`; else the layer's original forward.

    Hidden states (B, S, d_model) in and out. `place`: which of the model's layers it is.
    """

    def __init__(self, module: nn.Module, block: MappedBlock | GenericMappedBlock, place: int) -> None:
        super().__init__(module)
        self.block, self.place = block, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None:
            return self.original(*args, **kwargs)
        return call.run(self.place, self.block, self.given(args, kwargs)["hidden_states"])
