"""What a model hands to its decoder layers beside hidden states and mask: of a whole call, or made for a few tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.shadow import argument_names, twin_of
from pyckpt.tokenwise.interface import Tile

HIDDEN, MASK = "hidden_states", "attention_mask"


class Arguments:
    """What a layer is called with, for any range of the flat batch's tokens. `batch` rows of `seq` tokens."""

    def __init__(self, values: dict[str, Any], batch: int, seq: int) -> None:
        self._batch, self._seq = batch, seq
        self._values = values
        for name, value in values.items():
            self._map(name, value, lambda t: t)

    def at(self, tile: Tile) -> dict[str, Any]:
        """The arguments for a tile, as a batch of one."""
        return self.of(slice(tile.first, tile.first + tile.x.shape[0]))

    def of(self, rows: slice) -> dict[str, Any]:
        """The arguments for these tokens, as a batch of one."""
        return {name: self._map(name, value, lambda t: self._cut(t, rows)) for name, value in self._values.items()}

    def _map(self, name: str, value: Any, cut: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._map(name, v, cut) for v in value)
        if not isinstance(value, Tensor):
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            raise UnsupportedError(f"it is handed {name}, a {type(value).__name__}")
        by_tokens = self._is_on_axes(value) or self._goes_by_tokens(value) or tuple(value.shape) == (self._seq,)
        if not by_tokens or value.requires_grad:
            raise UnsupportedError(f"it is handed {name} of shape {tuple(value.shape)}, which does not go by tokens")
        return cut(value)

    def _goes_by_tokens(self, t: Tensor) -> bool:
        return tuple(t.shape[:2]) in ((self._batch, self._seq), (1, self._seq))

    def _is_on_axes(self, t: Tensor) -> bool:
        """Positions of several axes, (axes, B, S)."""
        return t.dim() == 3 and not t.is_floating_point() and t.shape[0] > 0 and self._goes_by_tokens(t[0])

    def _cut(self, t: Tensor, rows: slice) -> Tensor:
        if t.dim() == 1:
            return self._cut(t[None], rows)[0]
        if self._is_on_axes(t):
            return torch.stack([self._cut(of_axis, rows) for of_axis in t])
        if t.shape[0] == self._batch:
            return t.flatten(0, 1)[rows][None]
        first, last = rows.start % self._seq, (rows.stop - 1) % self._seq
        if last - first == rows.stop - 1 - rows.start:  # within one row
            return t[:, first : last + 1]
        return t[:, torch.arange(rows.start, rows.stop, device=t.device) % self._seq]


class Handing:
    """Makes what a model hands to its layers for any tokens: from their positions, by a call of its twin with those.

    So layers run on tiles of a sequence that is nowhere whole, and several in a row. Whether that gives what a whole
    call hands to them is found out before (see `pyckpt.swap.survey`). `paths` are those of the layers, `returns` the
    lengths of the tuples that they return, 0 for none.
    """

    def __init__(self, model: nn.Module, paths: list[str], returns: list[int]) -> None:
        self._model = (model,)  # in a tuple: no module of what holds this
        self._paths, self._returns = tuple(paths), tuple(returns)
        self._positions = "position_ids" in argument_names(model)

    def of(self, x: Tensor, positions: Tensor) -> list[dict[str, Any]]:
        """What each layer is handed for tokens x (t, d_model) at `positions` (t,) or (t, axes), as a batch of one.

        Of x no value is read.
        """
        calls: list[dict[str, Any]] = []
        model = self._model[0]
        replaced = {path: self._recorder(i, model.get_submodule(path), calls) for i, path in enumerate(self._paths)}
        twin = twin_of(model, lambda _, config: config, replaced)
        twin.__dict__["training"] = False
        options: dict[str, Any] = {"inputs_embeds": x.new_zeros(()).expand(1, *x.shape), "use_cache": False}
        # Any mask of four dims is taken as it is.
        options[MASK] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=x.device)
        if self._positions:
            options["position_ids"] = positions.movedim(-1, 0)[:, None] if positions.dim() == 2 else positions[None]
        try:
            with torch.no_grad():
                twin.forward(**options)
        except _LastError:
            return calls
        raise UnsupportedError("its model does not call its layers one after the other")

    def _recorder(self, place: int, layer: nn.Module, calls: list[dict[str, Any]]) -> nn.Module:
        names, returns = argument_names(layer), self._returns[place]

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if len(calls) != place:
                raise UnsupportedError("its model does not call its layers in their order")
            x = given.pop(HIDDEN)
            given.pop(MASK, None)
            calls.append(given)
            if place + 1 == len(self._paths):
                raise _LastError
            return (x, *[None] * (returns - 1)) if returns else x

        twin = twin_of(layer, lambda _, config: config)
        twin.__dict__["forward"] = forward
        return twin


class _LastError(BaseException):
    """Leaves the model's forward; not an Exception, which some catch."""


class Placed:
    """What the layer at `place` is handed, of these names, for any tile of a run: made from the tile's positions.

    `around`: the context that a model runs in, which the executor does not.
    """

    def __init__(
        self, handing: Handing, place: int, names: tuple[str, ...], around: AbstractContextManager[Any]
    ) -> None:
        self._handing, self._place, self._names, self._around = handing, place, names, around
        self._last: tuple[Any, dict[str, Any]] | None = None

    def at(self, tile: Tile) -> dict[str, Any]:
        key = (tile.first, tile.x.shape[0], tile.x.dtype)
        if self._last is None or self._last[0] != key:
            with self._around:
                call = self._handing.of(tile.x, tile.positions.tensor)[self._place]
            self._last = key, {n: call.get(n) for n in self._names}
        return self._last[1]
