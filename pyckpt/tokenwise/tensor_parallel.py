"""Which part of a standard block each of several processes computes, and what they add up: tensor parallelism.

As in Megatron-LM (Shoeybi et al. 2019, section 3) a process has some of the heads and some of the MLP's width, for all
tokens: the rows of the projections that make them, the columns of those that read them, and all of the norms. What the
output and the down projection make is then a share, of which the processes' sum is taken, and so is the gradient of
what a norm has made. A forward has two such sums of (t, d_model) for a tile, a backward two, and a third one where it
makes `mid` again ("attention+mid" keeps it). All else is computed alike by all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.parameters import ATTENTION, MLP
from pyckpt.vocab_parallel import is_dealt_out, own_part

_MADE = tuple(f"{part}_proj." for part in (*(f"{ATTENTION}.{n}" for n in "qkv"), f"{MLP}.gate", f"{MLP}.up"))
_READING = (f"{ATTENTION}.o_proj.weight", f"{MLP}.down_proj.weight")

# The most parts of a tile that are summed by themselves, and the fewest rows of one: products of fewer run below speed.
_PARTS, _ROWS = 4, 1024

Make = Callable[[slice], None]
Total = Callable[[Tensor, Make], None]
"""Fills a tensor with the sum of what the processes make for it: of each, `Make` fills some rows of it."""


def alone(out: Tensor, make: Make) -> None:
    """The `Total` of one process."""
    make(slice(0, out.shape[0]))


def is_made(rows: slice) -> None:
    """The `Make` of what is there already."""


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """The processes that have a block's weights together, each an equal part: the group's name, and how many they are.

    By name, so that plans, which are remembered, hold no group that is destroyed since. sums_qk_norm: the gradients of
    QK-norm's weights are those of all heads; else of a process's own.
    """

    group_name: str
    size: int
    sums_qk_norm: bool = True

    @classmethod
    def of(cls, mesh: Any, sums_qk_norm: bool = True) -> TensorParallel:
        """mesh: a `DeviceMesh` of one dim."""
        group = mesh.get_group()
        return cls(group.group_name, dist.get_world_size(group), sums_qk_norm)

    @property
    def rank(self) -> int:
        """This process's place among them."""
        return dist.get_rank(self._group)

    @property
    def _group(self) -> Any:
        name: Any = self.group_name
        return torch._C._distributed_c10d._resolve_process_group(name)

    def total(self, out: Tensor, make: Make) -> None:
        """`Total` of these processes."""
        group, sums = self._group, []
        for rows in _parts(out):
            make(rows)
            sums.append(dist.all_reduce(out[rows], group=group, async_op=True))
        for under_way in sums:
            under_way.wait()

    def gather(self, part: Tensor) -> Tensor:
        """(size * t, width): the parts (t, width) of all, in their order."""
        whole = part.new_empty(self.size * part.shape[0], part.shape[1])
        # By its name since PyTorch 2.13, or before.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, part, group=self._group)
        return whole

    def part_of(self, spec: BlockSpec) -> BlockSpec:
        """What one of them computes; its output is a block's after the sums."""
        parts = {n: getattr(spec, n) // self.size for n in ("n_heads", "n_kv_heads", "d_ff")}
        return dataclasses.replace(spec, **parts)

    def why_not(self, spec: BlockSpec) -> str | None:
        """Why a block of this spec can't be dealt out to them, or None."""
        for name in ("n_heads", "n_kv_heads", "d_ff"):
            if getattr(spec, name) % self.size:
                return f"{name} {getattr(spec, name)} can't be dealt out evenly to {self.size} processes"
        if spec.qk_norm == "full":
            return "its QK-norm is over all heads, of which each process has some"
        if spec.drops:
            return "it drops values, and each process would draw others"
        return None


def _parts(out: Tensor) -> Iterator[slice]:
    """What is made before its sum begins: on a GPU some rows, so that their sum hides beside what is made next."""
    rows = out.shape[0]
    step = max(1, -(-rows // max(1, min(_PARTS, rows // _ROWS if out.is_cuda else 1))))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def holders_of(output: Any) -> TensorParallel | None:
    """Those that have a block's weights together, by the last dim of the mesh that its output projection's is on.

    None where that is not dealt out by its columns. Where FSDP2 shards it as well it is so on another dim, before.
    """
    if not is_dealt_out(output):
        return None
    from torch.distributed.tensor import Shard

    if output.placements[-1] != Shard(1):
        return None
    mesh = output.device_mesh
    return TensorParallel.of(mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]])


def own_parts(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """This process's parts of a block's weights, differentiable, of those that are dealt out as they have to be."""
    return {n: t if is_dealt_out(t) and t.placements != (_placement(n),) else own_part(t) for n, t in weights.items()}


def check_gathered(name: str, weight: Any) -> None:
    """Raise ValueError where a weight of a block, or the part that `own_parts` gives, is still dealt out."""
    if is_dealt_out(weight):
        raise ValueError(
            f"{name} is dealt out to processes as {weight.placements}. Where FSDP2 shards it, it is gathered in a call "
            "of the module that fully_shard was given, and there the block runs. Tensor parallelism of a block is "
            "ColwiseParallel() of q_proj, k_proj, v_proj, gate_proj and up_proj, RowwiseParallel() of o_proj and "
            f"down_proj, on one dim of a mesh; expected ({_placement(name)},) of this one"
        )


def _placement(name: str) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Shard(0) if name.startswith(_MADE) else Shard(1) if name in _READING else Replicate()
