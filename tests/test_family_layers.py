"""A block with a family's options, under the weights of that family's layer elsewhere, computes the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import plain_twin, randomise
from helpers import assert_close_to_truth
from torch import Tensor, nn

import pyckpt

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then
transformers = pytest.importorskip("transformers")
B, S, D, H, F = 2, 21, 48, 4, 72
Layer = Callable[[Tensor], Tensor]
State = dict[str, Tensor]
# A block has these options besides those of a case; the layer's own names and shapes are its module's.
SIZES = {"n_kv_heads": H, "d_ff": F}


def causal_mask() -> Tensor:
    return torch.full((S, S), float("-inf")).triu(1)[None, None]


def renamed(state: State, names: dict[str, str]) -> State:
    """The state under the block's names: each key's module is looked up, its kind (weight, bias) stays."""
    out = {}
    for key, t in state.items():
        module, _, kind = key.rpartition(".")
        if module in names:
            out[f"{names[module]}.{kind}"] = t
    return out


def gemma2() -> tuple[nn.Module, Layer, State, dict[str, Any]]:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2DecoderLayer, Gemma2RotaryEmbedding

    config = Gemma2Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=F,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    layer, rope = Gemma2DecoderLayer(config, 1), Gemma2RotaryEmbedding(config)
    randomise(layer)
    options = {
        "n_kv_heads": 2,
        "mlp": "geglu_tanh",
        "norm_placement": "sandwich",
        "norm_offset": 1.0,
        "softcap": 3.0,
        "attention_scale": 20**-0.5,
    }

    def run(x: Tensor) -> Tensor:
        tables = rope(x, torch.arange(S)[None])
        return layer(x, position_embeddings=tables, attention_mask=causal_mask())

    return layer, run, layer.state_dict(), options


def gpt_neox() -> tuple[nn.Module, Layer, State, dict[str, Any]]:
    from transformers.models.gpt_neox.modeling_gpt_neox import (
        GPTNeoXConfig,
        GPTNeoXLayer,
        GPTNeoXRotaryEmbedding,
    )

    config = GPTNeoXConfig(
        hidden_size=D,
        num_attention_heads=H,
        intermediate_size=F,
        rotary_pct=0.5,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        use_parallel_residual=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    layer, rope = GPTNeoXLayer(config, 0), GPTNeoXRotaryEmbedding(config)
    randomise(layer)
    state = layer.state_dict()
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    ours = renamed(state, names)
    for kind in ("weight", "bias"):
        fused = state[f"attention.query_key_value.{kind}"].unflatten(0, (H, 3, -1))
        ours |= {f"self_attn.{n}_proj.{kind}": fused[:, i].flatten(0, 1) for i, n in enumerate("qkv")}
    options = {"norm": "layernorm", "mlp": "gelu", "residual": "parallel", "bias": True, "rope_dim": 6}

    def run(x: Tensor) -> Tensor:
        tables = rope(x, torch.arange(S)[None])
        out = layer(x, position_embeddings=tables, attention_mask=causal_mask())
        return out[0] if isinstance(out, tuple) else out

    return layer, run, ours, options


def gpt_j() -> tuple[nn.Module, Layer, State, dict[str, Any]]:
    from transformers.models.gptj.modeling_gptj import GPTJBlock, GPTJConfig, GPTJRotaryEmbedding

    config = GPTJConfig(
        n_embd=D,
        n_head=H,
        n_inner=F,
        n_positions=64,
        rotary_dim=8,
        layer_norm_epsilon=1e-5,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        attn_implementation="eager",
    )
    layer, rotary = GPTJBlock(config, 0), GPTJRotaryEmbedding(config)
    randomise(layer)
    names = {f"attn.{n}_proj": f"self_attn.{n}_proj" for n in "qkv"} | {
        "ln_1": "input_layernorm",
        "attn.out_proj": "self_attn.o_proj",
        "mlp.fc_in": "mlp.up_proj",
        "mlp.fc_out": "mlp.down_proj",
    }
    options = {
        "norm": "layernorm",
        "mlp": "gelu_tanh",
        "residual": "parallel_shared",
        "bias": "mlp",
        "rope_dim": 8,
        "rope_interleaved": True,
    }

    def run(x: Tensor) -> Tensor:
        tables = rotary(x, torch.arange(S)[None].expand(B, S))
        out = layer(x, position_embeddings=tables, attention_mask=causal_mask())
        return out[0] if isinstance(out, tuple) else out

    return layer, run, renamed(layer.state_dict(), names), options


def olmo2() -> tuple[nn.Module, Layer, State, dict[str, Any]]:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Config, Olmo2DecoderLayer, Olmo2RotaryEmbedding

    config = Olmo2Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=2,
        intermediate_size=F,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    layer, rope = Olmo2DecoderLayer(config, 0), Olmo2RotaryEmbedding(config)
    randomise(layer)

    def run(x: Tensor) -> Tensor:
        out = layer(x, position_embeddings=rope(x, torch.arange(S)[None]), attention_mask=causal_mask())
        return out[0] if isinstance(out, tuple) else out

    return layer, run, layer.state_dict(), {"n_kv_heads": 2, "norm_placement": "output", "qk_norm": "full"}


def qwen2() -> tuple[nn.Module, Layer, State, dict[str, Any]]:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2DecoderLayer, Qwen2RotaryEmbedding

    config = Qwen2Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=2,
        intermediate_size=F,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    layer, rope = Qwen2DecoderLayer(config, 0), Qwen2RotaryEmbedding(config)
    randomise(layer)

    def run(x: Tensor) -> Tensor:
        out = layer(x, position_embeddings=rope(x, torch.arange(S)[None]), attention_mask=causal_mask())
        return out[0] if isinstance(out, tuple) else out

    return layer, run, layer.state_dict(), {"n_kv_heads": 2, "bias": "qkv"}


def torch_encoder() -> tuple[nn.Module, Layer, State, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(D, H, F, dropout=0.0, activation="gelu", batch_first=True, norm_first=False)
    randomise(layer)
    state = layer.state_dict()
    names = {
        "norm1": "post_attention_layernorm",
        "norm2": "post_feedforward_layernorm",
        "self_attn.out_proj": "self_attn.o_proj",
        "linear1": "mlp.up_proj",
        "linear2": "mlp.down_proj",
    }
    ours = renamed(state, names)
    for kind in ("weight", "bias"):
        parts = state[f"self_attn.in_proj_{kind}"].chunk(3)
        ours |= {f"self_attn.{n}_proj.{kind}": t for n, t in zip("qkv", parts, strict=True)}
    options = {
        "norm": "layernorm",
        "norm_placement": "post",
        "mlp": "gelu",
        "bias": True,
        "rope_theta": None,
        "causal": False,
    }
    return layer, layer, ours, options


@pytest.mark.parametrize("make", [gemma2, gpt_neox, gpt_j, olmo2, qwen2, torch_encoder])
def test_is_the_familys_layer(make):
    _, layer, state, options = make()
    options = {**SIZES, **options}
    block = pyckpt.CkptTransformerBlock(D, H, **options, tile=10)
    block.load_state_dict(state)
    x, dy = torch.randn(B, S, D), torch.randn(B, S, D)

    def results(module: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = module(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    truth = results(plain_twin(block, torch.float64, **options), torch.float64)
    plain = results(plain_twin(block, torch.float32, **options), torch.float32)
    for module, factor in ((block, 2.0), (layer, 4.0)):
        for what, got, ref, want in zip(("y", "dx"), results(module, torch.float32), plain, truth, strict=True):
            assert_close_to_truth(got, ref, want, factor, what)
