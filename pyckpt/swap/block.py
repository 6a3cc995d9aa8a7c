"""A block that has no weights of its own: it runs on those of another layer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pyckpt.block import CheckpointedBlock
from pyckpt.exec.plan import standard_plan
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.tiling import TILE_BYTES
from pyckpt.save import Save
from pyckpt.swap.weights import Mapping, drops
from pyckpt.tokenwise.standard import StandardTokenwise


class MappedBlock(CheckpointedBlock):
    """The standard block of a `Mapping`, with the layer's parameters as they are at the time of a call."""

    def __init__(self, layer: nn.Module, mapping: Mapping, save: str | Save, tile: int | None) -> None:
        super().__init__(mapping.spec.d_model, save, tile, TILE_BYTES)
        self.mapping: Mapping = mapping
        self._layer = (layer,)  # in a tuple: a submodule would be found twice in the model

    @property
    def spec_text(self) -> str | None:
        alone = not self.mapping.quantized and self.mapping.dealt is None
        return self.mapping.text_now(self._layer[0]) if alone else None

    @property
    def drops(self) -> bool:
        layer = self._layer[0]
        return (layer.training or self.mapping.adapted) and drops(self.mapping.text_now(layer))

    def mixes_dtypes(self, name: str) -> bool:
        return ".lora_" in name or (self.mapping.quantized and "norm" not in name)

    def matrices(self) -> dict[str, Tensor]:
        return self.weights() | self.mapping.matrices(self._layer[0])

    def like_weights(self) -> Tensor:
        if not self.mapping.quantized:
            return super().like_weights()
        # As what goes through the norms, which nobody quantizes.
        found = next(w for n, w in self.weights().items() if "norm" in n)
        return torch.empty(0, dtype=found.dtype, device=found.device)

    def weights(self) -> dict[str, Tensor]:
        return self.mapping.weights(self._layer[0])

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        dealt = self.mapping.dealt
        options = (tokens, x_dtype, dtype, device, self.tile_bytes, None if dealt is None else dealt.processes)
        plan = standard_plan(self.mapping.spec_now(self._layer[0]), self._save, self.tile, *options)
        packed = self.mapping.packed(self._layer[0], dtype)
        if packed and isinstance(plan.tokenwise, StandardTokenwise):
            return dataclasses.replace(plan, tokenwise=plan.tokenwise.with_packed(packed, dtype))
        return plan
