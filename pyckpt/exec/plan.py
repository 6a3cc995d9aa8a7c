"""From a block's description to a `BlockPlan` for given inputs."""

from __future__ import annotations

import torch

from pyckpt.attend.dense import DenseAttend
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.tiling import TILE_BYTES, choose_tile
from pyckpt.ops.keeping import remembered
from pyckpt.save import SaveSet, post_tensors
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise import fused
from pyckpt.tokenwise.generic import GenericTokenwise
from pyckpt.tokenwise.parameters import pre_parameters
from pyckpt.tokenwise.standard import StandardTokenwise
from pyckpt.tokenwise.tensor_parallel import TensorParallel


def standard_plan(
    spec: BlockSpec,
    save: SaveSet,
    tile: int | None,
    tokens: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    tile_bytes: int = TILE_BYTES,
    processes: TensorParallel | None = None,
) -> BlockPlan:
    """processes: those that have the block's weights together, of which `spec` is what this one computes."""
    parts = fused.choose(spec, dtype, device)
    return _standard_plan(spec, save, tile, tokens, x_dtype, dtype, device, tile_bytes, parts, processes)


# A plan holds no tensors, and to make one takes longer than to launch a kernel.
@remembered(512)
def _standard_plan(
    spec: BlockSpec,
    save: SaveSet,
    tile: int | None,
    tokens: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    tile_bytes: int,
    parts: fused.Fused,
    processes: TensorParallel | None,
) -> BlockPlan:
    token_bytes = _standard_token_bytes(spec, x_dtype, dtype)
    if processes is not None:
        token_bytes += spec.d_model * dtype.itemsize  # a share of what is added to the residual stream
    return BlockPlan(
        tokenwise=_standard_tokenwise(spec, parts, processes),
        attend=DenseAttend.of(spec),
        save=save,
        tile=tile or choose_tile(tokens, token_bytes, device, tile_bytes),
        pre_names=frozenset(pre_parameters(spec)),
        post_tensors=post_tensors(spec, save),
        keeps_raw_qk=bool(spec.qk_norm),
        token_bytes=token_bytes,
        processes=processes,
    )


@remembered(512)
def _standard_tokenwise(spec: BlockSpec, parts: fused.Fused, processes: TensorParallel | None) -> StandardTokenwise:
    return StandardTokenwise(spec, parts, processes)


def generic_plan(
    tokenwise: GenericTokenwise,
    attend: DenseAttend,
    save: SaveSet,
    tile: int | None,
    d_model: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    tile_bytes: int = TILE_BYTES,
) -> BlockPlan:
    # How wide an unknown module is inside is not known; most MLPs keep about 16 values per value of d_model alive.
    token_bytes = 16 * d_model * dtype.itemsize
    return BlockPlan(
        tokenwise=tokenwise,
        attend=attend,
        save=save,
        tile=tile or choose_tile(tokens, token_bytes, device, tile_bytes),
        pre_names=frozenset((*tokenwise.pre_names, *([] if attend.sinks is None else [attend.sinks]))),
        token_bytes=token_bytes,
    )


def _standard_token_bytes(spec: BlockSpec, x_dtype: torch.dtype, dtype: torch.dtype) -> int:
    """What a tile of the backward of `post`, or of `pre`, takes at most for a token, whole tensors aside."""
    hidden = (3 if spec.gated else 2) * spec.d_ff * dtype.itemsize
    mlp = hidden + spec.d_model * (2 * x_dtype.itemsize + 4 * dtype.itemsize)  # dy, mid; h, its cast, dh, d
    if spec.norms_after:
        # What both norms read, what they give, and a gradient.
        mlp += spec.d_model * (3 * x_dtype.itemsize + 2 * dtype.itemsize)
    attention = spec.d_model * (x_dtype.itemsize + 2 * dtype.itemsize)  # the norm, its cast, dh
    if spec.qk_norm:
        attention += 2 * (spec.d_q + spec.d_kv) * dtype.itemsize  # raw q and k, and their gradients
    angles = 4 * spec.d_rope * 8 if spec.rope_theta is not None else 0  # float64 while they are made
    return max(mlp, attention + angles)
