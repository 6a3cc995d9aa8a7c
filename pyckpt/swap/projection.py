"""The product of a model's output embeddings as one product with one weight, whatever PEFT has put beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyckpt.swap import lora, parallel, peft_wrappers
from pyckpt.swap.around import foreign, moves, watched
from pyckpt.swap.modules import UnsupportedError, has_plain_weight, is_patched, is_whole
from pyckpt.swap.shadow import unsharded_class


def of(model: Any, ours: nn.Module | None = None) -> Any:
    """The output embeddings; where PEFT trains a copy of them, or rows, that. ours: as for `called_now`."""
    return peft_wrappers.called_now(model.get_output_embeddings(), ours)


def check(module: Any, replaced: bool = False) -> None:
    """Raise `UnsupportedError` where it is no plain linear layer, with rows that are trained or plain LoRA at most.

    replaced: its forward is known to be one of ours.
    """
    peft_wrappers.check(module)
    linear = peft_wrappers.base_of(module)
    if lora.is_adapted(linear):
        _check_adapted(linear, replaced)
        linear, replaced = lora.base_of(linear), False
    known = not foreign(linear, replaced) or moves(linear) or parallel.shards_words(linear)
    if unsharded_class(linear) is not nn.Linear or not known:
        raise UnsupportedError(f"its output embeddings are a {type(linear).__name__} with hooks, or no plain nn.Linear")
    if (patched := is_patched(linear)) is not None:
        raise UnsupportedError(patched)
    if not has_plain_weight(linear):
        raise UnsupportedError(f"the weight of its output embeddings is a {type(linear.weight).__name__}")


def _check_adapted(module: Any, replaced: bool) -> None:
    if any(watched(inside, replaced and inside is module) for inside in module.modules()):
        raise UnsupportedError("its output embeddings' adapters have forward hooks")
    lora.active(module)
    if not is_whole(lora.base_of(module).weight):
        raise UnsupportedError("its output embeddings have adapters, and are quantized or dealt out to processes")


def factors(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., n) and W (V, n) of which the logits of `hidden` (..., d_model) are x Wᵀ, but for a bias.

    x W₀ᵀ + s (x Aᵀ) Bᵀ of LoRA is one product of [x, s x Aᵀ] with [W₀, B]: n is d_model and the ranks.
    """
    if parallel.shards_words(module):
        return _as(module.weight, parallel.given(module, hidden)), module.weight
    if not lora.is_adapted(module):
        whole = peft_wrappers.weight_of(module)
        return _as(whole, hidden), whole
    weight: Any = lora.base_of(module).weight
    parts, hidden = lora.active(module), _as(weight, hidden)
    if not parts:
        return hidden, weight
    xs = [F.linear(_as(a, F.dropout(hidden, rate) if rate else hidden), a) * scale for _, a, _, scale, rate in parts]
    return (
        torch.cat([hidden, *(x.to(hidden.dtype) for x in xs)], -1),
        torch.cat([weight, *(b.to(weight.dtype) for _, _, b, _, _ in parts)], 1),
    )


def _as(weight: Tensor, x: Tensor) -> Tensor:
    """x where the weight is, and in its dtype where autocast does not see to that: Mamba's residual is in float32."""
    x = x.to(weight.device)  # with a device_map another one than the last layer's, perhaps
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
