"""Weights that are stored otherwise than as the matrices that products take: of 4 bits, say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pyckpt.tokenwise.interface import Weights


@dataclasses.dataclass(frozen=True)
class Packed:
    """One tensor that stands, under each of these names, for the matrices of several linear layers, or of one.

    `make`: the matrices (out, in) of it, in `dtype`, in which their products are then made, whatever x has. They have
    no gradient.
    """

    names: tuple[str, ...]
    dtype: torch.dtype
    make: Callable[[Tensor], tuple[Tensor, ...]]

    def unpack(self, w: Weights) -> dict[str, Tensor]:
        return dict(zip(self.names, self.make(w[self.names[0]]), strict=True))
