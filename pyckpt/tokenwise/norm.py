"""A norm by a block's description, forward and backward: the block's own two, and a model's last one."""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Weights

ops = torch.ops.pyckpt


def norm_fwd(spec: BlockSpec, w: Weights, name: str, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The normalised tile and its row statistics."""
    weight = w[f"{name}.weight"]
    if spec.norm == "rmsnorm":
        y, rstd = ops.rms_norm_fwd(x, weight, spec.norm_eps)
        return y, (rstd,)
    y, mean, rstd = ops.layer_norm_fwd(x, weight, w[f"{name}.bias"], spec.norm_eps)
    return y, (mean, rstd)


def norm_bwd_add_(
    spec: BlockSpec,
    w: Weights,
    name: str,
    dy: Tensor,
    x: Tensor,
    stats: tuple[Tensor, ...],
    dx: Tensor,
    grads: WeightGradients,
) -> None:
    """Add the gradient of the norm's input to dx, and those of its weights to `grads`."""
    weight, need = w[f"{name}.weight"], grads.wants(f"{name}.weight", f"{name}.bias")
    if spec.norm == "rmsnorm":
        grads.add(f"{name}.weight", ops.rms_norm_bwd_add_(dy, x, weight, *stats, dx, need))
        return
    dw, db = ops.layer_norm_bwd_add_(dy, x, weight, *stats, dx, need)
    grads.add(f"{name}.weight", dw)
    grads.add(f"{name}.bias", db)
