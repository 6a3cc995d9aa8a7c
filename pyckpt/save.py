"""Save sets: which tensors of a block live from its forward to its backward. All others are recomputed."""

from __future__ import annotations

import dataclasses

import torch

from pyckpt.spec import BlockSpec


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


def save_set(name: str | SaveSet) -> SaveSet:
    """The save set of this name. Raises ValueError for an unknown one."""
    if isinstance(name, SaveSet):
        return name
    if not isinstance(name, str) or name not in _TABLE:
        raise ValueError(f"save={name!r} does not exist; expected one of {', '.join(map(repr, SAVE_SETS))}")
    return _TABLE[name]


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
    width = spec.d_model
    if keeps.attention:
        width += spec.d_q
    if keeps.qkv:
        width += spec.d_q + 2 * spec.d_kv
    width += sum(t.width for t in post_tensors(spec, keeps))
    lse = spec.n_heads * (8 if dtype == torch.float64 else 4) if keeps.attention else 0
    return width * dtype.itemsize + lse
