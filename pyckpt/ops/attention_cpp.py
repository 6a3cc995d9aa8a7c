"""Attention by the compiled CPU kernels of csrc/cpu: the ``cpp`` implementation of the attention ops.

They take every mask, packed batches, softcap, sinks, ALiBi, dropout, any head dims, running results and a gradient of
lse, in float32, bfloat16 and float16; sums are float32. float64 goes to PyTorch's products, and bfloat16 to its kernels
where the processor has matrix units for it (AMX), which they use and these do not.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from pyckpt.ops import attention as op
from pyckpt.ops import attention_torch, philox
from pyckpt.ops.attention_torch import Gradients, Score, lse_like
from pyckpt.ops.cpu_library import library
from pyckpt.ops.registry import implement

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_LIMIT = 1 << 60
_HAS_AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

_int64, _double, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _View(ctypes.Structure):
    _fields_ = [("data", _pointer), *((name, _int64) for name in ("batch", "seq", "head"))]


class _Segment(ctypes.Structure):
    _fields_ = [(name, _int64) for name in ("batch", "q0", "sq", "k0", "sk", "offset")]


class _Attention(ctypes.Structure):
    """As csrc/cpu/attention.h has it."""

    _fields_ = [
        *((name, _View) for name in ("q", "k", "v", "o", "lse", "grad_o", "delta", "dlse", "dq", "dk", "dv")),
        *(("slopes", _pointer), ("slopes_segment", _int64), ("segments", ctypes.POINTER(_Segment))),
        *((name, _int64) for name in ("n_segments", "heads", "kv_heads", "d_k", "d_v", "element", "o_element")),
        *((name, _int64) for name in ("left", "right")),
        *((name, _double) for name in ("scale", "softcap")),
        *((name, _int64) for name in ("drop_below", "seed")),
        ("keep_factor", _double),
        *((name, _int64) for name in ("first_sequence", "first_key")),
        *((name, _int64) for name in ("begin", "threads")),
    ]


# What the forward finds in o and lse: nothing, an lse (the sinks'), or both.
_NOTHING, _SINKS, _RUNNING = range(3)


@dataclasses.dataclass
class _Problem:
    """The kernels' argument, and the tensors that it points into."""

    argument: _Attention
    held: list[Any]

    def set(self, name: str, t: Tensor, statistic: bool = False) -> None:
        self.held.append(t)
        axes = (0, 2, 1) if statistic else (0, 1, 2)
        strides = t.stride()
        if t.dim() == (2 if statistic else 3):
            strides = (0, *strides)
        setattr(self.argument, name, _View(t.data_ptr(), *(strides[i] for i in axes)))


def _rows(t: Tensor) -> Tensor:
    """With a unit last stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _problem(
    q: Tensor, k: Tensor, v: Tensor, segments: list[tuple[int, ...]], window: tuple[int, int], score: Score
) -> _Problem:
    a = _Attention()
    problem = _Problem(a, [(_Segment * len(segments))(*(_Segment(*s) for s in segments))])
    for name, t in (("q", q), ("k", k), ("v", v)):
        problem.set(name, _rows(t.to(q.dtype)))
    a.segments, a.n_segments = problem.held[0], len(segments)
    a.heads, a.kv_heads, a.d_k, a.d_v = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    a.element = _ELEMENTS[q.dtype]
    a.left, a.right = (min(side, _NO_LIMIT) for side in window)
    a.softcap, a.scale = score.softcap, score.scale
    if score.slopes is not None:
        slopes = score.slopes.to(torch.float32).contiguous()
        problem.held.append(slopes)
        a.slopes, a.slopes_segment = slopes.data_ptr(), slopes.shape[-1] if slopes.dim() == 2 else 0
    if score.dropout:
        assert score.seed is not None
        a.drop_below, a.keep_factor, a.seed = philox.threshold(score.dropout), score.keep_factor, score.seed
        a.first_sequence, a.first_key = score.first_sequence, score.k_start
    a.threads = torch.get_num_threads()
    return problem


def _segments(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, top_left: bool) -> list[tuple[int, ...]]:
    """(batch, q0, sq, k0, sk, offset) of each sequence."""
    if cu_q is None:
        sq, sk = q.shape[1], k.shape[1]
        return [(b, 0, sq, 0, sk, 0 if top_left else sk - sq) for b in range(q.shape[0])]
    starts_q = cu_q.tolist()
    starts_k = starts_q if cu_k is None else cu_k.tolist()
    found: list[tuple[int, ...]] = []
    for i in range(len(starts_q) - 1):
        (q0, q1), (k0, k1) = starts_q[i : i + 2], starts_k[i : i + 2]
        found.append((0, q0, q1 - q0, k0, k1 - k0, 0 if top_left else (k1 - k0) - (q1 - q0)))
    return found


def takes(q: Tensor) -> bool:
    return q.dtype in _ELEMENTS and not (q.dtype == torch.bfloat16 and _HAS_AMX)


def _forward(problem: _Problem, o: Tensor, lse: Tensor, begin: int) -> None:
    problem.set("o", o)
    problem.set("lse", lse, statistic=True)
    problem.argument.o_element, problem.argument.begin = _ELEMENTS[o.dtype], begin
    library.run("pyckpt_attention_forward", problem.argument)


def _backward(problem: _Problem, do: Tensor, lse: Tensor, into: Gradients) -> None:
    """Adds to float32 dq, dk, dv. The problem has a delta, or an o (and a dlse) to make it of."""
    if into[0].shape[-3] == 0:  # of no queries there is nothing to add, and the library takes its forward for this
        return
    problem.set("grad_o", _rows(do))
    problem.set("lse", lse, statistic=True)
    for name, t in zip(("dq", "dk", "dv"), into, strict=True):
        problem.set(name, t)
    library.run("pyckpt_attention_backward", problem.argument)


# --- the functions of `attention_torch`, under its names ------------------------------------------------------


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
    if not takes(q):
        return attention_torch.forward(q, k, v, cu_q, cu_k, window, score, top_left)
    o, lse = q.new_empty((*q.shape[:-1], v.shape[-1])), lse_like(q)
    if score.sinks is not None:
        lse.copy_(score.sinks.view(-1, 1).expand_as(lse))
    problem = _problem(q, k, v, _segments(q, k, cu_q, cu_k, top_left), window, score)
    _forward(problem, o, lse, _NOTHING if score.sinks is None else _SINKS)
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
    if not takes(q):
        return attention_torch.backward(do, q, k, v, o, lse, dlse, cu_q, cu_k, window, score, top_left)
    problem = _problem(q, k, v, _segments(q, k, cu_q, cu_k, top_left), window, score)
    problem.set("o", _rows(o))
    problem.argument.o_element = _ELEMENTS[o.dtype]
    if dlse is not None:
        problem.set("dlse", dlse, statistic=True)
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
    _backward(problem, do.to(q.dtype), lse, (dq, dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: tuple[int, int], score: Score, q_start: int
) -> None:
    if not takes(q) or not _in_place(o):
        attention_torch.tile_forward(q, k, v, o, lse, window, score, q_start)
        return
    problem = _problem(q, k, v, _pair(q, k, q_start - score.k_start), window, score)
    _forward(problem, o, lse, _RUNNING)


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
    """`o` is for `attention_torch` alone."""
    if not takes(q) or not _in_place(dq, dk, dv):
        attention_torch.tile_backward(do, q, k, v, o, lse, delta, dq, dk, dv, window, score, q_start)
        return
    problem = _problem(q, k, v, _pair(q, k, q_start - score.k_start), window, score)
    problem.set("delta", delta, statistic=True)
    _backward(problem, do.to(q.dtype), lse, (dq, dk, dv))


def _in_place(*tensors: Tensor) -> bool:
    """Whether the kernels can write to them."""
    return all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in tensors)


def _pair(q: Tensor, k: Tensor, offset: int) -> list[tuple[int, ...]]:
    return [(b, 0, q.shape[1], 0, k.shape[1], offset) for b in range(q.shape[0])]


if not library.problem and library.argument_size() != ctypes.sizeof(_Attention):
    library.problem = "it was built from other sources: run make cpu, or install pyckpt again"
if not library.problem:
    for _op in (op.attention_fwd, op.attention_bwd, op.attention_tile_fwd_, op.attention_tile_bwd_):
        implement(_op.__name__, "cpp")(functools.partial(_op, kernels=sys.modules[__name__]))
