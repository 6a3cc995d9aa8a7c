"""Attention of a block over the tokens of several processes, by a ring: keys and values go round, queries stay.

Liu et al. 2023 (Ring Attention with Blockwise Transformers), with the tokens dealt out so that every process has as
much to do under a causal mask (Brandon et al. 2023, Striped Attention; here by two chunks for each process). Of the
keys and values no process has more than its own and those that come and go: memory falls with the number of processes.
In the backward their gradients go round with them, and come home last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.attend.pairs import PairAttend
from pyckpt.attend.processes import Processes, Spans
from pyckpt.ops.attention import sinks_backward
from pyckpt.ops.chunks import acc_dtype

_Pair: TypeAlias = "tuple[slice, slice, slice, slice]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingAttend(DenseAttend):
    """`DenseAttend` where a layout has this process's tokens, dealt out as `Spans` has it, and cu_seqlens are those of
    all tokens. lse is (1, H, T)."""

    processes: Processes

    def forward(
        self,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seed: int | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        ring = _Ring(self, layout)
        dtype = acc_dtype(q.dtype)
        o = torch.zeros(layout.tokens, self.d_o, dtype=dtype, device=q.device)
        lse = o.new_full((1, self.n_heads, layout.tokens), -math.inf)
        if sinks is not None:
            lse.copy_(sinks.view(1, -1, 1).expand_as(lse))
        for owner, packed in self.processes.around(together(k, v)):
            k, v = apart(packed, k, v)
            for rows, cols, queries, keys in ring.pairs(owner):
                ring.attend.forward(queries, keys, q[rows], k[cols], v[cols], o[rows], lse[:, :, rows], seed)
        return o.to(q.dtype), lse

    def backward(
        self,
        layout: Layout,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        seed: int | None = None,
        delta: Tensor | None = None,
        sinks: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ring = _Ring(self, layout)
        delta = ring.attend.delta(do, o, dlse) if delta is None else delta[None]
        dq = torch.zeros_like(q, dtype=lse.dtype)

        def add(owner: int, packed: Tensor, share: Tensor) -> None:
            theirs, sums = apart(packed, k, v), apart(share, k, v)
            for rows, cols, queries, keys in ring.pairs(owner):
                (kc, vc), (dk, dv) = ((t[cols] for t in both) for both in (theirs, sums))
                outputs = o[rows] if dlse is None else None
                here = (do[rows], q[rows], kc, vc, outputs, lse[:, :, rows], delta[:, :, rows])
                ring.attend.backward(queries, keys, *here, (dq[rows], dk, dv), seed)

        dk, dv = apart(self.processes.around_and_home(together(k, v), lse.dtype, add), k, v)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def sinks_backward(
        self, layout: Layout, do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor, dlse: Tensor | None = None
    ) -> Tensor:
        """This process's tokens' share of it."""
        return sinks_backward(sinks, lse, _Ring(self, layout).attend.delta(do, o, dlse))

    def by_token(self, layout: Layout, lse: Tensor) -> Tensor:
        """lse of this process's tokens and all heads, as `DenseAttend` lays it out."""
        return lse[0] if layout.cu_seqlens is not None else lse[0].unflatten(1, (layout.batch, -1)).transpose(0, 1)

    def by_lse(self, layout: Layout, lse: Tensor) -> Tensor:
        """The inverse of `by_token`."""
        return lse[None] if layout.cu_seqlens is not None else lse.transpose(0, 1).flatten(1)[None]


class _Ring:
    """Which pairs of ranges this process attends, of its own queries and another's keys."""

    def __init__(self, attend: RingAttend, layout: Layout) -> None:
        processes = attend.processes
        whole = layout.of_all(processes.size)
        self.attend = PairAttend(attend, whole)
        self._spans = Spans(processes.size, layout.batch, whole.seq, balanced=True)
        self._rank = processes.rank

    def pairs(self, owner: int) -> Iterator[_Pair]:
        """Rows and columns in the tensors that this process and the owner have; the same on the flat axis of all."""
        for row in range(self._spans.rows):
            for rows, queries in self._spans.of(self._rank, row):
                for cols, keys in self._spans.of(owner, row):
                    yield rows, cols, queries, keys


def together(k: Tensor, v: Tensor) -> Tensor:
    """One message of the two: (values,)."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def apart(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `together` has put together of two tensors of these shapes."""
    first, second = packed.split([k.numel(), v.numel()])
    return first.view(k.shape), second.view(v.shape)
