"""The loss of every single token of a model, without its logits: what preference and policy losses are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.model import CkptCausalLM


def token_losses(model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Tensor:
    """-log p of every label given the tokens before it, (B, S), without the logits of all tokens.

    In float32, or float64 where the model is.

    The loss at place i is that of the label at i + 1; it is 0 at the last place of a sequence and where that label is
    -100. Minus their sum over a completion is its log-probability: DPO's (Rafailov et al. 2023, equation 7), PPO's and
    GRPO's ratios are functions of it. The backward makes the logits again, chunk by chunk.

    Args:
        model: a causal language model that `pyckpt.swap` has swapped, loss and all, also inside DDP, PEFT or
            torch.compile; or a `CkptCausalLM`, not inside DDP or FSDP1, of which its `loss` is called: where
            torch.compile wraps it that runs as it does without. A swapped model that is streamed is streamed here too.
        input_ids: (B, S) int64. labels: of the same shape; default: input_ids.
        inputs: what the model takes else, e.g. attention_mask (its padding should be -100 in the labels) or
            position_ids; for a `CkptCausalLM` what its `loss` takes.

    Raises TypeError for what is no tensor; ValueError for labels of another shape, for a `reduction`, for a
    `CkptCausalLM` inside DDP, and where the model makes its loss itself.
    """
    errors.check_tensor("input_ids", input_ids)
    labels = input_ids if labels is None else labels
    errors.check_tensor("labels", labels)
    if "reduction" in inputs:
        raise ValueError(
            f"reduction={inputs['reduction']!r}: token_losses gives the loss of every token; leave reduction out, and "
            "sum or average what it returns"
        )
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected input_ids', {tuple(input_ids.shape)}")
    ours = _ours(model)
    if ours is not None:
        return ours.loss(input_ids, labels, reduction="none", **inputs)
    _check_causal(model)
    outputs = model(input_ids=input_ids, labels=labels, reduction="none", **inputs)
    losses = outputs[0] if isinstance(outputs, tuple) else outputs.loss
    if losses.shape != labels.shape:
        raise ValueError(
            f"this {type(model).__name__} gave a loss of shape {tuple(losses.shape)}, expected {tuple(labels.shape)}: "
            "its loss is its own; pyckpt.swap(model) replaces it, or says in its report why it does not"
        )
    return losses


def _ours(model: nn.Module) -> CkptCausalLM | None:
    """The CkptCausalLM that this is, also of torch.compile, which has no part in a loss; None for another model.

    Raises ValueError for one in a wrapper whose forward has to run, as DDP's, which reduces gradients in it.
    """
    if torch.compiler.is_compiling():  # what is traced is no wrapper
        return model if isinstance(model, CkptCausalLM) else None
    inner: Any = model
    wrapper: Any = None
    while not isinstance(inner, CkptCausalLM):
        children = inner._modules if isinstance(inner, nn.Module) else {}
        if type(inner).__name__ in _CALLED:
            wrapper = inner
        inner = next((children[name] for name in ("_orig_mod", *_INSIDE) if children.get(name) is not None), None)
        if inner is None or (wrapper is None and "_orig_mod" not in children):
            return None
    if wrapper is not None:
        raise ValueError(
            f"the CkptCausalLM is in a {type(wrapper).__name__}, whose forward gives logits and no loss: wrap a module "
            "whose forward calls token_losses(model, ...), or give the CkptCausalLM itself"
        )
    return inner


_CALLED = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
_INSIDE = ("module", "_fsdp_wrapped_module")


def _check_causal(model: nn.Module) -> None:
    from pyckpt.swap.aligned import SwappedAligned
    from pyckpt.swap.replaced import replaced_in

    if not torch.compiler.is_compiling() and any(isinstance(r, SwappedAligned) for _, r in replaced_in(model)):
        raise ValueError(
            f"{type(model).__name__} predicts each label in its own place, and not the one after it: call it with "
            'labels and reduction="none"'
        )
