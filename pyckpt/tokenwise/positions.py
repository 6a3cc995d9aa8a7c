"""Where a tile's tokens stand in their sequences, and RoPE's tables for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from pyckpt.ops.keeping import belongs_to, remembered
from pyckpt.ops.rope import rope_tables
from pyckpt.spec import BlockSpec, RopeScaling

Tables = tuple[Tensor, Tensor]
# Where tables are larger than this, what works with them takes longer than to make them: 2,048 tokens of 128 dims.
_MOST_BYTES = 1 << 20
_KEPT = 8


class Counted(NamedTuple):
    """Tokens `first` to `last`, not included, of sequences of `seq` tokens each, that count from 0 in each."""

    first: int
    last: int
    seq: int

    @property
    def tokens(self) -> int:
        return self.last - self.first

    def tensor(self, device: torch.device) -> Tensor:
        tokens = torch.arange(self.first, self.last, device=device)
        return tokens if self.last <= self.seq else tokens % self.seq


class Positions:
    """Each token's place in its sequence, (t,), or (t, axes): made when somebody asks."""

    def __init__(self, device: torch.device, places: Counted | Callable[[], Tensor]) -> None:
        self._device, self._places = device, places

    @functools.cached_property
    def tensor(self) -> Tensor:
        return self._places.tensor(self._device) if isinstance(self._places, Counted) else self._places()

    def tables(self, spec: BlockSpec, dtype: torch.dtype) -> Tables | None:
        """cos and sin (t, rotary dims / 2) for products in `dtype`; None without RoPE. Nobody may write to them."""
        if spec.rope_theta is None:
            return None
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        options = (spec.d_rope, spec.rope_theta, spec.rope_scaling, dtype)
        counted = self._places
        if isinstance(counted, Counted) and counted.tokens * spec.d_rope * dtype.itemsize <= _MOST_BYTES:
            owner = belongs_to(self._device)
            if owner is not None:
                return _kept(counted, self._device, owner, *options)
        places = self.tensor
        if places.dim() == 1:
            return rope_tables(places, *options)
        if spec.rope_axes is None:
            raise ValueError(
                f"positions have {places.shape[1]} axes, and this block's RoPE has none (rope_axes=None): blocks that "
                "run together take the same positions"
            )
        return rope_tables(places[:, : spec.position_axes], *options, spec.rope_axes)


@remembered(_KEPT)
def _kept(
    counted: Counted,
    device: torch.device,
    owner: Hashable,
    dim: int,
    theta: float,
    scaling: RopeScaling | None,
    dtype: torch.dtype,
) -> Tables:
    with torch.inference_mode(False), torch.no_grad():
        return rope_tables(counted.tensor(device), dim, theta, scaling, dtype)
