"""What an executor asks of the tokenwise parts of a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.positions import Positions
from pyckpt.tokenwise.workspace import Workspace

Weights = Mapping[str, Tensor]


@dataclasses.dataclass
class Tile:
    """One contiguous range of tokens: views of the tensors of the whole sequence. t tokens; all are 2-D, packed.

    x (t, d_model); q, k, v, o are (t, heads * head_dim). `kept` holds the views of what the save set
    keeps besides: any of "q", "k" (raw, where they differ from those attention reads), "mid", "gate", "up", "down".
    `first` is the absolute number of the first token; `seed` that of the block's dropout, None to drop nothing.
    `statistics`: of the rows of what the MLP reads, where the product that made it has left them.
    `delta` (heads, t): to be filled with the sums of do * o by head, of a part whose `makes_delta` says so.
    In a forward the executor allocates the views and the tokenwise part fills them; in a backward it reads them.
    """

    x: Tensor
    positions: Positions
    kept: dict[str, Tensor]
    first: int = 0
    seed: int | None = None
    statistics: tuple[Tensor, ...] | None = None
    delta: Tensor | None = None


class Tokenwise(Protocol):
    """`pre` and `post` of a block, and their backwards. All run without autograd and write into the tensors given.

    `makes_delta`: `post_bwd` makes delta beside do, and the attention backward need not read o for it.
    `made_once`: names of weights whose products no backward makes again. `by_autograd`: a tile's gradients of weights
    stand whole beside their sums.
    """

    @property
    def makes_delta(self) -> bool: ...

    @property
    def made_once(self) -> frozenset[str]: ...

    @property
    def by_autograd(self) -> bool: ...

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights as the products take them, in `dtype`, and those of norms as norms take them."""

    def pre(self, w: Weights, tile: Tile, q: Tensor | None, k: Tensor | None, v: Tensor | None, ws: Workspace) -> None:
        """Fill q, k, v with what attention reads; those that are None are not made."""

    def pre_again(
        self,
        w: Weights,
        tile: Tile,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        need_dx: bool,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        """`pre` in a backward, of its only tile, whose `pre_bwd` comes next: what it wants may be kept until then."""

    def finish_kept(self, w: Weights, tile: Tile, q: Tensor, k: Tensor) -> None:
        """Fill the q and k that attention reads from the raw ones in `tile.kept`."""

    def post(self, w: Weights, tile: Tile, o: Tensor, y: Tensor, ws: Workspace) -> None:
        """Fill y."""

    def post_bwd(
        self,
        w: Weights,
        tile: Tile,
        o: Tensor,
        dy: Tensor,
        dx: Tensor | None,
        do: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        """From dy: fill dx (the residual path's share) and do, and add to the gradients of post's weights.

        dx or do is None where nothing needs it.
        """

    def pre_bwd(
        self,
        w: Weights,
        tile: Tile,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dx: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        """From dq, dk, dv (which it may overwrite): add pre's share to dx and to the gradients of pre's weights."""
