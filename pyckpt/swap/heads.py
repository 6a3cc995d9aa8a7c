"""Whether the loss of a causal language model of any class is the usual one of its output embeddings' product.

Found by running the model's own forward on random hidden states in the place of those that its layers would make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.shadow import twin_of
from pyckpt.swap.survey import check_weights, forked, shown

_SEQ = 7
_LOGITS = 40.0  # their size: beyond any softcap


def output_of(model: Any) -> str:
    """The name of the class that the model returns, in transformers.modeling_outputs.

    Raises `UnsupportedError` where its logits are anything but its output embeddings' product with the hidden states,
    or its loss anything but the cross entropy of those with the next tokens.
    """
    from transformers import modeling_outputs

    projection = model.get_output_embeddings()
    check_weights(projection)
    device = projection.weight.device
    with forked(device), torch.no_grad():
        hidden = torch.randn(2, _SEQ, projection.in_features, device=device).to(projection.weight.dtype)
        hidden = hidden * (_LOGITS / projection(hidden).float().std()).to(hidden.dtype)
        labels = torch.randint(0, projection.out_features, (2, _SEQ), device=device)
        labels[0, :2] = -100
        for training in (False, True):
            made = _tried(model, hidden, labels, training)
    name = type(made).__name__
    if getattr(modeling_outputs, name, None) is not type(made):
        raise UnsupportedError(f"it returns a {name}, which is not known")
    return name


def _tried(model: Any, hidden: Tensor, labels: Tensor, training: bool) -> Any:
    """What the model returns for hidden states and labels. Raises `UnsupportedError` where that is not the usual."""
    logits = model.get_output_embeddings()(hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    given = {
        "input_ids": labels.clamp_min(0),
        "attention_mask": torch.ones_like(labels),
        "position_ids": torch.arange(_SEQ, device=labels.device)[None],
    }
    base = _Given(hidden, model.base_model)
    try:
        made = _twin(model, base, training).forward(**given, labels=labels)
    except Exception as error:
        raise UnsupportedError(f"its forward cannot be tried out: {shown(error)}") from error
    odd = [n for n, value in given.items() if base.called.get(n) is not value]
    odd += [str(n) for n, value in base.called.items() if n not in given and not _is_plain(value)]
    if odd:
        raise UnsupportedError(f"it calls its base model with other arguments than its own: {', '.join(odd)}")
    if not (_close(made.logits, logits) and _close(made.loss, loss)):
        raise UnsupportedError("its logits or loss are not those of its output embeddings alone")
    return made


def _twin(model: Any, given: _Given, training: bool) -> nn.Module:
    """The model's twin, in which `given` stands for its base model."""
    base = model.base_model
    path = next((n for n, m in model.named_modules() if m is base and n), None)
    if path is None:
        raise UnsupportedError("its base model is not a module of its own")
    twin = twin_of(model, lambda _, config: config, {path: given})
    twin.__dict__["training"] = training
    return twin


class _Given(nn.Module):
    """Returns these hidden states, and has what it was called with."""

    def __init__(self, hidden: Tensor, base: nn.Module) -> None:
        super().__init__()
        self._hidden, self.config = hidden, getattr(base, "config", None)
        self.called: dict[str, Any] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        self.called = dict(enumerate(args)) | kwargs  # type: ignore[assignment]
        return MoeModelOutputWithPast(last_hidden_state=self._hidden)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _close(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape or not bool(a.isfinite().all()):
        return False
    # Roundings alone: the products are the same.
    return float((a.float() - b.float()).abs().max()) <= 8 * torch.finfo(b.dtype).eps * float(b.float().abs().max())
