"""The forward of a causal language model whose loss makes no logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.functional import linear_cross_entropy
from pyckpt.swap import heads
from pyckpt.swap.decoder import SwappedDecoder
from pyckpt.swap.layer import CALL
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.shadow import unsharded_class
from pyckpt.swap.weights import UnsupportedError, watched

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Head:
    """What a family does to its logits: options of the config that multiply, divide or softcap them, or None."""

    multiplier: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    output: str = "CausalLMOutputWithPast"


_MIXTURE = Head(output="MoeCausalLMOutputWithPast")
_SOFTCAPPED = Head(softcap="final_logit_softcapping")
HEADS = {
    "Cohere2ForCausalLM": Head(multiplier="logit_scale"),
    "CohereForCausalLM": Head(multiplier="logit_scale"),
    "GPT2LMHeadModel": Head(output="CausalLMOutputWithCrossAttentions"),
    "GPTNeoXForCausalLM": Head(),
    "Gemma2ForCausalLM": _SOFTCAPPED,
    "Gemma3ForCausalLM": _SOFTCAPPED,
    "GptOssForCausalLM": _MIXTURE,
    "GraniteForCausalLM": Head(divisor="logits_scaling"),
    "GraniteMoeForCausalLM": Head(divisor="logits_scaling", output="MoeCausalLMOutputWithPast"),
    "LlamaForCausalLM": Head(),
    "MistralForCausalLM": Head(),
    "MixtralForCausalLM": _MIXTURE,
    "NanoChatForCausalLM": _SOFTCAPPED,
    "Olmo2ForCausalLM": Head(),
    "Phi3ForCausalLM": Head(),
    "Qwen2ForCausalLM": Head(),
    "Qwen3ForCausalLM": Head(),
    "Qwen3MoeForCausalLM": _MIXTURE,
    "SmolLM3ForCausalLM": Head(),
    "Starcoder2ForCausalLM": Head(),
    "VaultGemmaForCausalLM": _SOFTCAPPED,
}


def head_of(model: nn.Module) -> Head:
    """The model's `Head`. Raises `UnsupportedError` where its loss is not known to be the usual one."""
    check(model)
    kind = unsharded_class(model)
    # Another's class may have the same name.
    if kind.__name__ in HEADS and kind.__module__.startswith("transformers.models."):
        return HEADS[kind.__name__]
    try:
        return Head(output=heads.output_of(model))
    except UnsupportedError as reason:
        raise UnsupportedError(f"this class is not known, and {reason}") from reason


def check(model: nn.Module) -> None:
    """Raise `UnsupportedError` where the loss is not the usual one of plain output embeddings."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        raise UnsupportedError("its loss_function is not transformers' ForCausalLMLoss")
    projection = model.get_output_embeddings()  # type: ignore[operator]
    if type(projection) is not nn.Linear or watched(projection):
        raise UnsupportedError(
            f"its output embeddings are a {type(projection).__name__} with hooks, or no plain nn.Linear"
        )


class SwappedHead(Replaced):
    """With labels: the loss, by `linear_cross_entropy`, and no logits. Else, or where it can't be: the original.

    `always`: without gradients too, where the original would return logits beside the loss.
    """

    def __init__(self, module: nn.Module, head: Head, always: bool) -> None:
        super().__init__(module)
        self.head, self.always = head, always

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        asked = given.pop("output_logits", False) or not self._no_logits(given.get("logits_to_keep", 0))
        if self.asks(
            given, "output_router_logits"
        ):  # its loss has a share of the router's logits, which the layers would have to return
            return self.original(**given)
        if given.get("labels") is None or asked or not (self.always or torch.is_grad_enabled()):
            return self.original(**given)
        try:
            check(self.module)
        except UnsupportedError as reason:
            self.warn(f"{reason}: the loss is the model's own, from logits")
            return self.original(**given)
        return self._loss(given)

    @staticmethod
    def _no_logits(keep: Any) -> bool:
        return keep is None or (isinstance(keep, int) and keep == 0)

    def _loss(self, given: dict[str, Any]) -> Any:
        from transformers import modeling_outputs

        model: Any = self.module
        labels = given.pop("labels")
        given.pop("logits_to_keep", None)
        as_dict = given.pop("return_dict", None)
        options = {n: given.pop(n, None) for n in ("num_items_in_batch", "shift_labels", "ignore_index")}
        if isinstance(model.base_model.__dict__.get("forward"), SwappedDecoder):
            given[CALL] = True
        outputs = model.base_model(**given)
        loss = self._of_hidden(outputs.last_hidden_state, labels, **options)
        fields = {n: getattr(outputs, n, None) for n in ("past_key_values", "hidden_states", "attentions")}
        made = getattr(modeling_outputs, self.head.output)(loss=loss, logits=None, **fields)
        if as_dict is None:
            as_dict = getattr(model.config, "return_dict", True)
        return made if as_dict else made.to_tuple()

    def _of_hidden(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Any,
        shift_labels: Tensor | None,
        ignore_index: int | None,
    ) -> Tensor:
        """The loss of hidden states (B, S, d_model) and labels (B, S), each token's the label after it."""
        ignored = IGNORED if ignore_index is None else ignore_index
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
        config: Any = self.module.config
        scale = 1.0
        if self.head.multiplier:
            scale = float(getattr(config, self.head.multiplier))
        if self.head.divisor:
            scale = 1.0 / float(getattr(config, self.head.divisor))
        projection: Any = self.module.get_output_embeddings()  # type: ignore[operator]
        loss = linear_cross_entropy(
            hidden if scale == 1.0 else hidden * scale,
            projection.weight,
            shift_labels.to(hidden.device).reshape(hidden.shape[:-1]),
            bias=projection.bias,
            ignore_index=ignored,
            reduction="mean" if num_items_in_batch is None else "sum",
            softcap=getattr(config, self.head.softcap) if self.head.softcap else None,
        )
        if num_items_in_batch is None:
            return loss
        return loss / (
            num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )
