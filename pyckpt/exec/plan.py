"""From a block's description to a `BlockPlan` for given inputs."""

from __future__ import annotations

import torch

from pyckpt.attend.dense import DenseAttend
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.tiling import choose_tile
from pyckpt.save import SaveSet
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.generic import GenericTokenwise
from pyckpt.tokenwise.standard import StandardTokenwise, pre_parameters


def standard_plan(
    spec: BlockSpec, save: SaveSet, tile: int | None, tokens: int, dtype: torch.dtype, device: torch.device
) -> BlockPlan:
    widest = 3 * spec.d_ff + 3 * spec.d_model
    return BlockPlan(
        tokenwise=StandardTokenwise(spec),
        attend=DenseAttend.of(spec),
        save=save,
        tile=tile or choose_tile(tokens, widest, dtype, device),
        pre_names=frozenset(pre_parameters(spec)),
        d_ff=spec.d_ff,
        gated=spec.gated,
        keeps_raw_qk=spec.qk_norm,
    )


def generic_plan(
    tokenwise: GenericTokenwise,
    attend: DenseAttend,
    save: SaveSet,
    tile: int | None,
    d_model: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> BlockPlan:
    # How wide an unknown module is inside is not known; most MLPs keep about 16 values per value of d_model alive.
    return BlockPlan(
        tokenwise=tokenwise,
        attend=attend,
        save=save,
        tile=tile or choose_tile(tokens, 16 * d_model, dtype, device),
        pre_names=frozenset(tokenwise.pre_names),
    )
