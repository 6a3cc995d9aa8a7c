"""Modules that draw random numbers, and are set in some way in a call: a backward finds both again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from pyckpt.ops import philox
from pyckpt.ops.seeding import seed_generators
from pyckpt.tokenwise.generic import GenericTokenwise, in_place
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.settings import Settings

# Where a seed is derived for random numbers; attention's probabilities take site 0.
PRE_SITE, POST_SITE = 1, 2


def drops_inside(module: nn.Module) -> bool:
    """Whether something in it drops values now, by each module's own mode."""
    inside = (m for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    return any(m.training and m.p > 0.0 for m in inside)


class SeededTokenwise(GenericTokenwise):
    """The modules are set in a backward as they are now (train mode, adapters).

    What they draw at random follows from the call's seed and the tile. What draws without a seed, in a forward that a
    backward may follow, is an error: other numbers would be drawn there.
    """

    def __init__(self, pre: nn.Module, post: nn.Module, precision: AbstractContextManager[Any]) -> None:
        super().__init__(pre, post, precision)
        self._settings = Settings(self._pre, self._post)

    @contextlib.contextmanager
    def _at(self, tile: Tile, site: int) -> Iterator[None]:
        """In which `pre` (or `post`) of this tile runs."""
        with self._settings.again(), _drawing(tile, site):
            yield

    def pre(self, w: Weights, tile: Tile, *tensors: Any) -> None:
        with self._at(tile, PRE_SITE), self._undrawn("pre", tile):
            super().pre(w, tile, *tensors)

    def pre_again(self, w: Weights, tile: Tile, *rest: Any) -> None:
        with self._at(tile, PRE_SITE):
            super().pre_again(w, tile, *rest)

    def post(self, w: Weights, tile: Tile, *tensors: Any) -> None:
        with self._at(tile, POST_SITE), self._undrawn("post", tile):
            super().post(w, tile, *tensors)

    def pre_bwd(self, w: Weights, tile: Tile, *tensors: Any) -> None:
        with self._at(tile, PRE_SITE):
            super().pre_bwd(w, tile, *tensors)

    def post_bwd(self, w: Weights, tile: Tile, *tensors: Any) -> None:
        with self._at(tile, POST_SITE):
            super().post_bwd(w, tile, *tensors)

    @contextlib.contextmanager
    def _undrawn(self, part: str, tile: Tile) -> Iterator[None]:
        """Raise RuntimeError where what runs inside drew from PyTorch's generators, which nothing makes draw again."""
        before = generator_states(tile.x.device) if self._checks and tile.seed is None else []
        yield
        if before and have_drawn(before, tile.x.device):
            raise RuntimeError(
                f"{part} draws random numbers, and would draw others when it runs again in the backward: give what it "
                f"drops to nn.Dropout modules inside it, which draw the same again, or {self._advice}"
            )


def generator_states(device: torch.device) -> list[Tensor]:
    """Of the generators that are drawn from by default; none where a CUDA graph is captured, which has its own."""
    if device.type != "cuda":
        return [torch.get_rng_state()]
    if torch.cuda.is_current_stream_capturing():
        return []
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device)]


def have_drawn(before: list[Tensor], device: torch.device) -> bool:
    """Whether the generators' states are other ones now."""
    now = generator_states(device)
    with _disable_current_modes():  # FakeTensorMode's have no values, and others need not hear of it
        return any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))


@contextlib.contextmanager
def _drawing(tile: Tile, site: int) -> Iterator[None]:
    """PyTorch's generators, which all threads share, seeded for this tile, and afterwards as they were."""
    if tile.seed is None:
        yield
        return
    device = tile.x.device
    with in_place(), torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        seed_generators(philox.derive(philox.derive(tile.seed, site), tile.first), device)
        yield
