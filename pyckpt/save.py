"""Save sets: which tensors of a block live from its forward to its backward. All others are recomputed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from pyckpt import errors
from pyckpt.attend.dense import DenseAttend
from pyckpt.ops.chunks import acc_dtype
from pyckpt.spec import BlockSpec
from pyckpt.store import STORES, scratch_folder


@dataclasses.dataclass(frozen=True)
class SaveSet:
    """What one block keeps besides its input x, which every save set keeps.

    attention: o and lse (so that the attention forward never runs twice); qkv: q, k, v; mid: the residual stream
    between attention and MLP (a parallel block has none); mlp: the MLP's pre-activations (gate and up). Where a norm
    stands after a sublayer its input is kept instead of mid, from which it makes mid again, and with mlp that of the
    norm after the MLP too, called down.
    """

    name: str
    attention: bool = False
    qkv: bool = False
    mid: bool = False
    mlp: bool = False


_TABLE = {
    s.name: s
    for s in (
        SaveSet("all", attention=True, qkv=True, mid=True, mlp=True),
        SaveSet("attention+qkv", attention=True, qkv=True, mid=True),
        SaveSet("attention+mid", attention=True, mid=True),
        SaveSet("attention", attention=True),
        SaveSet("input"),
    )
}
SAVE_SETS: tuple[str, ...] = tuple(_TABLE)
"""Names of the save sets, from the one that keeps most to the one that keeps least."""


PROCESSES = "processes"
_ALIKE = ("x", "mid", "down")  # of the residual stream, or the product that it gets


class _Places(dict[str, str]):
    """A dict that nothing is changed in: what was checked and hashed is there later. It can be copied and pickled."""

    def _refuse(self, *_args: Any, **_named: Any) -> Any:
        raise TypeError("the places of a pyckpt.Save can't be changed: make another Save, and set save= to that")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = setdefault = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _Places, (dict(self),)


@dataclasses.dataclass(frozen=True)
class Save:
    """A save set, and where each tensor of it waits for the backward: `save=pyckpt.Save("attention", {"x": "host"})`.

    Copies run beside compute, off the device one block after the tensors were made, and back one block before they
    are wanted. Gradients are the same bits.

    Args:
        name: of the save set.
        place: by tensor: "x" (the block's input), "o", "lse", "q", "k", "v", "mid", "gate", "up" and "down", as far as
            the save set keeps it. "device": where it is, the default; "host": page-locked host memory (on a CPU that
            is where it is); "file": a scratch file that is gone when the process ends, however it ends; "processes", of
            x, mid and down in a block whose weights are dealt out to processes (tensor parallelism): each of them,
            which have the same, keeps a part, and they are brought together in the backward.
        last: of so many blocks, the last of the forward, all stays on the device, since the backward wants it at once.
        path: folder of the scratch files, by default the system's temporary one.

    The blocks of a stack may share one `Save` or have their own. A segment of several blocks keeps its input alone, and
    places that. Streamed execution has a store of its own and does not read this.

    `place` can't be changed afterwards. Raises TypeError for a name, places or a path of the wrong type; ValueError for
    an unknown save set, for a tensor that it does not keep, for an unknown place, and for a folder that is not there or
    can't be written to.
    """

    name: str = "attention"
    place: Mapping[str, str] = dataclasses.field(default_factory=dict)
    last: int = 1
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be that of a save set, as 'attention' is, got a {type(self.name).__name__}")
        kept = kept_names(save_set(self.name))
        if not isinstance(self.place, Mapping):
            raise TypeError(f"place must be a dict of tensors and places, got {type(self.place).__name__}")
        for tensor, place in self.place.items():
            if tensor not in kept:
                raise ValueError(
                    f"place={tensor!r} names nothing that save={self.name!r} keeps; expected some of {', '.join(kept)}"
                )
            if place == PROCESSES and tensor not in _ALIKE:
                raise ValueError(
                    f"place[{tensor!r}]={place!r}: processes have the same of {', '.join(_ALIKE)} alone, and of "
                    f"{tensor} their own; expected one of {', '.join(map(repr, STORES))}"
                )
            if place not in (*STORES, PROCESSES):
                expected = ", ".join(map(repr, (*STORES, PROCESSES)))
                raise ValueError(f"place[{tensor!r}]={place!r} does not exist; expected one of {expected}")
        last = errors.as_int(self.last)
        if last is None or last < 0:
            raise ValueError(f"last must be a number of blocks >= 0, got {self.last!r}")
        self._check_path()
        object.__setattr__(self, "place", _Places(self.place))
        object.__setattr__(self, "last", last)

    def _check_path(self) -> None:
        if self.path is not None and not isinstance(self.path, (str, os.PathLike)):
            raise TypeError(f"path must be None or the path of a folder, got a {type(self.path).__name__}")
        if "file" in self.place.values():
            scratch_folder(self.path)
        elif self.path is not None:
            raise ValueError(f"path={os.fspath(self.path)!r} was given, and no tensor has the place 'file'")

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.place.items()), self.last, self.path))  # a dict has none

    @property
    def shared(self) -> tuple[str, ...]:
        """The tensors of which each process keeps a part."""
        return tuple(n for n, p in self.place.items() if p == PROCESSES)

    def away(self, device: torch.device) -> dict[str, str]:
        """The tensors that leave this device, and where to. A CPU's host memory is its own."""
        return {n: p for n, p in self.place.items() if p == "file" or (p == "host" and device.type == "cuda")}


def kept_names(save: SaveSet) -> tuple[str, ...]:
    """All that this save set may keep of a block, whatever the block."""
    groups = (
        (True, ("x",)),
        (save.attention, ("o", "lse")),
        (save.qkv, ("q", "k", "v")),
        (save.mid, ("mid",)),
        (save.mlp, ("gate", "up", "down")),
    )
    return tuple(name for keeps, names in groups if keeps for name in names)


def save_set(name: str | SaveSet | Save) -> SaveSet:
    """The save set of this name, or of a `Save`. Raises ValueError for one that is not in the table.

    torch.compile and pickles know a save set by its name: one with flags of its own would come back as another.
    """
    if isinstance(name, Save):
        return _TABLE[name.name]
    found = _TABLE.get(name.name if isinstance(name, SaveSet) else name) if isinstance(name, (str, SaveSet)) else None
    if found is None or (isinstance(name, SaveSet) and name != found):
        raise ValueError(f"save={name!r} does not exist; expected one of {', '.join(map(repr, SAVE_SETS))}")
    return found


@dataclasses.dataclass(frozen=True)
class KeptTensor:
    """A tensor (t, width) that `post` keeps: in the residual stream's dtype, or in that of the products."""

    name: str
    width: int
    residual: bool = False


def post_tensors(spec: BlockSpec, save: SaveSet) -> tuple[KeptTensor, ...]:
    """What `post` keeps with this save set."""
    kept: list[KeptTensor] = []
    # What a norm of a sublayer's output reads is a product's, and in its dtype.
    residual = spec.norms_sum or not spec.norms_after
    if save.mid and not spec.parallel:
        kept.append(KeptTensor("mid", spec.d_model, residual))
    if save.mlp:
        kept += [KeptTensor(name, spec.d_ff) for name in (("gate", "up") if spec.gated else ("up",))]
        kept += [KeptTensor("down", spec.d_model, residual)] if spec.norms_after else []
    return tuple(kept)


def bytes_per_token(spec: BlockSpec, save: str | SaveSet, dtype: torch.dtype) -> int:
    """Bytes that one block keeps from forward to backward for each token, by arithmetic.

    Counts the input x, which is the output of the block before. lse has 4 bytes a head (8 in float64).
    """
    keeps = save_set(save)
    return kept_bytes(keeps, DenseAttend.of(spec), post_tensors(spec, keeps), spec.d_model, dtype, dtype)


def kept_bytes(
    keeps: SaveSet,
    attend: DenseAttend,
    post: tuple[KeptTensor, ...],
    d_model: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
) -> int:
    """Bytes for each token of a block with this attention whose `post` keeps these tensors.

    x_dtype: of the residual stream; dtype: of the products.
    """
    residual = d_model + sum(t.width for t in post if t.residual)
    width = sum(t.width for t in post if not t.residual)
    width += attend.d_o if keeps.attention else 0
    width += attend.d_q + attend.d_k + attend.d_v if keeps.qkv else 0
    lse = attend.n_heads * acc_dtype(dtype).itemsize if keeps.attention else 0
    return residual * x_dtype.itemsize + width * dtype.itemsize + lse
