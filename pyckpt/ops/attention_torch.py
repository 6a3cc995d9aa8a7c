"""Attention in PyTorch's own kernels: the ``torch`` implementation of the attention ops, for every device.

Two ways to compute, both without an Sq x Sk matrix:

- PyTorch's CPU flash kernels, whole where the mask is none or plainly causal, else one query tile at a time
  against the keys it sees, under an explicit mask of that tile;
- an exact tiled form in plain matrix products, for all others (softcap, sinks, ALiBi, dropout, Dv != D, a
  gradient of lse, other devices).

The backward is that of Dao et al. 2022, algorithm 4: P from lse, delta = rowsum(do * o).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from pyckpt.ops import philox
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.masking import Mask

aten = torch.ops.aten

_FLASH_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLASH_TILE = 512
_SCORE_ELEMENTS = 1 << 24

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Score:
    """What becomes of a product q k: scale, softcap, ALiBi, the sinks beside it, and dropout of its probability."""

    softcap: float = 0.0
    scale: float = 1.0
    sinks: Tensor | None = None  # (H,)
    slopes: Tensor | None = None  # (H,) or (B, H)
    dropout: float = 0.0
    seed: int | None = None
    first_sequence: int = 0
    k_start: int = 0

    @property
    def plain(self) -> bool:
        return not (self.softcap or self.dropout) and self.sinks is None and self.slopes is None

    @property
    def keep_factor(self) -> float:
        return 1.0 / (1.0 - self.dropout)

    def of_sequence(self, i: int) -> Score:
        """For sequence i of a packed batch."""
        slopes = self.slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[i]
        return dataclasses.replace(self, slopes=slopes, first_sequence=i)


# --- the ops' implementations -------------------------------------------------------------------------------


def lse_like(q: Tensor) -> Tensor:
    """An empty lse for the queries."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=acc_dtype(q.dtype))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    window: tuple[int, int],
    score: Score,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of a dense or packed batch."""
    o, lse = q.new_empty((*q.shape[:-1], v.shape[-1])), lse_like(q)
    for part in _sequences(q, k, cu_q, cu_k, top_left):
        _forward(
            part.rows(q),
            part.keys(k),
            part.keys(v),
            part.mask(window),
            part.score(score),
            part.rows(o),
            part.statistics(lse),
        )
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    window: tuple[int, int],
    score: Score,
    top_left: bool = False,
) -> Gradients:
    """(dq, dk, dv) of a dense or packed batch."""
    if cu_q is None and dlse is None:
        mask = Mask(q.shape[1], k.shape[1], *window, shift=0 if top_left else None)
        if _flash_serves(q, v, score) and (mask.full or mask.plain_causal):
            return _flash_backward(do, q, k, v, o, lse, mask, score.scale)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for part in _sequences(q, k, cu_q, cu_k, top_left):
        grads = _backward(
            part.rows(do),
            part.rows(q),
            part.keys(k),
            part.keys(v),
            part.rows(o),
            part.statistics(lse),
            None if dlse is None else part.statistics(dlse),
            part.mask(window),
            part.score(score),
        )
        for whole, grad, cut in zip((dq, dk, dv), grads, (part.rows, part.keys, part.keys), strict=True):
            cut(whole).copy_(grad)
    return dq, dk, dv


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: tuple[int, int], score: Score, q_start: int
) -> None:
    """Merge these keys into a running (o, lse), in place."""
    mask = Mask(q.shape[1], k.shape[1], *window, shift=q_start - score.k_start)
    q, k, v = (t.to(o.dtype) for t in (q, k, v))  # a part's o is not to be rounded before it is merged
    part_o, part_lse = q.new_empty(o.shape), lse_like(q)
    _forward(q, k, v, mask, score, part_o, part_lse)
    merge(o, lse, part_o, part_lse)


def merge(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    """Merge (part_o, part_lse) into a running (o, lse), in place."""
    # From the distances to the larger one: from those to their sum, the weights would have its rounding.
    most = torch.maximum(lse, part_lse)
    parts = [(old - most.masked_fill(most == float("-inf"), 0.0)).exp() for old in (lse, part_lse)]
    whole = (parts[0] + parts[1]).masked_fill_(most == float("-inf"), 1.0)
    weights = [(part / whole).transpose(-1, -2).unsqueeze(-1) for part in parts]
    if o.dtype == lse.dtype:
        o.mul_(weights[0]).add_(part_o * weights[1])
    else:
        o.copy_((o * weights[0]).add_(part_o * weights[1]))
    lse.copy_(torch.logaddexp(lse, part_lse))


def tile_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    window: tuple[int, int],
    score: Score,
    q_start: int,
) -> None:
    """Add these keys' share of the gradients, in place. `o` is read where the flash kernel serves, delta elsewhere."""
    mask = Mask(q.shape[1], k.shape[1], *window, shift=q_start - score.k_start)
    if 0 in (mask.sq, mask.sk, q.shape[0]):
        return
    if o is not None and _flash_serves(q, v, score):
        do, q, k, v, o = (t.to(dq.dtype) for t in (do, q, k, v, o))  # a share is not to be rounded before it is added
        for total, share in zip((dq, dk, dv), _flash_backward(do, q, k, v, o, lse, mask, score.scale), strict=True):
            total += share
    else:
        _tiled_backward(do, q, k, v, lse, delta, mask, score, (dq, dk.transpose(1, 2), dv.transpose(1, 2)))


def delta_of(do: Tensor, o: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(do * o) - dlse, laid out like lse."""
    acc = acc_dtype(o.dtype)
    delta = (do.to(acc) * o.to(acc)).sum(-1).transpose(-1, -2).contiguous()
    return delta if dlse is None else delta.sub_(dlse)


class _Sequence:
    """One sequence of a packed batch, or a whole dense batch: cuts it out of the tensors, as (B, S, H, D)."""

    def __init__(self, q: slice, k: slice, number: int | None, top_left: bool) -> None:
        self.q, self.k, self.number, self.shift = q, k, number, 0 if top_left else None

    def rows(self, t: Tensor) -> Tensor:
        return t if self.number is None else t[self.q].unsqueeze(0)

    def keys(self, t: Tensor) -> Tensor:
        return t if self.number is None else t[self.k].unsqueeze(0)

    def statistics(self, t: Tensor) -> Tensor:
        return t if self.number is None else t[:, self.q].unsqueeze(0)

    def mask(self, window: tuple[int, int]) -> Mask:
        return Mask(self.q.stop - self.q.start, self.k.stop - self.k.start, *window, shift=self.shift)

    def score(self, score: Score) -> Score:
        return score if self.number is None else score.of_sequence(self.number)


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, top_left: bool) -> Iterator[_Sequence]:
    if cu_q is None:
        yield _Sequence(slice(0, q.shape[1]), slice(0, k.shape[1]), None, top_left)
        return
    starts_q = cu_q.tolist()
    starts_k = starts_q if cu_k is None else cu_k.tolist()
    for i in range(len(starts_q) - 1):
        if starts_q[i + 1] > starts_q[i] or starts_k[i + 1] > starts_k[i]:
            yield _Sequence(slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1]), i, top_left)


def _flash_serves(q: Tensor, v: Tensor, score: Score) -> bool:
    return q.device.type == "cpu" and q.dtype in _FLASH_DTYPES and score.plain and q.shape[-1] == v.shape[-1]


# --- one dense batch ----------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, o: Tensor, lse: Tensor) -> None:
    if mask.sq == 0:
        return
    # The flash kernel divides by zero on an empty batch of keys.
    if mask.sk == 0 or q.shape[0] == 0:
        _fill_blind(o, lse, score)
    elif _flash_serves(q, v, score):
        _flash_forward(q, k, v, mask, score.scale, o, lse)
    else:
        _tiled_forward(q, k, v, mask, score, o, lse)


def _fill_blind(o: Tensor, lse: Tensor, score: Score) -> None:
    """o and lse of queries that see no key."""
    o.zero_()
    if score.sinks is None:
        lse.fill_(float("-inf"))
    else:
        lse.copy_(score.sinks.view(-1, 1).expand_as(lse))


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    mask: Mask,
    score: Score,
) -> Gradients:
    if mask.sq == 0 or mask.sk == 0 or q.shape[0] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if dlse is None and _flash_serves(q, v, score):
        return _flash_backward(do, q, k, v, o, lse, mask, score.scale)
    acc = acc_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=t.device).transpose(1, 2) for t in (k, v))
    _tiled_backward(do, q, k, v, lse, delta_of(do, o, dlse), mask, score, (dq, dk, dv))
    return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


# --- PyTorch's flash kernels --------------------------------------------------------------------------------


def _flash_inputs(*tensors: Tensor) -> list[Tensor]:
    """With the heads first, and a unit last stride, which the kernels take for granted."""
    return _heads_first(*(t if t.stride(-1) == 1 else t.contiguous() for t in tensors))


def _flash_tiles(mask: Mask, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys, additive mask) of each query tile that sees some key."""
    for start in range(0, mask.sq, _FLASH_TILE):
        stop = min(start + _FLASH_TILE, mask.sq)
        lo, hi = mask.keys(start, stop)
        if lo >= hi:
            continue
        visible = mask.tile(start, stop, lo, hi, device)
        bias = None
        if visible is not None:
            # In q's own dtype: the kernel reads a float32 mask as float64 when q is float64.
            bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        yield slice(start, stop), slice(lo, hi), bias


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, o: Tensor, lse: Tensor) -> None:
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    qh, kh, vh = _flash_inputs(q, k, v)
    if mask.full or mask.plain_causal:
        oh, stats = flash(qh, kh, vh, 0.0, not mask.full, scale=scale)
        o.copy_(oh.transpose(1, 2))
        lse.copy_(stats)
        return
    o.zero_()
    lse.fill_(float("-inf"))
    for rows, keys, bias in _flash_tiles(mask, q.dtype, q.device):
        oh, stats = flash(qh[:, :, rows], kh[:, :, keys], vh[:, :, keys], 0.0, False, attn_mask=bias, scale=scale)
        o[:, rows] = oh.transpose(1, 2)
        lse[:, :, rows] = stats
    blind = mask.blind_rows(q.device)
    if blind is not None:
        lse.masked_fill_(blind, float("-inf"))


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, mask: Mask, scale: float
) -> Gradients:
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    doh, qh, kh, vh, oh = _flash_inputs(do.contiguous(), q, k, v, o)
    # In float16 PyTorch's backward takes ten times as long as in float32, which tiles are brought to.
    if (mask.full or mask.plain_causal) and q.dtype != torch.float16:
        grads = flash(doh, qh, kh, vh, oh, lse, 0.0, not mask.full, scale=scale)
        dq, dk, dv = (g.transpose(1, 2).contiguous() for g in grads)
        return dq, dk, dv
    acc = acc_dtype(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=acc) for t in (k, v))
    # A row that sees nothing has lse = -inf, and exp(-inf + inf) is NaN; with 0 it is exp(-inf) = 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for rows, keys, bias in _flash_tiles(mask, acc, q.device):
        # A tile's share of dk and dv is not to be rounded before it is added.
        dq_t, dk_t, dv_t = flash(
            doh[:, :, rows].to(acc),
            qh[:, :, rows].to(acc),
            kh[:, :, keys].to(acc),
            vh[:, :, keys].to(acc),
            oh[:, :, rows].to(acc),
            lse[:, :, rows],
            0.0,
            False,
            attn_mask=bias,
            scale=scale,
        )
        dq[:, rows] = dq_t.transpose(1, 2)
        dk[:, keys] += dk_t.transpose(1, 2)
        dv[:, keys] += dv_t.transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# --- exact, tiled, in plain matrix products -----------------------------------------------------------------


def _tiles(mask: Mask, q: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, keys, hidden) of each query tile that sees some key; its scores stay under a fixed size."""
    batch, _, heads, _ = q.shape
    start = 0
    while start < mask.sq:
        widest = max(1, min(mask.sk, mask.keys(start, min(start + 512, mask.sq))[1] - mask.keys(start, start + 1)[0]))
        stop = min(mask.sq, start + max(1, min(512, _SCORE_ELEMENTS // (batch * heads * widest))))
        lo, hi = mask.keys(start, stop)
        if lo < hi:
            visible = mask.tile(start, stop, lo, hi, q.device)
            yield slice(start, stop), slice(lo, hi), None if visible is None else ~visible
        start = stop


def _grouped(t: Tensor, groups: int, acc: torch.dtype) -> Tensor:
    """(B, s, H, D) -> (B, Hkv, G * s, D): the query heads that share a key/value head side by side."""
    b, s, h, d = t.shape
    return t.to(acc).reshape(b, s, h // groups, groups, d).permute(0, 2, 3, 1, 4).reshape(b, h // groups, -1, d)


def _grouped_statistics(t: Tensor, groups: int, acc: torch.dtype) -> Tensor:
    """(B, H, s) -> (B, Hkv, G * s, 1)."""
    return _grouped(t.transpose(1, 2).unsqueeze(-1), groups, acc)


def _ungrouped(t: Tensor, groups: int) -> Tensor:
    """The inverse of `_grouped`, as a view."""
    b, h, gs, d = t.shape
    return t.view(b, h, groups, gs // groups, d).permute(0, 3, 1, 2, 4).reshape(b, gs // groups, h * groups, d)


class _Tile:
    """Scores of some queries against some keys, (B, Hkv, G * tq, tk), and what dropout keeps of them."""

    def __init__(self, mask: Mask, score: Score, rows: slice, keys: slice, hidden: Tensor | None, groups: int) -> None:
        self.mask, self.score, self.rows, self.keys, self.hidden, self.groups = mask, score, rows, keys, hidden, groups

    # A method for each direction, not a loop's body: names of a loop hold their scores beside the next tile's.

    def forward(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
        """Writes o and lse of the tile, which holds the sinks where there are any."""
        acc, groups = acc_dtype(q.dtype), self.groups
        kt, vt = (t.to(acc).transpose(1, 2) for t in (k, v))
        s, _ = self.scores(_grouped(q, groups, acc), kt, want_slope=False)
        sinks = None if self.score.sinks is None else _grouped_statistics(lse, groups, acc)
        total, stats = _softmax_(s, sinks)
        made = torch.matmul(self.keep_(s), vt).div_(total)
        o.copy_(_ungrouped(made, groups))
        lse.copy_(_ungrouped(stats, groups).squeeze(-1).transpose(1, 2))

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, into: Gradients
    ) -> None:
        """Adds to dq (B, tq, H, D), and dk and dv with the heads first."""
        acc, groups = acc_dtype(q.dtype), self.groups
        dq, dk, dv = into
        qt, dot = (_grouped(t, groups, acc) for t in (q, do))
        kt, vt = (t.to(acc).transpose(1, 2) for t in (k, v))
        s, slope = self.scores(qt, kt, want_slope=True)
        p = s.sub_(_grouped_statistics(lse, groups, acc)).exp_()
        dp = self.keep_(torch.matmul(dot, vt.transpose(-1, -2)))
        ds = dp.sub_(_grouped_statistics(delta, groups, acc)).mul_(p).mul_(self.score.scale)
        if slope is not None:
            ds.mul_(slope)
        dk += torch.matmul(ds.transpose(-1, -2), qt)
        dq += _ungrouped(torch.matmul(ds, kt), groups).to(dq.dtype)
        dv += torch.matmul(self.keep_(p).transpose(-1, -2), dot)

    def scores(self, q: Tensor, k: Tensor, want_slope: bool) -> tuple[Tensor, Tensor | None]:
        """Masked scores, and the softcap's derivative where there is one and it is wanted."""
        score = self.score
        s = torch.matmul(q, k.transpose(-1, -2)).mul_(score.scale)
        slope = None
        if score.softcap:
            s.div_(score.softcap).tanh_()
            slope = 1.0 - s * s if want_slope else None
            s.mul_(score.softcap)
        by_head = s.view(*s.shape[:2], self.groups, -1, s.shape[-1])
        if score.slopes is not None:
            by_head -= self._bias(s)
        if self.hidden is not None:
            by_head.masked_fill_(self.hidden, float("-inf"))
        return s, slope

    def _bias(self, s: Tensor) -> Tensor:
        """ALiBi's slope * distance (Press et al. 2022, section 3), which broadcasts to (B, Hkv, G, tq, tk)."""
        slopes = self.score.slopes
        assert slopes is not None
        p = torch.arange(self.rows.start, self.rows.stop, device=s.device).unsqueeze(1) + self.mask.offset
        j = torch.arange(self.keys.start, self.keys.stop, device=s.device)
        return slopes.to(s.dtype).view(-1, s.shape[1], self.groups, 1, 1) * (p - j).abs()

    def keep_(self, p: Tensor) -> Tensor:
        """Dropout, in place: what is kept grows by the keep factor."""
        score = self.score
        if not score.dropout:
            return p
        assert score.seed is not None
        first = score.k_start + self.mask.offset
        kept = philox.kept(
            score.dropout,
            score.seed,
            torch.arange(score.first_sequence, score.first_sequence + p.shape[0], device=p.device),
            p.shape[1] * self.groups,
            (first + self.rows.start, first + self.rows.stop),
            (score.k_start + self.keys.start, score.k_start + self.keys.stop),
        )
        return p.mul_(score.keep_factor).masked_fill_(~kept.reshape(p.shape), 0.0)


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, score: Score, o: Tensor, lse: Tensor) -> None:
    _fill_blind(o, lse, score)
    for rows, keys, hidden in _tiles(mask, q):
        tile = _Tile(mask, score, rows, keys, hidden, q.shape[2] // k.shape[2])
        tile.forward(q[:, rows], k[:, keys], v[:, keys], o[:, rows], lse[:, :, rows])


def _softmax_(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turns scores into their softmax times `total` (..., 1). Returns that and lse (..., 1), 1 and -inf of blind rows.

    Not by logsumexp, which makes a second tensor of the scores' size and leaves its exponentials to be made again.
    """
    most = s.amax(dim=-1, keepdim=True)
    if sinks is not None:
        most = torch.maximum(most, sinks)
    most.masked_fill_(most == float("-inf"), 0.0)
    total = s.sub_(most).exp_().sum(dim=-1, keepdim=True)
    if sinks is not None:
        total += (sinks - most).exp_()
    stats = total.log().add_(most)
    return total.masked_fill_(total == 0.0, 1.0), stats


def _tiled_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: Mask,
    score: Score,
    into: Gradients,
) -> None:
    """Add to dq (B, Sq, H, D), and dk and dv with the heads first."""
    dq, dk, dv = into
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for rows, keys, hidden in _tiles(mask, q):
        tile = _Tile(mask, score, rows, keys, hidden, q.shape[2] // k.shape[2])
        grads = (dq[:, rows], dk[:, :, keys], dv[:, :, keys])
        tile.backward(do[:, rows], q[:, rows], k[:, keys], v[:, keys], lse[:, :, rows], delta[:, :, rows], grads)
