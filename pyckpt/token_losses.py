"""The loss of every single token of a model, without its logits: what preference and policy losses are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.model import CkptCausalLM


def token_losses(model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Tensor:
    """-log p of every label given the tokens before it, (B, S) float32, without the logits of all tokens.

    The loss at place i is that of the label at i + 1; it is 0 at the last place of a sequence and where that label is
    -100. Minus their sum over a completion is its log-probability: DPO's (Rafailov et al. 2023, equation 7), PPO's and
    GRPO's ratios are functions of it. The backward makes the logits again, chunk by chunk.

    Args:
        model: a causal language model that `pyckpt.swap` has swapped, loss and all, also inside DDP, PEFT or
            torch.compile; or a `CkptCausalLM`. A swapped model that is streamed is streamed here too.
        input_ids: (B, S) int64. labels: of the same shape; default: input_ids.
        inputs: what the model takes else, e.g. attention_mask (its padding should be -100 in the labels) or
            position_ids; for a `CkptCausalLM` what its `loss` takes.

    Raises ValueError for labels of another shape, and where the model makes its loss itself.
    """
    labels = input_ids if labels is None else labels
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected input_ids', {tuple(input_ids.shape)}")
    if isinstance(model, CkptCausalLM):
        return model.loss(input_ids, labels, reduction="none", **inputs)
    _check_causal(model)
    outputs = model(input_ids=input_ids, labels=labels, reduction="none", **inputs)
    losses = outputs[0] if isinstance(outputs, tuple) else outputs.loss
    if losses.shape != labels.shape:
        raise ValueError(
            f"this {type(model).__name__} gave a loss of shape {tuple(losses.shape)}, expected {tuple(labels.shape)}: "
            "its loss is its own; pyckpt.swap(model) replaces it, or says in its report why it does not"
        )
    return losses


def _check_causal(model: nn.Module) -> None:
    from pyckpt.swap.aligned import SwappedAligned
    from pyckpt.swap.replaced import replaced_in

    if not torch.compiler.is_compiling() and any(isinstance(r, SwappedAligned) for _, r in replaced_in(model)):
        raise ValueError(
            f"{type(model).__name__} predicts each label in its own place, and not the one after it: call it with "
            'labels and reduction="none"'
        )
