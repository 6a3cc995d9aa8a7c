"""Attention of a block over the tokens of several processes, by exchange: each attends some heads over all tokens.

Jacobs et al. 2023 (DeepSpeed-Ulysses). A process has the tokens of its place; before attention it gives away the heads
that are others' and is given its own heads of all tokens, and afterwards the outputs go back.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.attend.processes import Processes
from pyckpt.ops.attention import sinks_backward
from pyckpt.ops.direct import ops


def why_not(n_heads: int, n_kv_heads: int, processes: int) -> str | None:
    """Why so many heads can't be dealt out to so many processes, in words; None where they can."""
    if n_heads % processes:
        return f"{n_heads} heads can't be dealt out evenly to {processes} processes"
    if n_kv_heads % processes and processes % n_kv_heads:
        return f"{n_kv_heads} key/value heads can't be dealt out evenly to {processes} processes"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllToAllAttend(DenseAttend):
    """`DenseAttend` where a layout has this process's tokens, those of its place in each row, and cu_seqlens are those
    of all tokens. lse is that of this process's heads and of all tokens.

    With fewer key/value heads than processes, several have the same one.
    """

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
        q, k, v = self.to_heads(layout, (q, self.n_heads), (k, self.n_kv_heads), (v, self.n_kv_heads))
        whole = layout.of_all(self.processes.size)
        o, lse = self.of_heads.forward(whole, q, k, v, seed, self._own(sinks))
        return self.to_tokens(layout, (o, self.n_heads))[0], lse

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
        heads, kv_heads = self.n_heads, self.n_kv_heads
        do, q, k, v, o = self.to_heads(layout, (do, heads), (q, heads), (k, kv_heads), (v, kv_heads), (o, heads))
        whole = layout.of_all(self.processes.size)
        dq, dk, dv = self.of_heads.backward(whole, do, q, k, v, o, lse, seed, None, self._own(sinks), dlse)
        del do, q, k, v, o
        dq, dk, dv = self.to_tokens(layout, (dq, heads), (dk, kv_heads), (dv, kv_heads))
        return dq, dk, dv

    def sinks_backward(
        self, layout: Layout, do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor, dlse: Tensor | None = None
    ) -> Tensor:
        """This process's heads' share of it; 0 of the others."""
        delta = self.by_lse(layout, ops.attention_delta(*self._valued(layout, do, o), None))
        if dlse is not None:
            delta = delta - dlse
        share, own = torch.zeros_like(sinks), self.own_heads
        share[own] = sinks_backward(sinks[own], lse, delta)
        return share

    def by_token(self, layout: Layout, lse: Tensor) -> Tensor:
        """lse of this process's tokens and all heads, as `DenseAttend` lays it out."""
        tokens = lse.transpose(-1, -2).reshape(-1, lse.shape[-2])
        (tokens,) = self.to_tokens(layout, (tokens, self.n_heads))
        return tokens.view(*layout.lead, self.n_heads).transpose(-1, -2)

    def by_lse(self, layout: Layout, lse: Tensor) -> Tensor:
        """The inverse of `by_token`."""
        (heads,) = self.to_heads(layout, (lse.transpose(-1, -2).reshape(layout.tokens, self.n_heads), self.n_heads))
        return heads.view(*layout.of_all(self.processes.size).lead, -1).transpose(-1, -2).contiguous()

    @property
    def own_heads(self) -> slice:
        heads = self.n_heads // self.processes.size
        return slice(self.processes.rank * heads, (self.processes.rank + 1) * heads)

    def _own(self, sinks: Tensor | None) -> Tensor | None:
        return None if sinks is None else sinks[self.own_heads]

    @property
    def of_heads(self) -> DenseAttend:
        """Attention of the heads that a process has."""
        size = self.processes.size
        return self.as_kind(DenseAttend, n_heads=self.n_heads // size, n_kv_heads=max(1, self.n_kv_heads // size))

    def to_heads(self, layout: Layout, *given: tuple[Tensor, int]) -> list[Tensor]:
        """Of tensors (t, heads * dims), with their heads, this process's heads of all tokens; in one message."""
        size, t = self.processes.size, layout.tokens
        parts = []
        for tensor, heads in given:
            if heads < size:  # several processes have the same head
                tensor = tensor.view(t, heads, 1, -1).expand(t, heads, size // heads, -1)
            parts.append(tensor.reshape(t, size, -1))
        widths = [part.shape[-1] for part in parts]
        sent = torch.empty(size, t, sum(widths), dtype=parts[0].dtype, device=parts[0].device)
        for into, part in zip(sent.split(widths, dim=-1), parts, strict=True):
            into.copy_(part.transpose(0, 1))
        got = self.processes.exchange(sent).view(size, layout.batch, layout.seq, -1).transpose(0, 1)
        return [part.reshape(size * t, -1) for part in got.split(widths, dim=-1)]

    def to_tokens(self, layout: Layout, *given: tuple[Tensor, int]) -> list[Tensor]:
        """Of tensors (all tokens, this process's heads * dims), all heads of this process's tokens; where several
        processes have the same head, the sum of theirs."""
        size, t = self.processes.size, layout.tokens
        parts = [tensor.view(layout.batch, size, layout.seq, -1).transpose(0, 1) for tensor, _ in given]
        widths = [part.shape[-1] for part in parts]
        got = self.processes.exchange(torch.cat(parts, dim=-1)).view(size, t, -1).transpose(0, 1)
        found = []
        for part, (_, heads) in zip(got.split(widths, dim=-1), given, strict=True):
            if heads < size:
                part = part.reshape(t, heads, size // heads, -1).sum(2)
            found.append(part.reshape(t, -1))
        return found
