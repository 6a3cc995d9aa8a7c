"""The forward of a swapped decoder layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.attend.context import ContextParallel
from pyckpt.attend.dense import Layout
from pyckpt.block import CheckpointedBlock, run_blocks
from pyckpt.exec.lm_ends import Ends, Targets
from pyckpt.exec.streamed_layers import InRun, LayerRun
from pyckpt.save import save_set
from pyckpt.stream import Stream, open_blocks, stream_blocks, stream_loss
from pyckpt.swap import again
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.generic import OwnModulesBlock, check_runs_twice
from pyckpt.swap.modules import passes
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

    Positions of several axes have one more dim.

    `runs`: by a layer's place, the blocks that it runs, its own first; none where an earlier layer has run it.
    `stream`: how those are streamed, where they are; `gathered`: inside their layers' own calls. `whole`: the layers
    run their own forwards, and again as a whole in the backward where they may. `context`: the processes that share the
    sequences; positions are then this one's part, or, where the loss is streamed, all.
    """

    positions: Tensor | None
    cu_seqlens: Tensor | None
    runs: dict[int, list[CheckpointedBlock]] = dataclasses.field(default_factory=dict)
    stream: Streaming | None = None
    gathered: Gathered | None = None
    whole: bool = False
    context: ContextParallel | None = None

    def flat_positions(self, rows: torch.Size) -> Tensor | None:
        """(B * S,) for rows (B, S), or (B * S, axes)."""
        if self.positions is None:
            return None
        axes = self.positions.shape[2:]
        return self.positions.expand(*rows, *axes).reshape(-1, *axes)

    def stream_loss(self, layers: list[SwappedLayer], ids: Tensor, targets: Targets, ends: Ends) -> Tensor:
        """The loss of token ids (B, S) over all of a model's layers and its ends."""
        assert self.stream is not None
        positions = self.flat_positions(ids.shape)
        layout = Layout(*ids.shape) if self.cu_seqlens is None else Layout(1, ids.numel(), self.cu_seqlens)
        blocks: list[CheckpointedBlock] = [s.block for s in layers]
        modules = None if self.gathered is None else [s.module for s in layers]
        given = (ids, targets, ends, layout, positions, self.stream.stream, modules, self.context)
        return stream_loss(blocks, self.stream.segments, *given)


class Gathered:
    """Streamed runs of a call whose layers' weights are gathered one layer at a time, each inside its layers' calls.

    The first layer of a run takes hidden states, and the last one gives them; between them goes the run's token.
    """

    def __init__(self, runs: list[list[SwappedLayer]]) -> None:
        self._runs = {s.place: (layers, i) for layers in runs for i, s in enumerate(layers)}
        self._under_way: LayerRun | None = None

    def through(self, layer: SwappedLayer, x: Tensor, call: Call) -> Tensor:
        """What the layer gives to the next one."""
        layers, index = self._runs[layer.place]
        if index == 0:
            assert call.stream is not None
            blocks: list[CheckpointedBlock] = [s.block for s in layers]
            how = (call.flat_positions(x.shape[:2]), call.cu_seqlens, call.stream.stream)
            self._under_way = open_blocks(blocks, x, *how, [s.module for s in layers])
            x = self._under_way.begin()
        assert self._under_way is not None
        token = self._under_way.layer(index, x, layer.block.weights)
        if index + 1 < len(layers):
            return token
        run, self._under_way = self._under_way, None
        return run.end(token)


class SwappedLayer(Replaced):
    """Runs the block where the model's forward says so, by a `Call`; else the layer's original forward.

    Hidden states (B, S, d_model) in and out. `place`: which of the model's layers it is. `apart`: it runs by itself
    alone, in no segment and not streamed. `surveyed`: its class is in no table; what is known of it was found by calls
    of the model's twin and its own.
    """

    def __init__(
        self,
        module: nn.Module,
        block: MappedBlock | OwnModulesBlock,
        place: int,
        apart: bool = False,
        surveyed: bool = False,
    ) -> None:
        super().__init__(module)
        self.block, self.place, self.apart, self.surveyed = block, place, apart, surveyed

    @property
    def ways(self) -> tuple[CheckpointedBlock, ...]:
        return (self.block,)

    @property
    def twice(self) -> bool:
        """Its original forward may run twice, with what is inside now."""
        return passes(check_runs_twice, self.module)

    handed = False
    """It reads what the model hands to it beside hidden states and mask."""

    @property
    def reach(self) -> int | None:
        """How many tokens back its queries see, -1 for all; None where they see a sink as well."""
        return None if self.block.mapping.sinks else self.window

    @property
    def window(self) -> int:
        """How many tokens back its attention's window goes, -1 for all."""
        return self.block.mapping.spec.window[0]

    @property
    def softcap(self) -> float:
        """Of its attention's scores; 0 for none."""
        return self.block.mapping.spec.softcap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop(CALL, None)
        if call is None:
            return self.original(*args, **kwargs)
        if isinstance(call, InRun):
            return call.run.layer(call.block, args[0], self.block.weights)
        self.warn_of_a_checkpoint()
        if call.whole:
            return again.run_twice(self, args, kwargs, save_set(self.block.save))
        given = self.given(args, kwargs)
        x = given["hidden_states"]
        if call.gathered is not None and not self.apart:
            return self.returned(call.gathered.through(self, x, call))
        blocks = call.runs[self.place] if call.runs else [self.block]
        if not blocks:
            return x
        return self.run(blocks, x, call, given)

    def returned(self, y: Tensor) -> Any:
        """What the layer's class returns."""
        return y

    def run(self, blocks: list[CheckpointedBlock], x: Tensor, call: Call, given: dict[str, Any]) -> Any:
        """What the layer returns: `blocks` of x, of a call with the arguments `given`."""
        streamed = call.stream is not None and not self.apart
        if call.cu_seqlens is None and not streamed:
            return run_blocks(blocks, x, call.positions, None, context=call.context)
        positions = call.flat_positions(x.shape[:2])
        if call.stream is not None and streamed:
            return stream_blocks(blocks, call.stream.segments, x, positions, call.cu_seqlens, call.stream.stream)
        shared = (True, call.context, x.shape[0]) if call.context is not None else (True,)
        y = run_blocks(blocks, x.flatten(0, 1), positions, call.cu_seqlens, *shared)
        return torch.ops.aten._unsafe_view(y, x.shape)  # FSDP2 warns of a layer that returns a view
