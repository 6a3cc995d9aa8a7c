"""What every op computes, written down plainly: the ground truth of the tests and of the kernels to come.

Ordinary PyTorch, a formula a function, differentiated by ordinary autograd and exact in float64. Nothing is
fused, tiled or kept small: attention makes its Sq x Sk matrix and the loss its T x V logits. The ops do not
import this.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# --- attention ----------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    keep: Any = None,
    keep_factor: float = 1.0,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale) v, with its log-sum-exp (Vaswani et al. 2017, eq. 1). Causal is window (-1, 0).

    q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv); returns o (B, Sq, H, Dv) and lse (B, H, Sq).
    Packed, with `cu_seqlens`, and `cu_seqlens_k` where keys have others: q (T, H, D) and so on, o (T, H, Dv), lse
    (H, T). Query i of Sq stands at
    position i + Sk - Sq (with `top_left`, at i) and sees the keys from `left` before it to `right` after it, -1 for
    no limit. One that sees none has o = 0, lse = -inf. Softcap: Gemma 2, section 2; shared heads: Ainslie et al. 2023;
    `alibi_slopes` (H,) or (B, H): Press et al. 2022; `sinks` (H,), scores of a key without a value: gpt-oss.
    `keep` (B, H, Sq, Sk) are the probabilities that dropout keeps, times `keep_factor`; packed, the list of each
    sequence's (1, H, s, s).
    """
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        of_keys = lengths if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
        shared: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale, "keep_factor": keep_factor}
        shared["top_left"] = top_left
        parts = [
            attention(
                *(t.unsqueeze(0) for t in part),
                **shared,
                sinks=sinks,
                alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[i],
                keep=None if keep is None else keep[i],
            )
            for i, part in enumerate(zip(q.split(lengths), k.split(of_keys), v.split(of_keys), strict=True))
        ]
        return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sq, sk = q.shape[1], k.shape[1]
    shift = 0 if top_left else sk - sq
    if alibi_slopes is not None:
        distance = (torch.arange(sk) - (torch.arange(sq) + shift).unsqueeze(1)).abs().to(scores)
        scores = scores - alibi_slopes.to(scores).view(-1, q.shape[2], 1, 1) * distance
    visible = visible_keys(sq, sk, window, shift).to(q.device)
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(scores).view(-1, 1).expand_as(lse))
    # exp(-inf - -inf) would be NaN: a query that sees nothing gets 0 for its lse, and p = exp(-inf) = 0.
    p = torch.exp(scores - lse.masked_fill(~visible.any(-1), 0.0).unsqueeze(-1))
    if keep is not None:
        p = p * keep.to(p.dtype) * keep_factor
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def merge(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) over two sets of keys from those over each (Rabe & Staats 2021, section 2): shares exp(lse_i) / Σ.

    o (B, S, H, D) with lse (B, H, S), or (T, H, D) with (H, T).
    """
    total = torch.logaddexp(lse, part_lse)
    shares = torch.softmax(torch.stack([lse, part_lse]), 0).nan_to_num(0.0)  # of two sets without keys: none
    first, second = shares.transpose(-1, -2).unsqueeze(-1)
    return first * o + second * part_o, total


def visible_keys(sq: int, sk: int, window: tuple[int, int], shift: int | None = None) -> Tensor:
    """Boolean (Sq, Sk): which keys each query sees. The first stands at key `shift`, or the last at the last one."""
    left, right = window
    distance = torch.arange(sk) - (torch.arange(sq) + (sk - sq if shift is None else shift)).unsqueeze(1)
    return ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))


# --- norms --------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight (Zhang & Sennrich 2019, eq. 4). x (..., D), weight (D,)."""
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016, eq. 4). x (..., D), others (D,)."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


# --- rotary position embedding ------------------------------------------------------------------------------


def rope(
    x: Tensor,
    positions: Tensor,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Dims taken in pairs as complex numbers, times exp(i * position * θ_j) (Su et al. 2021, eq. 12 and 15).

    x (..., S, H, D), positions (..., S). The first r = `rotary_dim` dims are turned: pairs (j, j + r/2), or
    (2j, 2j + 1) if `interleaved`; θ_j = theta^(-2j/r).
    """
    r = x.shape[-1] if rotary_dim is None else rotary_dim
    j = torch.arange(r // 2, dtype=torch.float64)
    angle = (positions.double().unsqueeze(-1) * theta ** (-2.0 * j / r)).unsqueeze(-2)
    real, imag = (x[..., 0:r:2], x[..., 1:r:2]) if interleaved else (x[..., : r // 2], x[..., r // 2 : r])
    turned = torch.complex(real, imag) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        rotated = torch.view_as_real(turned).flatten(-2)
    else:
        rotated = torch.cat([turned.real, turned.imag], dim=-1)
    return torch.cat([rotated, x[..., r:]], dim=-1)


# --- activations --------------------------------------------------------------------------------------------


def phi(x: Tensor, kind: str) -> Tensor:
    """The nonlinearity of an MLP kind, pointwise."""
    if kind == "swiglu":  # SiLU: Hendrycks & Gimpel 2016, section 2; in the MLP: Shazeer 2020, eq. 6
        return x * torch.sigmoid(x)
    if kind in ("geglu", "gelu"):  # x Φ(x): Hendrycks & Gimpel 2016, section 2
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if kind in ("geglu_tanh", "gelu_tanh"):  # its approximation, the same section
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    if kind == "relu2":  # So et al. 2021, section 4
        return torch.relu(x) ** 2
    raise ValueError(f"kind={kind!r} does not exist")


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """φ(gate) * up (Shazeer 2020, eq. 6)."""
    return phi(gate, kind) * up


def activation(x: Tensor, kind: str) -> Tensor:
    """φ(x)."""
    return phi(x, kind)


# --- loss ---------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
) -> Tensor:
    """-Σ_c w_c log p_c + z_loss * log²Z of each token, p = softmax(x Wᵀ + b), Z its normaliser.

    w is 1 - e at the label, plus e / V everywhere (label smoothing e: Szegedy et al. 2016, section 7; z-loss:
    PaLM, section 5). x (T, D), weight (V, D), target (T,). Tokens whose target is `ignore_index` count for
    nothing; "mean" is over the others. token_weight (T,) multiplies the losses; the mean is then over its sum.
    """
    logits = x @ weight.t() if bias is None else x @ weight.t() + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
    keep = target != ignore_index
    one_hot = torch.nn.functional.one_hot(target.masked_fill(~keep, 0), weight.shape[0]).to(x.dtype)
    wanted = (1.0 - label_smoothing) * one_hot + label_smoothing / weight.shape[0]
    losses = -(wanted * (logits - log_z)).sum(-1) + z_loss * log_z.squeeze(-1) ** 2
    counts = keep.to(losses.dtype) if token_weight is None else token_weight.masked_fill(~keep, 0.0)
    losses = losses.masked_fill(~keep, 0.0) * counts
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()
