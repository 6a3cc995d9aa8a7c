"""Cross entropy over a chunk of logits, in place: loss, log-sum-exp and the logits' gradient in one launch.

A program takes a row. It reads the row once for the log-sum-exp (online, Milakov & Gimelshein 2018), and once more to
write the gradient over it, in part from the L2 cache. Both are small beside the products around it.
With logits z = softcap tanh((raw + bias) / softcap), label t and smoothing e:

    loss = lse - (1 - e) z_t - e mean(z) + z_loss lse²
    dz_j = upstream ((1 + 2 z_loss lse) exp(z_j - lse) - (1 - e) [j = t] - e / V)
    draw = dz (1 - (z / softcap)²)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import tanh
from .rows import check_device, on
from .sizes import next_power_of_2

COLUMNS = 2048  # of a row at a time: one load of 16 bytes a thread
MOST_WARPS = 8


@triton.jit
def _logits(p_row, p_bias, o_v, m, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """(z, tanh of the uncapped ratio) of columns o_v; -inf where not m. m None: all are there."""
    ACC: tl.constexpr = tl.float64 if p_row.dtype.element_ty == tl.float64 else tl.float32
    z = tl.load(p_row + o_v, mask=m).to(ACC)
    if p_bias is not None:
        z += tl.load(p_bias + o_v, mask=m).to(ACC)
    t = z
    if SOFTCAP != 0.0:
        t = tanh(z / SOFTCAP, PRECISION)
        z = SOFTCAP * t
    if m is not None:
        z = tl.where(m, z, float("-inf"))
    return z, t


@triton.jit
def _count(most, total, plain, p_row, p_bias, o_v, m, SOFTCAP: tl.constexpr, MEAN: tl.constexpr, PREC: tl.constexpr):
    """Running maximum, sum of exp(z - maximum) and sum of z, with columns o_v."""
    z, _t = _logits(p_row, p_bias, o_v, m, SOFTCAP, PREC)
    higher = tl.maximum(most, tl.max(z, 0))
    at = tl.where(higher == float("-inf"), 0.0, higher)  # exp(-inf - -inf) would be NaN
    total = total * tl.exp(most - at) + tl.sum(tl.exp(z - at), 0)
    if MEAN:
        if m is not None:
            z = tl.where(m, z, 0.0)
        plain += tl.sum(z, 0)
    return higher, total, plain


@triton.jit
def _differentiate(
    p_row,
    p_bias,
    o_v,
    m,
    ignored,
    label,
    lse,
    factor,
    share,
    upstream,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient over the logits of columns o_v."""
    z, t = _logits(p_row, p_bias, o_v, m, SOFTCAP, PRECISION)
    d = tl.exp(z - lse) * factor - share
    d = tl.where(o_v == label, d - (1.0 - SMOOTHING), d) * upstream
    if SOFTCAP != 0.0:
        d *= 1.0 - t * t
    d = tl.where(ignored, 0.0, d)
    tl.store(p_row + o_v, d.to(p_row.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    p_logits,
    p_bias,
    p_target,
    p_upstream,
    p_loss,
    p_lse,
    vocab,
    ignore_index,
    stride,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """LOSS: write loss and lse. GRADIENT: write it over the logits, from lse (read where LOSS does not make it)."""
    ACC: tl.constexpr = tl.float64 if p_logits.dtype.element_ty == tl.float64 else tl.float32
    MEAN: tl.constexpr = SMOOTHING != 0.0
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * stride
    o_c = tl.arange(0, COLUMNS)
    label = tl.load(p_target + row)
    ignored = label == ignore_index
    # Whole blocks take no mask: an odd vocabulary would make its loads and stores narrow.
    whole = vocab // COLUMNS * COLUMNS
    o_tail = whole + o_c
    m_tail = o_tail < vocab
    width = tl.full((), vocab, ACC)
    lse = tl.zeros((), ACC)
    if LOSS:
        loss = tl.zeros((), ACC)
        if not ignored:
            most = tl.full((), float("-inf"), ACC)
            total = tl.zeros((), ACC)
            plain = tl.zeros((), ACC)
            inside = (label >= 0) & (label < vocab)
            picked, _picked_t = _logits(p_row, p_bias, label, inside, SOFTCAP, PRECISION)
            for start in range(0, whole, COLUMNS):
                most, total, plain = _count(
                    most, total, plain, p_row, p_bias, start + o_c, None, SOFTCAP, MEAN, PRECISION
                )
            if whole < vocab:
                most, total, plain = _count(most, total, plain, p_row, p_bias, o_tail, m_tail, SOFTCAP, MEAN, PRECISION)
            lse = most + tl.log(total)
            loss = lse - (1.0 - SMOOTHING) * picked + Z_LOSS * lse * lse - SMOOTHING * (plain / width)
            loss = tl.where(inside, loss, float("nan"))  # where nobody checked the labels
        tl.store(p_loss + row, loss)
        tl.store(p_lse + row, lse)
    else:
        lse = tl.load(p_lse + row)
    if GRADIENT:
        upstream = tl.full((), 1.0, ACC)
        if p_upstream is not None:
            upstream = tl.load(p_upstream + row)
        factor = 1.0 + 2.0 * Z_LOSS * lse
        share = SMOOTHING / width
        for start in range(0, whole, COLUMNS):
            _differentiate(
                p_row,
                p_bias,
                start + o_c,
                None,
                ignored,
                label,
                lse,
                factor,
                share,
                upstream,
                SOFTCAP,
                SMOOTHING,
                PRECISION,
            )
        if whole < vocab:
            _differentiate(
                p_row,
                p_bias,
                o_tail,
                m_tail,
                ignored,
                label,
                lse,
                factor,
                share,
                upstream,
                SOFTCAP,
                SMOOTHING,
                PRECISION,
            )


def tile(vocab: int) -> tuple[int, int]:
    """(COLUMNS, warps) of a program."""
    columns = min(COLUMNS, next_power_of_2(vocab))
    return columns, max(1, min(MOST_WARPS, columns // 256))


def precision(logits: Tensor) -> str:
    """How tanh is made near 0. Only float32 needs its series: 16 bits do not show it, 64 have bits to lose."""
    return "ieee" if logits.element_size() == 4 else "tf32"


def cross_entropy(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor | None,
    loss: Tensor | None,
    lse: Tensor,
    *,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    smoothing: float,
    gradient: bool,
) -> None:
    """Fill loss and lse (t,), and with `gradient` write the gradient of the raw logits (t, V) over them.

    bias (V,), target (t,) int64. upstream (t,), the gradient of each token's loss, or None for ones. loss None: lse is
    read, not made. loss, lse and upstream are float32, or float64 for float64 logits. Ignored tokens have loss and lse
    0 and no gradient, whatever their logits hold; a label outside the vocabulary makes the loss NaN.
    """
    check_device(logits)
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        raise ValueError(f"logits must have a unit last stride, got strides {logits.stride()}")
    tokens, vocab = logits.shape
    if tokens == 0:
        return
    columns, num_warps = tile(vocab)
    with on(logits.device):
        cross_entropy_kernel[(tokens,)](
            logits,
            None if bias is None else bias.contiguous(),
            target.contiguous(),
            None if upstream is None else upstream.contiguous(),
            loss,
            lse,
            vocab,
            ignore_index,
            logits.stride(0),
            LOSS=loss is not None,
            GRADIENT=gradient,
            SOFTCAP=softcap,
            Z_LOSS=z_loss,
            SMOOTHING=smoothing,
            PRECISION=precision(logits),
            COLUMNS=columns,
            num_warps=num_warps,
            enable_fp_fusion=True,
        )
