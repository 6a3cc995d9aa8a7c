"""Rotary position embedding (Su et al. 2021, eq. 34) of the leading `2 * cos.shape[-1]` dims of each head.

A rotation's inverse is its transpose, so the backward is the same op with ``inverse=True``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype, row_chunks
from pyckpt.ops.direct import ops
from pyckpt.ops.keeping import belongs_to, remembered
from pyckpt.ops.registry import autograd, define
from pyckpt.spec import RopeScaling


def _frequencies(dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    owner = belongs_to(device)
    if owner is None:
        return _make_frequencies(dim, theta, scaling, device)
    return _kept_frequencies(dim, theta, scaling, device, owner)


def _axes(axes: tuple[int, ...], device: torch.device) -> Tensor:
    """(axes, pairs) float64: 1 where a pair goes by an axis, else 0."""
    owner = belongs_to(device)
    return _make_axes(axes, device) if owner is None else _kept_axes(axes, device, owner)


def _make_axes(axes: tuple[int, ...], device: torch.device) -> Tensor:
    numbers = range(max(axes) + 1)
    return _from_host(tuple(float(a == n) for n in numbers for a in axes), device).view(len(numbers), len(axes))


@remembered(16)
def _kept_axes(axes: tuple[int, ...], device: torch.device, owner: Hashable) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_axes(axes, device)


# A list of frequencies is copied to a GPU, and a copy waits for all that is queued there.
@remembered(64)
def _kept_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, device: torch.device, owner: Hashable
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_frequencies(dim, theta, scaling, device)


def _make_frequencies(dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    options = dict(scaling or ())
    if options.get("rope_type") == "given":
        return _from_host(options["frequencies"], device)
    inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    if options.get("rope_type") == "linear":
        inv_freq = inv_freq / options["factor"]
    elif options.get("rope_type") == "llama3":
        inv_freq = _llama3(inv_freq, options)
    return inv_freq


def _from_host(values: tuple[float, ...], device: torch.device) -> Tensor:
    """These as float64."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A CUDA graph can't hold a copy that the host waits for; numbers are arguments of kernels.
        return torch.cat([torch.full((1,), v, dtype=torch.float64, device=device) for v in values])
    return torch.tensor(values, dtype=torch.float64, device=device)


def _llama3(inv_freq: Tensor, options: dict[str, float]) -> Tensor:
    # Llama 3.1: frequencies that make few turns over the old context are divided by `factor`, those that make
    # many are kept, and those between are blended, linearly in the number of turns.
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return inv_freq * (keep + (1.0 - keep) / options["factor"])


def rope_tables(
    positions: Tensor,
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    dtype: torch.dtype = torch.float32,
    axes: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (*positions.shape, dim / 2) in `dtype`, times the scaling's amplitude.

    axes: by which number in positions (..., axes) each pair of dims turns; the tables are (..., dim / 2).
    Angles are products in float64: in float32 an angle at position 10⁶ is off by up to 0.06 rad.
    """
    inv_freq = _frequencies(dim, theta, scaling, positions.device)
    places = positions.to(torch.float64)
    if axes is None:
        angles = places.unsqueeze(-1) * inv_freq
    else:  # of the terms of a sum all but one are 0: it is exact
        angles = places @ (_axes(axes, positions.device) * inv_freq)
    amplitude = dict(scaling or ()).get("amplitude", 1.0)
    cos, sin = angles.cos(), angles.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return cos.to(dtype), sin.to(dtype)


def angle_rows(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as (n, r/2) for the kernels, which give token t of x (..., H, D) the row t % n."""
    lead, half = x.shape[:-2], cos.shape[-1]
    if cos.shape[:-1] != lead[len(lead) - cos.dim() + 1 :]:  # not one table for every leading index
        cos, sin = cos.expand(*lead, half), sin.expand(*lead, half)
    return cos.reshape(-1, half), sin.reshape(-1, half)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool, out: Tensor) -> None:
    acc = acc_dtype(x.dtype)
    half = cos.shape[-1]
    heads, dim = x.shape[-2:]
    rows, rows_out = x.reshape(-1, heads, dim), out.view(-1, heads, dim)
    cos = cos.expand(*x.shape[:-2], half).reshape(-1, 1, half)
    sin = sin.expand(*x.shape[:-2], half).reshape(-1, 1, half)
    for sl in row_chunks(rows):
        a, b = _halves(rows[sl], half, interleaved)
        a, b = a.to(acc), b.to(acc)
        c, s = cos[sl].to(acc), sin[sl].to(acc)
        first, second = a * c, b * c
        first.addcmul_(b, s, value=1.0 if inverse else -1.0)
        second.addcmul_(a, s, value=-1.0 if inverse else 1.0)
        out_a, out_b = _halves(rows_out[sl], half, interleaved)
        out_a.copy_(first)
        out_b.copy_(second)
        if rows.data_ptr() != rows_out.data_ptr() and 2 * half < dim:
            rows_out[sl][..., 2 * half :] = rows[sl][..., 2 * half :]


def _halves(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


@define("rope(Tensor x, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> Tensor", fake=_rope_fake)
def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> Tensor:
    """x (..., H, D) rotated by cos, sin (..., r/2), r <= D.

    Pairs are (i, i + r/2), or (2i, 2i + 1) if `interleaved`. `inverse` turns the other way.
    """
    out = x.new_empty(x.shape)
    _rotate(x, cos, sin, inverse, interleaved, out)
    return out


def _rope_inplace_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> None:
    return None


@define(
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> ()",
    fake=_rope_inplace_fake,
)
def rope_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> None:
    """`rope` in place; x must be viewable as (rows, H, D)."""
    _rotate(x, cos, sin, inverse, interleaved, x)


def _rope_qk_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> None:
    return None


@define(
    "rope_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> ()",
    fake=_rope_qk_fake,
)
def rope_qk_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> None:
    """`rope_` of q (..., H, D) and k (..., Hkv, D), in one launch where the backend has it."""
    _rotate(q, cos, sin, inverse, interleaved, q)
    _rotate(k, cos, sin, inverse, interleaved, k)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, cos, sin, ctx.inverse, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):  # type: ignore[no-untyped-def]
    cos, sin = ctx.saved_tensors
    return ops.rope(dy, cos, sin, not ctx.inverse, ctx.interleaved), None, None, None, None


autograd("rope", _backward, _setup)
