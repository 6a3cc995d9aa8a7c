"""A block that has no weights of its own: it runs on those of another layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyckpt.block import CheckpointedBlock
from pyckpt.exec.plan import standard_plan
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.tiling import TILE_BYTES
from pyckpt.save import Save
from pyckpt.swap.weights import Mapping


class MappedBlock(CheckpointedBlock):
    """The standard block of a `Mapping`, with the layer's parameters as they are at the time of a call."""

    def __init__(self, layer: nn.Module, mapping: Mapping, save: str | Save, tile: int | None) -> None:
        super().__init__(mapping.spec.d_model, save, tile, TILE_BYTES)
        self.mapping: Mapping = mapping
        # Which adapters are switched on is read at each call, and no compiled graph knows it.
        self.spec_text = None if mapping.adapted else mapping.spec.to_string()
        self._layer = (layer,)  # in a tuple: a submodule would be found twice in the model

    @property
    def drops(self) -> bool:
        layer = self._layer[0]
        return (
            self.mapping.spec_now(layer).drops if self.mapping.adapted else layer.training and self.mapping.spec.drops
        )

    def mixes_dtypes(self, name: str) -> bool:
        return ".lora_" in name

    def weights(self) -> dict[str, Tensor]:
        return self.mapping.weights(self._layer[0])

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        options = (tokens, x_dtype, dtype, device, self.tile_bytes)
        return standard_plan(self.mapping.spec_now(self._layer[0]), self._save, self.tile, *options)
