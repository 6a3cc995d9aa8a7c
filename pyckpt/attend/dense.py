"""Attention over the whole sequence on one device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from pyckpt.ops.attention import sinks_backward
from pyckpt.ops.direct import ops
from pyckpt.spec import BlockSpec, Window

_Kind = TypeVar("_Kind", bound="DenseAttend")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a flat list of T tokens falls into sequences: `batch` of `seq` tokens each, or packed by `cu_seqlens`.

    cu_seqlens: (N + 1,) int32; or (2, N + 1), where keys have starts of their own, in the second row. A sequence's
    first query then stands at its first key. `read`: their values, of queries and of keys, where they have been read.
    """

    batch: int
    seq: int
    cu_seqlens: Tensor | None = None
    read: tuple[Sequence[int], Sequence[int]] | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def lead(self) -> tuple[int, ...]:
        """The dims before the heads: (B, S), or (T,) when packed."""
        return (self.batch, self.seq) if self.cu_seqlens is None else (self.tokens,)

    def of_all(self, processes: int) -> Layout:
        """That of the tokens of so many processes, of which each has as many of every row."""
        return dataclasses.replace(self, seq=self.seq * processes)

    @property
    def apart(self) -> bool:
        """Keys have starts of their own."""
        return self.cu_seqlens is not None and self.cu_seqlens.dim() == 2

    @property
    def starts(self) -> tuple[Tensor | None, Tensor | None]:
        """cu_seqlens of queries and of keys."""
        cu = self.cu_seqlens
        return (cu, cu) if cu is None or cu.dim() == 1 else (cu[0], cu[1])

    @functools.cached_property
    def numbers(self) -> tuple[Sequence[int], Sequence[int]]:
        """The starts of queries and of keys, read once for all blocks: a GPU has to be waited for."""
        cu, cu_keys = self.starts
        if self.read is not None:
            return self.read
        starts = range(0, self.tokens + 1, self.seq) if cu is None else cu.tolist()
        return starts, cu_keys.tolist() if self.apart and cu_keys is not None else starts

    def by_head(self, t: Tensor, head_dim: int) -> Tensor:
        """(T, H * D) -> (B, S, H, D), or (T, H, D) when packed."""
        return t.view(*self.lead, t.shape[-1] // head_dim, head_dim)


@dataclasses.dataclass(frozen=True)
class DenseAttend:
    """Attention of one block: heads, mask and score options; see `pyckpt.ops.attention`.

    `sinks`: the name of the block's weight that holds them, None for none. `v_head_dim`: of values and outputs, where
    it is not `head_dim`.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: Window
    softcap: float
    scale: float
    dropout: float = 0.0
    sinks: str | None = None
    v_head_dim: int | None = None

    @property
    def value_dim(self) -> int:
        """Of a head's values and outputs."""
        return self.v_head_dim or self.head_dim

    @property
    def d_q(self) -> int:
        """Width of q."""
        return self.n_heads * self.head_dim

    @property
    def d_k(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def d_v(self) -> int:
        return self.n_kv_heads * self.value_dim

    @property
    def d_o(self) -> int:
        """Width of the output."""
        return self.n_heads * self.value_dim

    @staticmethod
    def of(spec: BlockSpec) -> DenseAttend:
        return DenseAttend(
            spec.n_heads,
            spec.n_kv_heads,
            spec.head_dim,
            spec.window,
            spec.softcap,
            spec.scale,
            spec.attention_dropout,
        )

    def as_kind(self, kind: type[_Kind], **changes: Any) -> _Kind:
        """The same attention, with these changes, as a class derived from this one, or this one again."""
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(DenseAttend)} | changes)

    def forward(
        self,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seed: int | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """o (T, H * D) and lse from flat q, k, v, and sinks (H,). `seed` of the dropout; None drops nothing."""
        o, lse = ops.attention_fwd(
            *self._keyed(layout, q, k), *self._valued(layout, v), *self._options(layout, seed, sinks)
        )
        return o.view(layout.tokens, -1), lse

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
        """Flat dq, dk, dv. `delta` (heads, T): the sums of do * o by head, where somebody has them already; not with
        `dlse`, the gradient of lse, laid out like it."""
        q, k = self._keyed(layout, q, k)
        do, v, o = self._valued(layout, do, v, o)
        if delta is not None and layout.cu_seqlens is None:
            delta = delta.unflatten(1, (layout.batch, layout.seq)).transpose(0, 1)
        dq, dk, dv = ops.attention_bwd(do, q, k, v, o, lse, dlse, *self._options(layout, seed, sinks), delta)
        return dq.view(layout.tokens, -1), dk.view(layout.tokens, -1), dv.view(layout.tokens, -1)

    def sinks_backward(
        self, layout: Layout, do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor, dlse: Tensor | None = None
    ) -> Tensor:
        """The gradient of the sinks (H,)."""
        return sinks_backward(sinks, lse, ops.attention_delta(*self._valued(layout, do, o), dlse))

    def _keyed(self, layout: Layout, *tensors: Tensor) -> list[Tensor]:
        return [layout.by_head(t, self.head_dim) for t in tensors]

    def _valued(self, layout: Layout, *tensors: Tensor) -> list[Tensor]:
        return [layout.by_head(t, self.value_dim) for t in tensors]

    def _options(self, layout: Layout, seed: int | None, sinks: Tensor | None) -> tuple[Any, ...]:
        options = (*layout.starts, *self.window, self.softcap, self.scale)
        dropout, seed = (0.0, None) if seed is None or not self.dropout else (self.dropout, seed)
        return *options, sinks, None, dropout, seed, layout.apart
