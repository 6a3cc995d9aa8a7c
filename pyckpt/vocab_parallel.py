"""Linear cross entropy of a head whose words are dealt out to processes, as tensor parallelism has it.

Each process has some rows of the weight and all tokens. Of its own words it makes each token's log-sum-exp and, where
it has the label, its logit; two numbers a token are then summed over the processes, as in Megatron-LM (Shoeybi et al.
2019, section 3), and a third one compared. The backward makes the logits again from the whole log-sum-exp: neither of
the two ever has more of them than a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyckpt.compiling import uncompiled
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.direct import ops
from pyckpt.ops.linear_cross_entropy import counted
from pyckpt.ops.vocab_blocks import IGNORED


def is_dealt_out(t: Any) -> bool:
    """It is a DTensor, a part of which each process has."""
    return type(t).__name__ == "DTensor"


def check_layout(weight: Any, bias: Any, label_smoothing: float) -> None:
    """Raise ValueError where the words are not dealt out along one dim of processes, or the loss needs all of them."""
    from torch.distributed.tensor import Shard

    if not is_dealt_out(weight):
        raise ValueError(
            "x or bias is a DTensor and weight is none: give all of them whole (.full_tensor()), or the weight as a "
            "DTensor with Shard(0)"
        )
    if weight.placements != (Shard(0),):
        raise ValueError(
            f"weight is dealt out as {weight.placements}, expected (Shard(0),): its words over one dim of processes. "
            "Redistribute it, or give it whole (.full_tensor())"
        )
    if is_dealt_out(bias) and bias.device_mesh != weight.device_mesh:
        raise ValueError(f"bias is on {bias.device_mesh}, weight on {weight.device_mesh}; they have to be on one mesh")
    if label_smoothing:
        raise ValueError(
            f"label_smoothing goes with a whole weight alone, got {label_smoothing!r}: leave it out, or give the "
            "weight whole (.full_tensor())"
        )


@uncompiled
def linear_cross_entropy(
    x: Tensor,
    weight: Any,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    token_weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """`pyckpt.linear_cross_entropy` of a weight (V, D) dealt out by Shard(0), and all else the same in each process.

    x may be a DTensor too, of any placement. What is no DTensor is taken to be the same in each process of the mesh,
    and so is its gradient.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = weight.device_mesh
    flat = _dealt_out(x, mesh, Replicate()).to_local(grad_placements=[Partial()]).reshape(-1, x.shape[-1])
    own_bias = None if bias is None else _dealt_out(bias, mesh, Shard(0)).to_local()
    labels = (_dealt_out(target, mesh, Replicate()).to_local() if is_dealt_out(target) else target).flatten()
    labels = labels.masked_fill(labels == ignore_index, IGNORED)
    labels = torch.where(labels == IGNORED, labels, labels - _first_word(weight))
    losses: Tensor = _Losses.apply(flat, weight.to_local(), own_bias, labels, mesh.get_group(), softcap, z_loss)
    if token_weight is not None:
        losses = losses * token_weight.flatten()
    if reduction == "none":
        return losses.view(x.shape[:-1])
    loss = losses.sum()
    if reduction == "sum":
        return loss
    return loss / counted(labels, None if token_weight is None else token_weight.flatten(), IGNORED)


def _dealt_out(t: Any, mesh: Any, placement: Any) -> Any:
    """A DTensor of this placement, of one of another or of what each process has the same of."""
    from torch.distributed.tensor import DTensor, Replicate

    if not is_dealt_out(t):
        t = DTensor.from_local(t, mesh, [Replicate()], run_check=False)
    return t.redistribute(placements=[placement])


def _first_word(weight: Any) -> int:
    """The place of this process's first row: as `torch.chunk` cuts them, the last ones may have fewer, or none."""
    mesh, vocab = weight.device_mesh, weight.shape[0]
    return min(vocab, mesh.get_local_rank() * -(-vocab // mesh.size()))


class _Losses(torch.autograd.Function):
    """The losses (T,) of x (T, D) and this process's words (v, D); those labels that are none of them are outside."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        group: Any,
        softcap: float,
        z_loss: float,
    ) -> Tensor:
        ignored = labels == IGNORED
        lse, picked = _of_own_words(x, weight, bias, labels, softcap)
        lse, picked = _of_all(lse, picked, group)
        lse.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(lse, x, weight, bias, labels)
        ctx.options = (IGNORED, softcap, z_loss, 0.0)
        losses = lse - picked
        if z_loss:
            losses += z_loss * lse.square()
        return losses.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        lse, x, weight, bias, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if weight.shape[0]:
            made = ops.linear_cross_entropy_bwd(dloss, lse, x, weight, bias, labels, *ctx.options, *needed)
        else:
            made = torch.zeros_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        return *(g if n else None for g, n in zip(made, needed, strict=True)), None, None, None, None


def _of_own_words(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Each token's log-sum-exp over these words, and its label's logit, 0 where that is another's."""
    if not weight.shape[0]:
        nothing = x.new_zeros(labels.shape, dtype=acc_dtype(x.dtype))
        return nothing - math.inf, nothing
    own = (labels >= 0) & (labels < weight.shape[0])
    inside = torch.where(own | (labels == IGNORED), labels, 0)  # any word: its logit is not read
    losses, lse, *_ = ops.linear_cross_entropy_fwd(
        x, weight, bias, inside, IGNORED, softcap, 0.0, 0.0, None, "none", False, False, False
    )
    return lse, (lse - losses).masked_fill_(~own, 0.0)


def _of_all(lse: Tensor, picked: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Both over the words of all processes."""
    most = lse.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    both = torch.stack([torch.exp(lse - most), picked])
    dist.all_reduce(both, dist.ReduceOp.SUM, group)
    return most + both[0].log(), both[1]
