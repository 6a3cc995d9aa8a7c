"""`torch.nn.TransformerEncoderLayer` as a standard block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyckpt.block import run_blocks
from pyckpt.swap import masks
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.families import ATTENTION, MLP, finish
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.weights import Mapping, Source, UnsupportedError

_ACTIVATIONS = {F.gelu: "gelu"}


def mapping_of(layer: nn.TransformerEncoderLayer, causal: bool) -> Mapping:
    """The layer as a block that is causal or not. Raises `UnsupportedError`, saying why not."""
    attention, kind = layer.self_attn, _activation(layer.activation)
    if layer.dropout.p:
        raise UnsupportedError("it drops values inside its MLP (dropout > 0), which a block does not")
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise UnsupportedError("its attention has widths, biases or zeros of its own for keys and values")
    if layer.norm1.elementwise_affine is False or layer.norm1.eps != layer.norm2.eps:
        raise UnsupportedError("its norms have no weights, or differ in eps")
    rates = {float(d.p) for d in (layer.dropout1, layer.dropout2)}
    if len(rates) > 1:
        raise UnsupportedError(f"dropout after attention and after the MLP differ: {sorted(rates)}")
    d_model = attention.embed_dim
    options = {
        "d_model": d_model,
        "n_heads": attention.num_heads,
        "d_ff": layer.linear1.out_features,
        "norm": "layernorm",
        "norm_eps": layer.norm1.eps,
        "norm_placement": "pre" if layer.norm_first else "post",
        "mlp": kind,
        "rope_theta": None,
        "causal": causal,
        "dropout": rates.pop(),
        "attention_dropout": float(attention.dropout),
    }
    last = "post_attention_layernorm" if layer.norm_first else "post_feedforward_layernorm"
    qkv = tuple(f"{ATTENTION}.{n}_proj" for n in "qkv")
    sources = [
        Source("self_attn", qkv, (d_model,) * 3, weight="in_proj_weight", bias="in_proj_bias"),
        Source("self_attn.out_proj", (f"{ATTENTION}.o_proj",)),
        Source("linear1", (f"{MLP}.up_proj",)),
        Source("linear2", (f"{MLP}.down_proj",)),
        Source("norm1", ("input_layernorm" if layer.norm_first else "post_attention_layernorm",)),
        Source("norm2", (last,)),
    ]
    return finish(layer, options, sources)


def _activation(activation: Any) -> str:
    if isinstance(activation, nn.GELU):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if activation not in _ACTIVATIONS:
        name = getattr(activation, "__name__", type(activation).__name__)
        raise UnsupportedError(f"the activation {name} is not one of a block's")
    return _ACTIVATIONS[activation]


class SwappedEncoderLayer(Replaced):
    """src (B, S, d_model), or (S, B, d_model) without batch_first, to the same shape.

    src_mask: None or the causal mask; src_key_padding_mask: None or padding at either end. Others, nested tensors and
    unbatched ones run the original forward.
    """

    def __init__(self, module: nn.TransformerEncoderLayer, blocks: dict[bool, MappedBlock]) -> None:
        super().__init__(module)
        self._batch_first = module.self_attn.batch_first
        self.blocks = blocks  # by causal

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        src = given["src"]
        if src.is_nested or src.dim() != 3:
            return self.original(**given)
        try:
            causal, cu_seqlens = self._masks(given)
        except UnsupportedError as reason:
            self.warn(f"{reason}: {type(self.module).__name__} runs its original forward, which stores everything")
            return self.original(**given)
        x = src if self._batch_first else src.transpose(0, 1)
        block = self.blocks[causal]
        if cu_seqlens is None:
            y = run_blocks([block], x, None, None)
        else:
            y = run_blocks([block], x.flatten(0, 1), None, cu_seqlens, checked=True).view(x.shape)
        return y if self._batch_first else y.transpose(0, 1)

    def _masks(self, given: dict[str, Any]) -> tuple[bool, Tensor | None]:
        change = self.blocks[False].mapping.change(self.module)
        if change is not None:
            raise UnsupportedError(change)
        src, mask, padding = (given.get(n) for n in ("src", "src_mask", "src_key_padding_mask"))
        assert src is not None
        batch, seq = src.shape[:2] if self._batch_first else (src.shape[1], src.shape[0])
        causal = mask is not None
        if mask is not None and not _is_causal(mask, seq):
            raise UnsupportedError("a src_mask that is not the causal one")
        if padding is None:
            return causal, None
        if torch.compiler.is_compiling():
            raise UnsupportedError("a src_key_padding_mask under torch.compile: how it cuts the batch is not known")
        tokens = ~padding if padding.dtype == torch.bool else padding == 0
        return causal, masks.packed(tokens, None, batch, seq)


def _is_causal(mask: Tensor, seq: int) -> bool:
    """The mask hides exactly the later keys: True there, or -inf in a mask that is added."""
    if torch.compiler.is_compiling() or tuple(mask.shape) != (seq, seq):
        return False
    later = torch.ones(seq, seq, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    return bool(((mask == float("-inf")) == later).all()) and not bool(mask[~later].any())
