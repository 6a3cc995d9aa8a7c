"""The functional interface: each function checks its inputs and calls one op of the namespace `pyckpt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from pyckpt import errors, vocab_parallel
from pyckpt.attend import shared
from pyckpt.attend.context import ContextParallel, check_context, processes_of
from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.casting import autocast
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.rope import rope_tables
from pyckpt.spec import (
    GATED_MLPS,
    PLAIN_MLPS,
    Window,
    canonical_axes,
    canonical_rope_scaling,
    canonical_window,
    check_frequencies,
)

ops = torch.ops.pyckpt
_REDUCTIONS = ("mean", "sum", "none")
_DROPOUT = errors.Range("in [0, 1)", errors.RATE.holds)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    context: ContextParallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention, without an Sq x Sk matrix in memory, forward or backward.

    Args:
        q: (B, Sq, H, D); k: (B, Sk, Hkv, D); v: (B, Sk, Hkv, Dv), with H a multiple of Hkv; packed, with
            `cu_seqlens`, (T, H, D), (Tk, Hkv, D), (Tk, Hkv, Dv). All float32, float64, bfloat16 or float16.
        causal: query i sees keys up to its own position; aligned bottom-right where Sq != Sk.
        window: (left, right) keys visible beside the query's own, -1 for no limit; an int is (window, 0).
        softcap: scores become softcap * tanh(scores / softcap).
        scale: of the scores, finite; default D ** -0.5.
        sinks: (H,) float, one more score for each row of a head, of a key without a value (gpt-oss); lse
            counts it, and it has a gradient.
        alibi_slopes: (H,), or (B, H) (packed (N, H)), float: slope * distance is taken from each score (Press
            et al. 2022), after the softcap. Constants: they get no gradient.
        dropout: the rate at which probabilities are dropped, in [0, 1); the others grow by 1 / (1 - rate).
        seed: of the dropout, an int of at most 63 bits. What is dropped depends on it and on (sequence, head,
            query position, key position) alone: the same for every tile size, device and recomputation.
        cu_seqlens: (N + 1,) int32, the starts of the packed sequences and, last, T.
        cu_seqlens_k: (N + 1,) int32, the same of the keys and values, and Tk, where they differ. A sequence may have no
            queries, or no keys.
        return_lse: also return lse, the log-sum-exp of each query's scores: (B, H, Sq), packed (H, T);
            float32 (float64 for float64 inputs). Of bfloat16 inputs on a CPU that go to PyTorch's kernel (where the
            processor has AMX, and where the C++ library is not there) it is exact to 1e-4 and not to 1e-6.
        context: the processes that share the sequences: q, k, v are this one's part (`ContextParallel.shard`), all of
            one length, and so are o and lse; cu_seqlens are those of all tokens. Not with alibi_slopes or cu_seqlens_k.
            Gradients are those of the sum of the processes' losses.

    Returns o, (B, Sq, H, Dv), packed (T, H, Dv), in q's dtype (autocast's where that is on), or (o, lse). A query that
    sees no key has o = 0 and lse = -inf. Differentiable in q, k, v and sinks through o and lse.

    Raises ValueError on shapes, dtypes, devices and numbers that do not fit; TypeError for tensors that are none, and
    for options of another type than these.
    """
    errors.check_transforms("pyckpt.attention", q, k, v, sinks)
    q, k, v = autocast(q, k, v)
    _check_attention(q, k, v, packed=cu_seqlens is not None)
    if context is not None:
        check_context(context)
        _check_shared(q, k, alibi_slopes, cu_seqlens_k)
    _check_packed(q, k, cu_seqlens, cu_seqlens_k, processes_of(context))
    _check_heads(q, cu_seqlens, sinks, alibi_slopes)
    dropout, seed = _checked_dropout(dropout, seed)
    errors.check_bool("causal", causal)
    left, right = canonical_window(causal, window)
    cap = _softcap(softcap)
    q, scale = _scaled(q, scale)
    if context is not None:
        heads = (q.shape[-2], k.shape[-2], q.shape[-1])
        attend = DenseAttend(*heads, (left, right), cap, scale, dropout, v_head_dim=v.shape[-1])
        batch, seq = (q.shape[0], q.shape[1]) if cu_seqlens is None else (1, q.shape[0])
        context.check_part(seq)
        read = None
        if cu_seqlens is not None:
            values = cu_seqlens.tolist()
            read = (values, values)
        layout = Layout(batch, seq, cu_seqlens, read)
        drawn = context.seed(seed) if dropout else None
        o, lse = shared.attention(q, k, v, sinks, context.attend(attend), layout, drawn, return_lse)
        return o if lse is None else (o, lse)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    sinks, slopes = (None if t is None else t.contiguous() for t in (sinks, alibi_slopes))
    extras = (sinks, slopes, dropout, seed if dropout else None)
    starts = cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    o, lse = ops.attention_fwd(q, k, v, *starts, left, right, cap, scale, *extras)
    return (o, lse) if return_lse else o


def on_meta(*tensors: Any) -> bool:
    """All have shapes and no values, so that there are none to check."""
    return all(isinstance(t, Tensor) and t.is_meta for t in tensors)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    rank = 3 if packed else 4
    shape = "(T, H, D), packed, since cu_seqlens is given" if packed else "(B, S, H, D)"
    for name, t in (("q", q), ("k", k), ("v", v)):
        errors.check_tensor(name, t)
        if t.dim() != rank:
            raise ValueError(f"{name} must be {shape}, got shape {tuple(t.shape)}")
        _check_floating(name, t)
        if t.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {t.dtype}, expected q's, {q.dtype}; convert one with .to(...)")
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}, q is on {q.device}; move one with .to(...)")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v differ in more than their last dim: {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head dim {q.shape[-1]} and k has {k.shape[-1]}; they must be equal")
    if min(q.shape[-2], q.shape[-1], v.shape[-1]) < 1:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}; expected at least one head and one head dim"
        )
    if q.shape[-2] % max(1, k.shape[-2]) or k.shape[-2] == 0:
        raise ValueError(f"q has {q.shape[-2]} heads, which is no multiple of the {k.shape[-2]} key/value heads")
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]} and k has {k.shape[0]}; they must be equal")


def _check_shared(q: Tensor, k: Tensor, alibi_slopes: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    for name, given in (("alibi_slopes", alibi_slopes), ("cu_seqlens_k", cu_seqlens_k)):
        if given is not None:
            raise ValueError(f"context goes with no {name}; leave one of them out")
    if q.shape[:-2] != k.shape[:-2] or q.shape[:-2].numel() == 0:
        raise ValueError(
            f"with context q and k are the same tokens, at least one, got shapes {tuple(q.shape)} and {tuple(k.shape)}"
        )


def _check_packed(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, processes: int = 1
) -> None:
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k is given without cu_seqlens, the starts of the queries")
        return
    if not on_meta(cu_seqlens, q):
        errors.check_cu_seqlens(cu_seqlens, q.shape[0] * processes, q.device)
    if cu_seqlens_k is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"packed q has {q.shape[0]} tokens and k has {k.shape[0]}; they differ: give cu_seqlens_k")
        return
    if not on_meta(cu_seqlens_k, k):
        errors.check_cu_seqlens(cu_seqlens_k, k.shape[0], k.device, "cu_seqlens_k")
    if cu_seqlens_k.shape != cu_seqlens.shape:
        counts = cu_seqlens_k.numel() - 1, cu_seqlens.numel() - 1
        raise ValueError(f"cu_seqlens_k has {counts[0]} sequences and cu_seqlens {counts[1]}; they must be as many")


def _check_heads(q: Tensor, cu_seqlens: Tensor | None, sinks: Tensor | None, slopes: Tensor | None) -> None:
    heads = q.shape[-2]
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    allowed: dict[str, list[tuple[int, ...]]] = {"sinks": [(heads,)], "alibi_slopes": [(heads,), (batch, heads)]}
    for name, t in (("sinks", sinks), ("alibi_slopes", slopes)):
        if t is None:
            continue
        errors.check_tensor(name, t)
        if not errors.has_shape(t, *allowed[name]):
            shapes = " or ".join(str(shape) for shape in allowed[name])
            raise ValueError(f"{name} must have shape {shapes}, one for each query head, got {tuple(t.shape)}")
        _check_floating(name, t)
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device}, q is on {q.device}; move one with .to(...)")
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes get no gradient here; give alibi_slopes.detach()")


def _checked_dropout(dropout: float, seed: Any) -> tuple[float, Any]:
    rate = errors.number("dropout", dropout, _DROPOUT)
    if seed is None:
        if rate:
            raise ValueError(f"dropout={rate} needs a seed: pass seed=..., an int, a new one for every step and layer")
        return rate, None
    if isinstance(seed, torch.SymInt):  # nothing is known of it yet
        return rate, seed
    found = errors.as_int(seed)
    if found is None:
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= found < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {found}")
    return rate, found


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """cross_entropy(softcap(x Wᵀ + bias), target) without ever holding the logits of all tokens.

    Args:
        x: (..., D). weight: (V, D), in x's dtype; a DTensor with Shard(0) where its words are dealt out to processes
            (tensor parallelism), which then take part with the same x and target. bias: (V,).
        target: (...) int64, in [0, V) or `ignore_index`.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" (a loss for each token).
        softcap: logits become softcap * tanh(logits / softcap).
        z_loss: coefficient of logsumexp(logits)² (PaLM, section 5), added to each token's loss.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        token_weight: (...) floating, multiplies each token's loss, its z-loss too; "mean" is then their weighted mean,
            divided by the sum of the weights. A constant: it gets no gradient.
        class_weight: (V,) floating, the weight of each label, `weight` of torch.nn.functional.cross_entropy. Not
            with label smoothing. With `token_weight` the two are multiplied.
        recompute: False: with "mean" and "sum" the gradients are computed in the forward, three products as with the
            logits stored; those of x and of the weight, the latter in float32, live until the backward. True, and with
            "none" always: the backward makes the logits again, a fourth product, and only 4 bytes a token are kept.
            With fewer tokens than words, and no label smoothing, it goes over blocks of the vocabulary and then needs
            no float32 gradient of the weight, but one of x.

    Returns a float32 scalar (float64 for float64 inputs), or the shape of `target` for "none". A "mean" over no targets
    is NaN, as in PyTorch. Differentiable in x, weight and bias.

    Raises ValueError on shapes, dtypes, devices, numbers and labels that do not fit; labels out of range are a
    device-side assertion on CUDA. TypeError for tensors that are none, and for options of another type.
    """
    errors.check_transforms("pyckpt.linear_cross_entropy", x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    cap, z_loss, label_smoothing = check_loss_options(reduction, softcap, z_loss, label_smoothing)
    ignore_index = errors.integer("ignore_index", ignore_index)
    _check_loss(x, weight, target, bias, ignore_index)
    weights = loss_weights(
        target, token_weight, class_weight, weight.shape[0], ignore_index, label_smoothing, acc_dtype(x.dtype)
    )
    if any(map(vocab_parallel.is_dealt_out, (x, weight, bias))):
        vocab_parallel.check_layout(weight, bias, label_smoothing)
        options = (ignore_index, cap, z_loss, weights, reduction)
        return vocab_parallel.linear_cross_entropy(x, weight, bias, target, *options)
    x, weight = _with_a_dim(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    grad = torch.is_grad_enabled() and reduction != "none" and not recompute
    need = [grad and t is not None and t.requires_grad for t in (flat, weight, bias)]
    loss = ops.linear_cross_entropy_fwd(
        flat,
        weight,
        bias,
        target.reshape(-1),
        ignore_index,
        cap,
        z_loss,
        label_smoothing,
        None if weights is None else weights.reshape(-1),
        reduction,
        *need,
    )[0]
    return loss.view(target.shape) if reduction == "none" else loss


def check_loss_options(
    reduction: str, softcap: float | None, z_loss: float, label_smoothing: float
) -> tuple[float, float, float]:
    """softcap (0.0: none), z_loss and label_smoothing as floats. Raises for what a loss cannot be made with."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} does not exist; expected one of {', '.join(_REDUCTIONS)}")
    return _softcap(softcap), *check_loss_numbers(label_smoothing, z_loss)


def check_loss_numbers(label_smoothing: float, z_loss: float) -> tuple[float, float]:
    """z_loss and label_smoothing as floats. Raises for what a loss cannot be made with."""
    plain = "add the loss of plain PyTorch"
    return (
        errors.number("z_loss", z_loss, errors.FINITE, plain),
        errors.number("label_smoothing", label_smoothing, errors.SHARE, "take the loss of plain PyTorch"),
    )


def loss_weights(
    target: Tensor,
    token_weight: Tensor | None,
    class_weight: Tensor | None,
    vocab: int,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """What multiplies each token's loss, in target's shape and in `dtype`, 0 where it is ignored; None: ones."""
    for name, t, shape in (("token_weight", token_weight, target.shape), ("class_weight", class_weight, (vocab,))):
        if t is not None:
            _check_weights(name, t, tuple(shape), target.device)
    if class_weight is not None and label_smoothing:
        raise ValueError(
            f"class_weight goes with no label_smoothing, got {label_smoothing!r}: each class would weigh its share of "
            "the smoothed labels, which needs another pass over the logits; leave one out"
        )
    if token_weight is None and class_weight is None:
        return None
    ignored = target == ignore_index
    weights = None if token_weight is None else token_weight.to(dtype)
    if class_weight is not None:  # multiplied in `dtype`: float16 holds no product of two small ones
        of_labels = class_weight[target.masked_fill(ignored, 0)].to(dtype)
        weights = of_labels if weights is None else weights * of_labels
    assert weights is not None
    return weights.masked_fill(ignored, 0.0)


def _with_a_dim(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and the weight, of no dims with one of zeros: the logits are 0, or the bias."""
    return (F.pad(x, (0, 1)), F.pad(weight, (0, 1))) if x.shape[-1] == 0 else (x, weight)


def _check_weights(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    errors.check_tensor(name, t)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape}")
    _check_floating(name, t)
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the labels are on {device}; move one with .to(...)")
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f'{name} gets no gradient: pass {name}.detach(), or multiply the losses of reduction="none"')


def _check_loss(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
) -> None:
    for name, t in (("x", x), ("weight", weight), ("target", target)):
        errors.check_tensor(name, t)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be (..., D) and weight (V, D), got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    _check_floating("x", x)
    errors.check_matches(x, weight, "weight")
    if bias is not None:
        _check_vector("bias", bias, weight.shape[0], x)
    if weight.shape[0] == 0:
        raise ValueError(f"weight has no rows: expected (V, D) with at least one word, got shape {tuple(weight.shape)}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target has shape {tuple(target.shape)}, expected {tuple(x.shape[:-1])}, one for each token")
    if not on_meta(target, x):
        errors.check_labels(target, weight.shape[0], ignore_index, x.device)


@overload
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-5, *, residual: None = None) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = 1e-5, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x * (mean(x²) + eps)^-½ * weight over the last dim, in float32 or better (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: (..., D), float32, float64, bfloat16 or float16. weight: (D,), of any of these; None for ones.
        eps: a number >= 0; None: the machine epsilon of the dtype that it is computed in, as PyTorch's rms_norm has it.
        residual: of x's shape and dtype; what is normed is then x + residual, in one pass over memory.

    Returns y, in x's shape and dtype; with `residual` (y, x + residual). Differentiable in all tensors.

    Raises ValueError on shapes, dtypes, devices and numbers that do not fit, TypeError for tensors and numbers that are
    none.
    """
    _check_norm(x, weight, residual=residual)
    errors.check_transforms("pyckpt.rms_norm", x, weight, residual)
    eps = torch.finfo(acc_dtype(x.dtype)).eps if eps is None else _eps(eps)
    if x.shape[-1] == 0:
        return _of_nothing(F.rms_norm, x, residual, weight, eps)
    if residual is None:
        return ops.rms_norm_fwd(x, weight, eps)[0]
    return ops.add_rms_norm_fwd(x, residual, weight, eps)[:2]


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean(x)) * (var(x) + eps)^-½ * weight + bias over the last dim, in float32 or better (Ba et al. 2016).

    Args:
        x: (..., D), float32, float64, bfloat16 or float16. weight, bias: (D,), of any of these; None for 1 and 0.
        eps: a number >= 0.
        residual: of x's shape and dtype; what is normed is then x + residual, in one pass over memory.

    Returns y, in x's shape and dtype; with `residual` (y, x + residual). Differentiable in all tensors.

    Raises ValueError on shapes, dtypes, devices and numbers that do not fit, TypeError for tensors and numbers that are
    none.
    """
    _check_norm(x, weight, bias, residual)
    errors.check_transforms("pyckpt.layer_norm", x, weight, bias, residual)
    eps = _eps(eps)
    if x.shape[-1] == 0:
        return _of_nothing(F.layer_norm, x, residual, weight, bias, eps)
    if residual is None:
        return ops.layer_norm_fwd(x, weight, bias, eps)[0]
    return ops.add_layer_norm_fwd(x, residual, weight, bias, eps)[:2]


def _check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    errors.check_tensor("x", x)
    _check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must be (..., D), got a scalar")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            _check_vector(name, t, x.shape[-1], x)
    if residual is not None:
        errors.check_tensor("residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            raise ValueError(
                f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, expected x's "
                f"{tuple(x.shape)} {x.dtype} on {x.device}"
            )


def _of_nothing(norm: Any, x: Tensor, residual: Tensor | None, *parameters: Any) -> Any:
    """The norm of rows (..., 0), which kernels do not count."""
    x = x if residual is None else x + residual
    y = norm(x, (0,), *parameters)
    return y if residual is None else (y, x)


def _eps(value: Any) -> float:
    if value is None:
        raise ValueError("eps=None has no meaning for a LayerNorm, as in PyTorch; give a number >= 0, as 1e-5")
    return errors.number("eps", value, errors.NOT_NEGATIVE, "norm by plain PyTorch")


def rope(
    x: Tensor,
    positions: Tensor | None = None,
    *,
    theta: float = 10000.0,
    scaling: dict[str, Any] | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    axes: Sequence[int] | None = None,
) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34) of the leading dims of each head.

    Args:
        x: (B, S, H, D), or packed (T, H, D), float32, float64, bfloat16 or float16.
        positions: (S,), (1, S) or (B, S), packed (T,) or (1, T), of an integer dtype; default 0, 1, ... .
        theta: the base: pair i of r dims turns by position * theta ** (-2i / r). Angles are computed in float64.
        scaling: a dict as in Hugging Face configs, of rope_type "linear" or "llama3"; or "given", with `frequencies`,
            real numbers, one for each pair, in place of the powers of theta, and `amplitude`, which multiplies cos
            and sin (default 1).
        rotary_dim: r, how many leading dims are turned; even, default D. The others stay as they are.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J; else (i, i + r/2), as in Hugging Face's Llama.
        axes: positions have one more dim, of several axes (Qwen2-VL's time, height and width; rows and columns of an
            image), and each pair turns by one: its number, for each of the r / 2 pairs.

    Returns y, in x's shape and dtype. Differentiable in x.

    Raises ValueError on shapes, dtypes, devices, numbers and scalings that do not fit, TypeError for tensors that are
    none and options of another type.
    """
    errors.check_tensor("x", x)
    errors.check_transforms("pyckpt.rope", x)
    _check_floating("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (B, S, H, D) or (T, H, D), got shape {tuple(x.shape)}")
    dim = x.shape[-1] if rotary_dim is None else errors.integer("rotary_dim", rotary_dim)
    if dim <= 0 or dim % 2 or dim > x.shape[-1]:
        raise ValueError(f"the rotary dim must be even and at most the head dim {x.shape[-1]}, got {dim}")
    of_pairs, lead = canonical_axes(axes, dim, "axes"), tuple(x.shape[:-2])
    if positions is None:  # the same on all axes
        positions, of_pairs = torch.arange(x.shape[-3], device=x.device), None
    errors.check_tensor("positions", positions)
    if positions.device != x.device:
        raise ValueError(f"positions are on {positions.device}, x is on {x.device}; move one with .to(...)")
    last = () if of_pairs is None else (max(of_pairs) + 1,)
    whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    if not (whole and errors.has_shape(positions, (*lead, *last), (lead[-1], *last), (1, lead[-1], *last))):
        raise ValueError(
            f"positions must be ints of shape {(*lead, *last)} or {(lead[-1], *last)}, got {tuple(positions.shape)} "
            f"{positions.dtype}"
        )
    if not errors.has_shape(positions, (*lead, *last), (lead[-1], *last)):
        positions = positions.reshape(-1, *last)  # one row, for every sequence
    theta = errors.number("theta", theta, errors.POSITIVE, "turn x by plain PyTorch")
    errors.check_bool("interleaved", interleaved)
    canonical = canonical_rope_scaling(scaling, theta, "scaling", "theta")
    check_frequencies(canonical, dim, "scaling")
    if x.shape[-2] == 0:
        return x.clone()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = rope_tables(positions, dim, theta, canonical, dtype, of_pairs)
    return ops.rope(x, cos, sin, False, interleaved)


def glu(gate: Tensor, up: Tensor, kind: str = "swiglu") -> Tensor:
    """φ(gate) * up, a gated linear unit (Shazeer 2020).

    φ: SiLU ("swiglu"), GELU ("geglu"), its tanh form ("geglu_tanh").
    gate, up: (..., F), of one shape and dtype: float32, float64, bfloat16 or float16. Returns y of both, differentiable
    in both. Raises ValueError for an unknown kind, and for shapes, dtypes and devices that do not fit; TypeError for
    tensors that are none.
    """
    if kind not in GATED_MLPS:
        raise ValueError(f"kind={kind!r} is no gated activation; expected one of {', '.join(GATED_MLPS)}")
    _check_pre_activation("gate", gate)
    _check_pre_activation("up", up)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate and up differ: {tuple(gate.shape)} {gate.dtype} on {gate.device} and {tuple(up.shape)} "
            f"{up.dtype} on {up.device}"
        )
    errors.check_transforms("pyckpt.glu", gate, up)
    if gate.shape[-1] == 0:  # rows that kernels do not count
        return gate * up
    return ops.glu_fwd(gate, up, kind)


def activation(x: Tensor, kind: str = "gelu") -> Tensor:
    """GELU ("gelu", Hendrycks and Gimpel 2016), its tanh form ("gelu_tanh"), or squared ReLU ("relu2", So et al. 2021).

    x: (..., F), float32, float64, bfloat16 or float16. Returns y of the same, differentiable in x. Raises ValueError
    for an unknown kind, and for a shape or dtype that does not fit; TypeError for what is no tensor.
    """
    if kind not in PLAIN_MLPS:
        advice = "; a gated one is pyckpt.glu" if kind in GATED_MLPS else ""
        raise ValueError(f"kind={kind!r} is no plain activation; expected one of {', '.join(PLAIN_MLPS)}{advice}")
    _check_pre_activation("x", x)
    errors.check_transforms("pyckpt.activation", x)
    if x.shape[-1] == 0:
        return x.clone()
    return ops.act_fwd(x, kind)


def _check_pre_activation(name: str, t: Tensor) -> None:
    errors.check_tensor(name, t)
    _check_floating(name, t)
    if t.dim() == 0:
        raise ValueError(f"{name} must be (..., F), got a scalar")


def _check_floating(name: str, t: Tensor) -> None:
    if t.dtype not in errors.FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {t.dtype}, expected one of {errors.names(errors.FLOAT_DTYPES)}")


def _check_vector(name: str, t: Tensor, width: int, x: Tensor) -> None:
    errors.check_tensor(name, t)
    if tuple(t.shape) != (width,):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({width},)")
    _check_floating(name, t)
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x is on {x.device}; move one with .to(...)")


def _scaled(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a scale above 0 with the same scores: -inf of what is hidden, times 0 or less, would hide nothing."""
    if scale is None:
        return q, float(q.shape[-1] ** -0.5)
    scale = errors.number("scale", scale, errors.SCALE, "multiply q by it and give scale=1.0")
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


def _softcap(value: float | None) -> float:
    return 0.0 if value is None else errors.number("softcap", value, errors.SOFTCAP, "cap by plain PyTorch")
