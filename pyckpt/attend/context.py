"""`ContextParallel`: what users say about a sequence that several processes share."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyckpt.attend.all_to_all import AllToAllAttend, why_not
from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.attend.processes import Processes, Spans
from pyckpt.attend.ring import RingAttend
from pyckpt.attend.shared_tiles import AllToAllTiles, RingTiles
from pyckpt.attend.tiled import TiledAttend
from pyckpt.compiling import uncompiled
from pyckpt.ops import philox

_KINDS: dict[str, Any] = {"ring": RingAttend, "all-to-all": AllToAllAttend}
_TILES: dict[str, Any] = {"ring": RingTiles, "all-to-all": AllToAllTiles}
_FIRST_SITE = 1 << 20  # of the seeds that are derived from a block's: beyond those inside a block


class ContextParallel:
    """A group of processes that share every sequence: each has some of its tokens, in all blocks, and all weights.

    Args:
        group: a `torch.distributed` process group, or a `DeviceMesh` of one dim; default: all processes.
        method: how attention reaches the tokens of others. "ring": keys and values go round the processes while queries
            stay (Liu et al. 2023), each process having a chunk from the front of the sequence and one from its end, so
            that a causal mask gives all as much to do. "all-to-all": each process attends some of the heads over all
            tokens (Jacobs et al. 2023, DeepSpeed-Ulysses); heads have to be dealt out evenly. What each sends falls
            with the number of processes, where a ring's does not, but nothing is computed meanwhile.

    Given to `pyckpt.swap`, `CkptCausalLM.loss`, a block, a stack or `pyckpt.attention` as `context=`. Token ids (and
    labels, positions, cu_seqlens) are those of whole sequences, the same in every process of the group; what is
    between, x and y of a block or q, k, v, is this process's part (`shard`), and `gather` brings parts together. A loss
    is that of all tokens, the same in every process. Processes talk in forwards and backwards: each has to make the
    same calls in the same order.

    Raises ValueError for an unknown method, a mesh of several dims and a process that is not in the group; TypeError
    for what is no group; RuntimeError where torch.distributed is not initialised.

    Gradients of weights are to be averaged over the group's processes, as DDP and FSDP average them over the processes
    that they are given: each process has its own tokens' share, times the number of processes. What dropout drops
    depends on the process too, and is no less the same in every recomputation.
    """

    def __init__(self, group: Any = None, method: str = "ring") -> None:
        if method not in _KINDS:
            raise ValueError(f"method={method!r} does not exist; expected one of {', '.join(map(repr, _KINDS))}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "there are no other processes: torch.distributed is not initialised; start the script with torchrun "
                "and call torch.distributed.init_process_group() first"
            )
        group = _group(group)
        if dist.get_rank(group) < 0:
            raise ValueError("this process is not in the group; give each process the group that it is in")
        self.method = method
        self._compared = False
        self._processes = Processes(group, dist.get_rank(group), dist.get_world_size(group))

    @property
    def group(self) -> Any:
        """The process group."""
        return self._processes.group

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self._processes.rank

    @property
    def size(self) -> int:
        """Processes in the group."""
        return self._processes.size

    @property
    def multiple(self) -> int:
        """What the tokens of a sequence, or of a packed batch, have to be a multiple of."""
        return self._spans(1, 0).chunks

    def shard(self, t: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a whole tensor along `dim`, the tokens': 1 of (B, S, ...), 0 of packed (T, ...).

        Raises ValueError where the tokens are no multiple of `multiple`.
        """
        t, dim = _checked(t, dim)
        self.check_whole(t.shape[dim])
        chunks = t.chunk(self.multiple, dim)
        return torch.cat([chunks[i] for i in self._spans(1, 0).chunks_of(self.rank)], dim)

    def shard_positions(self, positions: Tensor, x: Tensor, axes: int = 0) -> Tensor:
        """This process's part of the positions that are given beside its part x of hidden states.

        With `axes` their last dim is that of the axes.
        """
        positions, dim = _checked(positions, -2 if axes else -1)
        whole = x.shape[-2] * self.size
        if positions.shape[dim] != whole:
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}, expected those of whole sequences, of {whole} tokens: "
                f"x is this process's part, {x.shape[-2]} of them, and positions are not"
            )
        return self.shard(positions, dim)

    @staticmethod
    def padded_positions(positions: Tensor, padding: int, axes: int = 0) -> Tensor:
        """Positions (..., S), with `axes` (..., S, axes), of so many tokens more, which are at 0."""
        return torch.nn.functional.pad(positions, (0, 0, 0, padding) if axes else (0, padding))

    def gather(self, t: Tensor, dim: int = 1) -> Tensor:
        """The whole of which every process has given its part, in every process.

        Differentiable: a part's gradient is the sum of those that the processes have for it.
        """
        t, dim = _checked(t, dim)
        self.check_part(t.shape[dim])
        gathered: Tensor = _Gather.apply(t, dim, self)
        return gathered

    def total(self, t: Tensor) -> Tensor:
        """The sum of what the processes give, in every process; the gradient of each is the sum of all processes'."""
        summed: Tensor = _Total.apply(_tensor(t), self)
        return summed

    def positions(self, tokens: int, device: torch.device | str | None = None) -> Tensor:
        """The places in a sequence, (S / size,) int64, of this process's tokens, of `tokens` = S in the whole."""
        self.check_whole(tokens)
        return self.shard(torch.arange(tokens, device=device), 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextParallel:
        """Itself: a copy of a model is shared by the same processes."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ContextParallel can't be pickled: it is a group of processes that run now. Save a model's state_dict(), "
            "or call pyckpt.unswap(model) before it is pickled"
        )

    def __repr__(self) -> str:
        return f"ContextParallel(rank={self.rank}, size={self.size}, method={self.method!r})"

    # --- what executors ask ---------------------------------------------------------------------------------------

    def attend(self, attend: DenseAttend) -> RingAttend | AllToAllAttend:
        """The same attention, over the tokens of all processes."""
        if self.method == "all-to-all":
            why = why_not(attend.n_heads, attend.n_kv_heads, self.size)
            if why is not None:
                raise ValueError(f'{why}: method="ring" takes any number of heads')
        kind: type[RingAttend] | type[AllToAllAttend] = _KINDS[self.method]
        return attend.as_kind(kind, processes=self._processes)

    def tiled(self, attend: DenseAttend, layout: Layout, tile: int) -> TiledAttend:
        """The same attention by tiles of so many of this process's tokens, of a layout of all processes' tokens."""
        shared: Any = self.attend(attend)
        return _TILES[self.method](shared, layout, tile)

    def repeats(self, attend: DenseAttend) -> int:
        """How often `tiled` attention holds keys and values for each token of this process."""
        return max(1, self.size // attend.n_kv_heads) if self.method == "all-to-all" else 1

    def tile(self, rows: slice) -> slice:
        """Where this process's tokens of a tile of `tiled` attention are among all; `rows`: among its own."""
        first, length = rows.start * self.size, rows.stop - rows.start
        return slice(first + self.rank * length, first + (self.rank + 1) * length)

    def seed(self, seed: int | None) -> int | None:
        """Of this process's dropout: two that are seeded alike are not to drop alike, at places counted from 0."""
        return None if seed is None else philox.derive(seed, _FIRST_SITE + self.rank)

    def places(self, starts: Tensor | None, batch: int, here: int, device: torch.device) -> Tensor:
        """Each token's place in its sequence, (batch * here,), of `here` tokens in each row of this process's.

        starts: (N + 1,), of the packed sequences.
        """
        tokens = self.positions(here * self.size, device)
        if starts is None:
            return tokens.repeat(batch)
        return tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]

    def check_part(self, tokens: int) -> None:
        """Raise ValueError where a process's part of a sequence can't have so many tokens."""
        self.check_whole(tokens * self.size)

    @uncompiled
    def check_alike(self, device: torch.device, **given: Any) -> None:
        """Raise ValueError, in every process, where they were not given the same. Looks in the first call alone.

        The likeliest mistake is a sampler that deals out batches to all processes, and no process could notice it by
        itself: the loss would be one of sequences that nobody has. Others would have them wait for one another.

        given: by name, the same names in every process, tensors, numbers, texts and None. device: where the group's
        messages are.
        """
        if self._compared or self.size == 1 or device.type == "meta":
            return
        named = {"method": self.method, **given}
        mine = torch.stack([torch.stack(_marks(value, device)) for value in named.values()])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        differs = [(theirs != found[0]).any(1).tolist() for theirs in found]
        if any(map(any, differs)):
            ranks = ", ".join(str(rank) for rank, odd in enumerate(differs) if any(odd))
            what = ", ".join(name for name, odd in zip(named, zip(*differs, strict=True), strict=True) if any(odd))
            raise ValueError(
                f"the processes that share a sequence were not given the same: {ranks} of this group have other {what} "
                "than 0. Give each of them the whole batch (a DistributedSampler takes the number of groups for "
                "num_replicas) and the same options"
            )
        self._compared = True

    def _spans(self, rows: int, seq: int) -> Spans:
        return Spans(self.size, rows, seq, balanced=self.method == "ring")

    def padding(self, tokens: int) -> int:
        """How many more a sequence of so many tokens has to have."""
        return -tokens % self.multiple

    @staticmethod
    def padded(ids: Tensor, tokens: int) -> Tensor:
        """(..., S + tokens), with the last id again: one that is read anyway, whatever others look up."""
        return torch.cat([ids, ids[..., -1:].expand(*ids.shape[:-1], tokens)], -1)

    def check_whole(self, tokens: int) -> None:
        """Raise ValueError where a sequence of so many tokens can't be dealt out."""
        if tokens < 1 or tokens % self.multiple:
            enough = max(1, -(-tokens // self.multiple)) * self.multiple
            raise ValueError(
                f"{tokens} tokens can't be dealt out evenly to {self.size} processes (method={self.method!r}): pad "
                f"them to a multiple of {self.multiple}, {enough} for instance"
            )


def processes_of(context: ContextParallel | None) -> int:
    """How many share a sequence: one, where nobody said."""
    return 1 if context is None else context.size


def check_context(given: Any) -> ContextParallel:
    if not isinstance(given, ContextParallel):
        raise TypeError(f"context must be a pyckpt.ContextParallel or None, got {type(given).__name__}")
    return given


def _group(given: Any) -> Any:
    """The process group of what users give."""
    if given is None:
        return dist.group.WORLD
    if isinstance(given, dist.ProcessGroup):
        return given
    if hasattr(given, "get_group"):  # a DeviceMesh
        if given.ndim != 1:
            raise ValueError(f"group is a DeviceMesh of {given.ndim} dims, expected one: give mesh['cp'], say")
        return given.get_group()
    if given is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group; give each process the group that it is in")
    raise TypeError(f"group must be a process group or a DeviceMesh, got {type(given).__name__}")


def _tensor(t: Any) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(t).__name__}")
    return t


def _checked(t: Any, dim: int) -> tuple[Tensor, int]:
    t = _tensor(t)
    if not -t.dim() <= dim < t.dim():
        raise ValueError(f"dim={dim} is not a dim of a tensor of shape {tuple(t.shape)}")
    return t, dim % t.dim()


def _marks(value: Any, device: torch.device) -> list[Tensor]:
    """Ints that tell it from another, in all likelihood."""
    if not isinstance(value, Tensor):
        return [*torch.tensor([-1, 0, 0, 0, zlib.crc32(repr(value).encode()), 0], device=device)]
    bits = value.detach().contiguous()
    bits = bits.view(_INTS[bits.itemsize]) if bits.is_floating_point() else bits
    flat = bits.reshape(-1).long()
    places = torch.arange(1, flat.numel() + 1, device=flat.device)
    sizes = torch.tensor([*value.shape, *(0,) * 4][:4], device=device)
    return [*sizes, (flat * places).sum().to(device), flat.sum().to(device)]


_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, dim: int, context: ContextParallel) -> Tensor:
        ctx.dim, ctx.context = dim, context
        parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(context.size)]
        dist.all_gather(parts, t.contiguous(), group=context.group)
        spans = context._spans(1, 0)
        chunks = [c for part in parts for c in part.chunk(len(spans.chunks_of(0)), dim)]
        placed = sorted(zip(spans.order(), chunks, strict=True), key=lambda pair: pair[0])
        return torch.cat([chunk for _, chunk in placed], dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.context.group)
        return ctx.context.shard(whole, ctx.dim), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        t = t.clone()
        dist.all_reduce(t, group=context.group)
        return t

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        whole = grads[0].clone()
        dist.all_reduce(whole, group=ctx.context.group)
        return whole, None
