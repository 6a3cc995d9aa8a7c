"""Linear cross entropy of a head whose words are dealt out to processes, as tensor parallelism has it; and looking up
rows of an embedding that is.

Each process has some rows of the weight and all tokens. Of its own words it makes each token's log-sum-exp and, where
it has the label, its logit; two numbers a token are then summed over the processes, as in Megatron-LM (Shoeybi et al.
2019, section 3), and a third one compared. The backward makes the logits again from the whole log-sum-exp: neither of
the two ever has more of them than a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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


def own_part(t: Any) -> Tensor:
    """This process's part, differentiable; all of what is not dealt out."""
    part: Tensor = t.to_local() if is_dealt_out(t) else t
    return part


@dataclasses.dataclass(frozen=True)
class Words:
    """Which rows of a table of words this process has, those from `first` on, and the group that has the others."""

    group: Any
    first: int

    @classmethod
    def of(cls, mesh: Any, vocab: int) -> Words:
        """Of so many words that Shard(0) deals out over a mesh of one dim."""
        # As `torch.chunk` cuts them: the last processes may have fewer, or none.
        return cls(mesh.get_group(), min(vocab, mesh.get_local_rank() * -(-vocab // mesh.size())))

    def rows(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the process's rows ids (t,) are, and which ids are its own: others have any of its rows, here and
        there, since sums by row take long where many have one."""
        rows = ids - self.first
        own = (rows >= 0) & (rows < table.shape[0])
        return rows.remainder(max(1, table.shape[0])), own

    def look_up(self, table: Tensor, ids: Tensor, out: Tensor) -> None:
        """out (t, D) = the rows of ids (t,), whoever has them."""
        if table.shape[0]:
            rows, own = self.rows(ids, table)
            torch.index_select(table, 0, rows, out=out)
            out.masked_fill_(~own.unsqueeze(1), 0.0)
        else:
            out.zero_()
        dist.all_reduce(out, group=self.group)

    def labels(self, target: Tensor, ignore_index: int) -> Tensor:
        """target (t,) counted from this process's first word, `IGNORED` where it is to be ignored."""
        ignored = target == ignore_index
        return torch.where(ignored, IGNORED, target - self.first)

    def losses(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """The losses (t,) of `labels`, and each token's log-sum-exp, 0 where it is ignored."""
        ignored = labels == IGNORED
        lse, picked = _of_all(*_of_own_words(x, weight, bias, labels, softcap), self.group)
        lse.masked_fill_(ignored, 0.0)
        losses = lse - picked
        if z_loss:
            losses += z_loss * lse.square()
        return losses.masked_fill_(ignored, 0.0), lse

    def tile_(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        softcap: float,
        z_loss: float,
        label_smoothing: float,
        dloss: Tensor | None,
        dx: Tensor | None,
        dw: Tensor | None,
        db: Tensor | None,
    ) -> Tensor:
        """`linear_cross_entropy_tile_` of a head of which this process has these rows; dx is that of all words.

        The logits are made again for the gradients, when all processes' log-sum-exp is known.
        """
        labels = self.labels(target, ignore_index)
        losses, lse = self.losses(x, weight, bias, labels, softcap, z_loss)
        needed = [t is not None for t in (dx, dw, db)]
        if any(needed):
            upstream = torch.ones_like(lse) if dloss is None else dloss
            made = _gradients(upstream, lse, x, weight, bias, labels, softcap, z_loss, needed)
            for out, share in zip((dx, dw, db), made, strict=True):
                if out is dx and out is not None:
                    out.copy_(share)
                    dist.all_reduce(out, group=self.group)
                elif out is not None:
                    out += share
        return losses


def check_whole(label_smoothing: float) -> None:
    """Raise ValueError where a loss of words that are dealt out needs all of them."""
    if label_smoothing:
        raise ValueError(
            f"label_smoothing goes with a whole weight alone, got {label_smoothing!r}: leave it out, or give the "
            "weight whole (.full_tensor())"
        )


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
    check_whole(label_smoothing)


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
    words = Words.of(mesh, weight.shape[0])
    labels = words.labels(labels, ignore_index)
    losses: Tensor = _Losses.apply(flat, weight.to_local(), own_bias, labels, words, softcap, z_loss)
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


class _Losses(torch.autograd.Function):
    """The losses (T,) of x (T, D) and this process's words (v, D); those labels that are none of them are outside."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        words: Words,
        softcap: float,
        z_loss: float,
    ) -> Tensor:
        losses, lse = words.losses(x, weight, bias, labels, softcap, z_loss)
        ctx.save_for_backward(lse, x, weight, bias, labels)
        ctx.options = (softcap, z_loss)
        return losses

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        lse, x, weight, bias, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        softcap, z_loss = ctx.options
        made = _gradients(dloss, lse, x, weight, bias, labels, softcap, z_loss, needed)
        return *(g if n else None for g, n in zip(made, needed, strict=True)), None, None, None, None


def _gradients(
    dloss: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    z_loss: float,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """This process's share of dx, and dw and db of its words, of losses whose log-sum-exp is that of all words."""
    if not weight.shape[0]:
        return tuple(torch.zeros_like(t) for t in (x, weight, weight[:, 0] if bias is None else bias))
    options = (IGNORED, softcap, z_loss, 0.0)
    made: tuple[Tensor, ...] = ops.linear_cross_entropy_bwd(dloss, lse, x, weight, bias, labels, *options, *needed)
    return made


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
