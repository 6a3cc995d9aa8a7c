"""What processes have alike, kept from forward to backward as a part by each: the residual stream of a block whose
weights are dealt out. Megatron-LM calls it distributing the saved activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.tokenwise.tensor_parallel import TensorParallel


def part_of(t: Tensor, processes: TensorParallel) -> Tensor:
    """This process's rows of t (..., width), in memory of their own: as many as the others', the last ones perhaps
    beyond t's."""
    flat = t.detach().reshape(-1, t.shape[-1])
    each = -(-flat.shape[0] // processes.size)
    own = flat[processes.rank * each :][:each]
    part = flat.new_zeros(each, flat.shape[1])
    part[: own.shape[0]] = own
    return part


def whole_of(part: Tensor, shape: torch.Size, processes: TensorParallel) -> Tensor:
    """What `part_of` was given, of this shape, from the parts of all processes."""
    return processes.gather(part)[: shape[:-1].numel()].view(shape)
