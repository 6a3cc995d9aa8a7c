"""Cross-entropy of a linear head, chunked over tokens: the logits exist one chunk at a time, never T x V.

What a chunk's logits become is a `Head`'s business: PyTorch's kernels here, one Triton kernel in
`linear_cross_entropy_triton`.

For token i with logits z = softcap(x W^T + b), lse = logsumexp(z), label t and smoothing e:

    loss_i = lse - (1 - e) z_t - e mean(z) + z_loss * lse²

("mean" divides by the number of labels that are not `ignore_index`; a token's weight multiplies its loss, and the mean
then divides by their sum.) With "mean" and "sum" the gradients are
computed in the forward, while a chunk's logits exist: three products of T x D x V, as storing the logits
would take. They are those of the sum, and the backward scales them: divided by the number of labels sooner,
float16 gradients would vanish before a loss scale can lift them. Where the forward is asked for none, the backward
makes the logits again from lse, a fourth product, and keeps no gradient in between. It has to with "none", where the
upstream gradient differs by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.direct import ops
from pyckpt.ops.products import add_product_, product
from pyckpt.ops.registry import autograd, define
from pyckpt.ops.vocab_blocks import bias_dtype, scaled
from pyckpt.ops.vocab_blocks import gradients as gradients_by_words

# Logits of a chunk. On CUDA 512 MiB of bf16, and twice that where chunks sum up dw in float32: each of them reads and
# writes all of it, 4 GB at Llama 3's vocabulary.
_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
_SUMMING_FACTOR = {"cpu": 1, "cuda": 2}
_MIN_CHUNK_TOKENS = 256

_ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float softcap, float z_loss, "
    "float label_smoothing"
)


def _grad_buffers(
    x: Tensor, weight: Tensor, bias: Tensor | None, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    dx = x.new_empty(x.shape if need_dx else 0)
    dw = weight.new_zeros(weight.shape if need_dw else 0, dtype=acc)
    db = weight.new_zeros(weight.shape[0] if need_db and bias is not None else 0, dtype=acc)
    return dx, dw, db


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    token_weight: Tensor | None,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=acc)
    return (
        loss,
        x.new_empty(target.shape, dtype=acc),
        *_grad_buffers(x, weight, bias, need_dx, need_dw, need_db),
    )


@define(
    f"linear_cross_entropy_fwd({_ARGS}, Tensor? token_weight, str reduction, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
)
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    token_weight: Tensor | None,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, dx, dw, db): x (T, D), weight (V, D), bias (V,), target (T,) int64; lse is 0 where ignored.

    token_weight (T,), in lse's dtype and 0 where ignored, multiplies each token's loss; "mean" then divides by its
    sum. It gets no gradient.

    Gradients are of the sum of the tokens' losses, also with "mean", and of weights over `unit_of` them; dw and db in
    the accumulation dtype; those
    not needed are empty. None may be needed with reduction "none". If none is, `linear_cross_entropy_bwd` makes them.
    """
    head = _TorchHead(weight, bias, ignore_index, softcap, z_loss, label_smoothing)
    return forward(head, x, target, token_weight, reduction, need_dx, need_dw, need_db)


def _tile_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    dloss: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    return x.new_empty(target.shape, dtype=acc_dtype(x.dtype))


@define(
    f"linear_cross_entropy_tile_({_ARGS}, Tensor? dloss, Tensor(a!)? dx, Tensor(b!)? dw, Tensor(c!)? db) -> Tensor",
    fake=_tile_fake,
)
def linear_cross_entropy_tile_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    dloss: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    """The losses (t,) of some of the tokens. Gradients of their sum: dx is written, dw and db added to, where given.

    dloss (t,) weighs each token's loss in the gradients; None: ones. dw (V, D) and db (V,) are in the accumulation
    dtype: one for all tiles of a sequence.
    """
    head = _TorchHead(weight, bias, ignore_index, softcap, z_loss, label_smoothing)
    return tile(head, x, target, dloss, dx, dw, db)


def _bwd_fake(
    dloss: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = _grad_buffers(x, weight, bias, need_dx, need_dw, need_db)
    return dx, dw.to(weight.dtype), db.to(bias_dtype(weight, bias))


@define(
    f"linear_cross_entropy_bwd(Tensor dloss, Tensor lse, {_ARGS}, bool need_dx, bool need_dw, bool need_db) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
)
def linear_cross_entropy_bwd(
    dloss: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) in the dtypes of x, weight and bias; empty where not needed. Makes the logits again, chunk by chunk.

    dloss (T,) is the gradient of each token's loss, or () that of all tokens' losses.
    """
    head = _TorchHead(weight, bias, ignore_index, softcap, z_loss, label_smoothing)
    return backward(head, dloss, lse, x, target, need_dx, need_dw, need_db)


# --- over chunks, for every backend -------------------------------------------------------------------------


_H = TypeVar("_H", bound="Head")


class Head:
    """The head's weights and the loss's options, and what one chunk of tokens becomes."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        softcap: float,
        z_loss: float,
        label_smoothing: float,
    ) -> None:
        self.weight, self.bias, self.ignore_index = weight, bias, ignore_index
        self.softcap, self.z_loss, self.smoothing = softcap, z_loss, label_smoothing

    def part(self: _H, words: slice, ignore_index: int) -> _H:
        """The head of some of the words, for gradients alone. A label outside of them is none of theirs."""
        if self.smoothing:
            raise ValueError("a part of the words does not know how many the smoothed labels are spread over")
        bias = None if self.bias is None else self.bias[words]
        return type(self)(self.weight[words], bias, ignore_index, self.softcap, self.z_loss, 0.0)

    def chunk(
        self, x: Tensor, target: Tensor, upstream: Tensor | None, loss: Tensor | None, lse: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Fill loss and lse (t,); the logits' gradient (t, V), in the products' dtype and in the one to sum it in.

        Without `loss`, lse is read. `upstream` (t,) is the gradient of each loss, None for ones.
        """
        raise NotImplementedError


def forward(
    head: Head,
    x: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `linear_cross_entropy_fwd` gives."""
    grads = _Gradients.of(head, x, need_dx, need_dw, need_db)
    losses, lse = _losses(
        head, x, target, grads, None if token_weight is None else token_weight / unit_of(token_weight)
    )
    if token_weight is not None:
        losses *= token_weight
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / counted(target, token_weight, head.ignore_index)
    return loss, lse, *grads.results()


def unit_of(token_weight: Tensor) -> Tensor:
    """A power of two near the largest of the weights, in size.

    Gradients that are made before a loss is scaled are of weights in this unit: those of 1 / (tokens of a global batch)
    are nothing in float16, and no scale brings them back.
    """
    if not token_weight.numel():
        return token_weight.new_ones(())
    most = token_weight.abs().amax()
    return torch.where((most > 0) & most.isfinite(), most, 1.0).log2().floor().exp2()


def counted(target: Tensor, token_weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: the number of labels that are not ignored, or the sum of the weights."""
    return (target != ignore_index).sum() if token_weight is None else token_weight.sum()


def tile(
    head: Head,
    x: Tensor,
    target: Tensor,
    dloss: Tensor | None,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    """What `linear_cross_entropy_tile_` gives."""
    return _losses(head, x, target, _Gradients(head, dx, dw, db, dw is not None), dloss)[0]


def _losses(
    head: Head, x: Tensor, target: Tensor, grads: _Gradients, dloss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's loss and lse; fills `grads` with the gradients of the losses' sum, weighed by `dloss`."""
    losses, lse = (x.new_empty(target.shape, dtype=acc_dtype(x.dtype)) for _ in range(2))
    upstream = None if dloss is None else dloss.to(lse.dtype)
    for sl in _chunks(x, head.weight, grads.need_dw):
        weights = None if upstream is None else upstream[sl]
        # Under no name, which would hold it beside the next chunk's logits.
        grads.add(sl, x[sl], *head.chunk(x[sl], target[sl], weights, losses[sl], lse[sl], grads.wanted))
    return losses, lse


def backward(
    head: Head, dloss: Tensor, lse: Tensor, x: Tensor, target: Tensor, need_dx: bool, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_cross_entropy_bwd` gives."""
    dloss = dloss.to(lse.dtype)
    # The gradients are of the sum, as in the forward, and one factor for all tokens comes last.
    upstream, factor = (dloss, None) if dloss.dim() else (None, dloss.view(1))
    tokens, vocab = x.shape[0], head.weight.shape[0]
    if need_dw and tokens < vocab and not head.smoothing:
        elements = _of_device(_CHUNK_ELEMENTS, x.device)
        return gradients_by_words(head, upstream, factor, lse, x, target, need_dx, need_db, elements)
    grads = _Gradients.of(head, x, need_dx, need_dw, need_db)
    for sl in _chunks(x, head.weight, need_dw):
        weights = None if upstream is None else upstream[sl]
        grads.add(sl, x[sl], *head.chunk(x[sl], target[sl], weights, None, lse[sl], True))
    dtypes = x.dtype, head.weight.dtype, bias_dtype(head.weight, head.bias)
    dx, dw, db = (scaled(g, factor, dtype) for g, dtype in zip(grads.results(), dtypes, strict=True))
    return dx, dw, db


def _of_device(table: dict[str, int], device: torch.device) -> int:
    return table.get(device.type, table["cuda"])


def _chunks(x: Tensor, weight: Tensor, sums: bool) -> Iterator[slice]:
    """The tokens of each chunk; `sums`: each adds to the weight's gradient."""
    tokens, vocab = x.shape[0], weight.shape[0]
    elements = _of_device(_CHUNK_ELEMENTS, x.device) * (_of_device(_SUMMING_FACTOR, x.device) if sums else 1)
    most = max(_MIN_CHUNK_TOKENS, elements // vocab)
    chunks = -(-tokens // most)
    step = -(-tokens // max(1, chunks))  # of equal size: a short last one would run its products below speed
    for start in range(0, tokens, step or 1):
        yield slice(start, min(start + step, tokens))


class _Gradients:
    """Gradients of the whole loss (None: not wanted), filled chunk by chunk.

    dw where there is no sum yet is the first chunk's product: at Llama 3's vocabulary it is 2 GB, which need not be
    cleared, nor read to be added to.
    """

    def __init__(self, head: Head, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, need_dw: bool) -> None:
        self.head, self.dx, self.dw, self.db, self.need_dw = head, dx, dw, db, need_dw
        self.wanted = need_dw or dx is not None or db is not None

    @staticmethod
    def of(head: Head, x: Tensor, need_dx: bool, need_dw: bool, need_db: bool) -> _Gradients:
        dx = x.new_empty(x.shape) if need_dx else None
        biased = need_db and head.bias is not None
        db = head.weight.new_zeros(head.weight.shape[0], dtype=acc_dtype(x.dtype)) if biased else None
        return _Gradients(head, dx, None, db, need_dw)

    def add(self, sl: slice, x: Tensor, dz: Tensor, exact: Tensor) -> None:
        if self.db is not None:
            self.db += exact.sum(0, dtype=self.db.dtype)
        if self.dx is not None:
            torch.mm(dz, self.head.weight, out=self.dx[sl])
        if not self.need_dw:
            return
        if self.dw is None:
            self.dw = product(dz.t(), x, acc_dtype(x.dtype))
        else:
            add_product_(self.dw, dz.t(), x)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dw, db; those not wanted are empty."""
        acc, weight = acc_dtype(self.head.weight.dtype), self.head.weight
        if self.need_dw and self.dw is None:  # there is no token
            self.dw = weight.new_zeros(weight.shape, dtype=acc)
        dx = weight.new_empty(0) if self.dx is None else self.dx
        dw, db = (weight.new_empty(0, dtype=acc) if g is None else g for g in (self.dw, self.db))
        return dx, dw, db


# --- PyTorch's kernels --------------------------------------------------------------------------------------


class _TorchHead(Head):
    """`Head` in PyTorch's kernels."""

    def chunk(
        self, x: Tensor, target: Tensor, upstream: Tensor | None, loss: Tensor | None, lse: Tensor, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        z, slope = self._logits(x, want_slope=gradient)
        ignored = target == self.ignore_index
        label = target.masked_fill(ignored, 0)
        upstream = torch.ones_like(lse) if upstream is None else upstream
        if loss is None:
            factor = upstream
            z.sub_(lse.unsqueeze(1)).exp_()
        else:
            factor = self._losses_(z, label, ignored, loss, lse) * upstream
        if gradient:
            z = self._dlogits_(z, slope, factor, lse, label, upstream).masked_fill_(ignored.unsqueeze(1), 0.0)
        return (z.to(x.dtype), z) if gradient else (z, z)

    def _logits(self, x: Tensor, want_slope: bool) -> tuple[Tensor, Tensor | None]:
        """Capped logits (t, V) in the accumulation dtype, and the cap's derivative where there is one."""
        z = torch.mm(x, self.weight.t()).to(acc_dtype(x.dtype))
        if self.bias is not None:
            z += self.bias
        if not self.softcap:
            return z, None
        z.div_(self.softcap).tanh_()
        slope = 1.0 - z * z if want_slope else None
        return z.mul_(self.softcap), slope

    def _losses_(self, z: Tensor, label: Tensor, ignored: Tensor, loss: Tensor, lse: Tensor) -> Tensor:
        """Fills loss and lse (t,). Leaves exp(z - lse) in z, but for the factors (t,) that are returned.

        Not by logsumexp, which makes a second tensor of z's size and leaves its exponentials to be made again.
        """
        picked, mean = z.gather(1, label.unsqueeze(1)).squeeze(1), z.mean(dim=-1) if self.smoothing else None
        most = z.amax(dim=-1)
        total = z.sub_(most.unsqueeze(1)).exp_().sum(dim=-1)
        torch.add(most, total.log(), out=lse)
        torch.sub(lse, picked, alpha=1.0 - self.smoothing, out=loss)
        if mean is not None:
            loss -= self.smoothing * mean
        if self.z_loss:
            loss += self.z_loss * lse.square()
        for t in (loss, lse):
            t.masked_fill_(ignored, 0.0)
        return total.reciprocal_()

    def _dlogits_(
        self, z: Tensor, slope: Tensor | None, factor: Tensor, lse: Tensor, label: Tensor, upstream: Tensor
    ) -> Tensor:
        """The gradient of the raw logits, written over z: `factor * z` is `upstream` times their softmax."""
        p = z.mul_((factor * (1.0 + 2.0 * self.z_loss * lse) if self.z_loss else factor).unsqueeze(1))
        if self.smoothing:
            p -= (upstream * (self.smoothing / p.shape[1])).unsqueeze(1)
        at_label = upstream * (self.smoothing - 1.0)
        inside = label.clamp(0, p.shape[1] - 1)  # of `part`'s words
        at_label.masked_fill_(inside != label, 0.0)
        p.scatter_add_(1, inside.unsqueeze(1), at_label.unsqueeze(1))
        return p if slope is None else p.mul_(slope)


# --- autograd and FLOPs -------------------------------------------------------------------------------------


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, target, *ctx.options = inputs[:8]
    token_weight, ctx.reduction = inputs[8:10]
    _, lse, dx, dw, db = output
    ctx.mark_non_differentiable(lse, dx, dw, db)
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.dtypes = (x.dtype, weight.dtype, bias_dtype(weight, bias))
    ctx.made = any(inputs[10:13])
    if ctx.made:
        ctx.save_for_backward(dx, dw, db, target, token_weight)
    else:
        ctx.save_for_backward(lse, x, weight, bias, target, token_weight)


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    nothing = (None,) * 10
    need = ctx.needs_input_grad[:3]
    if dloss is None:
        return None, None, None, *nothing
    *saved, token_weight = ctx.saved_tensors  # read once: inside torch.utils.checkpoint a second reading is an error
    if ctx.reduction == "mean":
        count = counted(saved[-1], token_weight, ctx.options[0])
        dloss = dloss / count.masked_fill(count == 0, 1)
    if ctx.made:
        # A factor of one dimension, or it would be rounded to the gradient's dtype before the product. Scaled and
        # rounded in one pass on CUDA: a scaled float32 copy of dW alone takes 2 GB at Llama 3's vocabulary.
        factor = (dloss if token_weight is None else dloss * unit_of(token_weight)).view(1)
        sums = zip(saved[:3], ctx.dtypes, strict=True)
        grads = tuple(torch.mul(g, factor, out=torch.empty_like(g, dtype=dtype)) for g, dtype in sums)
    else:
        if token_weight is not None:
            dloss = dloss * token_weight
        grads = ops.linear_cross_entropy_bwd(dloss, *saved, *ctx.options, *need)
    out = tuple(g if n else None for g, n in zip(grads, (*need[:2], need[2] and ctx.has_bias), strict=True))
    return *out, *nothing


autograd("linear_cross_entropy_fwd", _backward, _setup)


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def product(x_shape, weight_shape) -> int:  # type: ignore[no-untyped-def]
        return 2 * x_shape[0] * x_shape[1] * weight_shape[0]

    @register_flop_formula(torch.ops.pyckpt.linear_cross_entropy_fwd)
    def forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        need_dx, need_dw = args[-3], args[-2]
        return product(x_shape, weight_shape) * (1 + bool(need_dx) + bool(need_dw))

    @register_flop_formula(torch.ops.pyckpt.linear_cross_entropy_tile_)
    def tile_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        dx, dw = args[-3:-1]
        return product(x_shape, weight_shape) * (1 + (dx is not None) + (dw is not None))

    @register_flop_formula(torch.ops.pyckpt.linear_cross_entropy_bwd)
    def backward_flops(dloss, lse, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
        need_dx, need_dw = args[-3], args[-2]
        return product(x_shape, weight_shape) * (1 + bool(need_dx) + bool(need_dw))


_register_flops()
