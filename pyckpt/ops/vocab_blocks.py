"""The gradients of a linear head's cross entropy, over blocks of the vocabulary instead of over chunks of tokens.

Once each token's lse is known, the words no longer depend on each other. A block's rows of dW are then one product
over all tokens, summed inside it and written in the weight's dtype, where chunks of tokens need a float32 dW to sum
in: 2.1 GB at Llama 3's vocabulary. What is summed in memory is dx, (T, D), the smaller one where there are fewer tokens
than words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.products import add_product_, product

if TYPE_CHECKING:
    from pyckpt.ops.linear_cross_entropy import Head

_MIN_WORDS = 256
_TILE = 64
# What stands for ignore_index, which may itself be a word of another block. With any word taken off it fits 32 bits.
IGNORED = -(1 << 30)


def gradients(
    head: Head,
    upstream: Tensor | None,
    factor: Tensor | None,
    lse: Tensor,
    x: Tensor,
    target: Tensor,
    need_dx: bool,
    need_db: bool,
    elements: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db) of the losses' sum, weighed by upstream (T,) and then by the one factor (1,); None: ones.

    About `elements` logits exist at a time. Those not needed are empty; they have the dtypes of x, weight and bias.
    """
    weight = head.weight
    acc = acc_dtype(x.dtype)
    dx = x.new_zeros(x.shape if need_dx else 0, dtype=acc)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    db = weight.new_empty(weight.shape[0] if need_db and head.bias is not None else 0, dtype=acc)
    labels = target.masked_fill(target == head.ignore_index, IGNORED)
    for words in _blocks(weight.shape[0], max(_MIN_WORDS, elements // max(1, x.shape[0]))):
        part = head.part(words, IGNORED - words.start)
        dz, exact = part.chunk(x, labels - words.start, upstream, None, lse, True)
        if db.numel():
            torch.sum(exact, 0, dtype=acc, out=db[words])
        del exact
        if need_dx:
            add_product_(dx, dz, part.weight)
        _write_product(dw[words], dz.t(), x, factor)
        del dz  # or it would lie beside the next block's logits
    return scaled(dx, factor, x.dtype), dw, scaled(db, factor, bias_dtype(weight, head.bias))


def bias_dtype(weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """That of the bias' gradient: of a bias in float32 beside half weights, one that half may not hold."""
    return weight.dtype if bias is None else bias.dtype


def _blocks(vocab: int, most: int) -> Iterator[slice]:
    """Of at most that many words and of equal size, but for what makes them whole tiles of the products."""
    step = -(-vocab // -(-vocab // most))
    step = min(-(-step // _TILE) * _TILE, most)
    for start in range(0, vocab, step):
        yield slice(start, min(start + step, vocab))


def _write_product(out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> None:
    """out = factor a b, in half precision scaled before it is rounded.

    A sum over all tokens may pass float16's range.
    """
    if factor is None:
        torch.mm(a, b, out=out)
    elif out.dtype == factor.dtype:
        torch.mm(a, b, out=out).mul_(factor)
    else:
        torch.mul(product(a, b, factor.dtype), factor, out=out)


def scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad times the factor (1,) in `dtype`, scaled and rounded in one pass.

    A factor of one dimension, or it would be rounded to the gradient's dtype before the product.
    """
    if factor is None:
        return grad.to(dtype)
    if grad.dtype == dtype:
        return grad.mul_(factor)
    return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
