"""Which of a block's options transformers' decoder layers have, and where their weights are, by their classes' names.

What a block does not compute is an option that says why, as an `UnsupportedError`: such a layer takes the generic path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyckpt.ops.activation import phi_of
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.weights import Source
from pyckpt.tokenwise.parameters import ATTENTION, MLP

Options = dict[str, Any]
Family = tuple[Options, list[Source]]

_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def activation(module: nn.Module, gated: bool) -> str | UnsupportedError:
    """The name of the block's MLP with this activation module, or why there is none."""
    kind = _ACTIVATIONS.get(type(module).__name__)
    if type(module) is nn.GELU and module.approximate == "tanh":
        kind = "gelu_tanh"
    names = _GATED if gated else {k: k for k in ("gelu", "gelu_tanh", "relu2")}
    if kind not in names:
        return UnsupportedError(f"the activation {type(module).__name__} is not one of a block's")
    if not _computes(module, names[kind]):
        return UnsupportedError(f"what its {type(module).__name__} computes is not what its class computes")
    return names[kind]


def _computes(module: Any, kind: str) -> bool:
    """The activation is what its class is named for: some hold a function, which may be another one."""
    x = torch.linspace(-4.0, 4.0, 33, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            return torch.allclose(type(module).forward(module, x), phi_of(x, kind), rtol=1e-4, atol=1e-5)
    except Exception:  # of a function anything may come
        return False


def _heads(layer: Any) -> Options:
    config, head_dim = layer.self_attn.config, layer.self_attn.head_dim
    return {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "d_ff": config.intermediate_size,
    }


def _linears() -> list[Source]:
    names = [*(f"{ATTENTION}.{n}_proj" for n in "qkvo"), *(f"{MLP}.{n}_proj" for n in ("gate", "up", "down"))]
    return [_same(n) for n in names]


def _of_attention() -> list[Source]:
    return [s for s in _linears() if s.path.startswith(ATTENTION)]


def _gate_up(d_ff: int) -> list[Source]:
    """Of an MLP whose gate and up are one matrix."""
    both = Source("mlp.gate_up_proj", (f"{MLP}.gate_proj", f"{MLP}.up_proj"), (d_ff, d_ff))
    return [both, _same(f"{MLP}.down_proj")]


def _same(name: str) -> Source:
    return Source(name, (name,))


def _norms(*names: str) -> list[Source]:
    return [_same(n) for n in names]


def _llama(layer: Any, eps: str = "rms_norm_eps") -> Family:
    options = _heads(layer) | {
        "norm_eps": getattr(layer.self_attn.config, eps),
        "mlp": activation(layer.mlp.act_fn, gated=True),
    }
    return options, _linears() + _norms("input_layernorm", "post_attention_layernorm")


def _moe(layer: Any) -> Family:
    config = layer.self_attn.config
    options = _heads(layer) | {
        "norm_eps": config.rms_norm_eps,
        "mlp": UnsupportedError("its MLP is a mixture of experts"),
    }
    if getattr(layer.mlp, "jitter_noise", 0.0):
        raise UnsupportedError(
            "its router adds noise (router_jitter_noise), and would add other noise when it runs again"
        )
    return _windowed(options, getattr(config, "sliding_window", None)), _norms("input_layernorm")


def _qwen3_moe(layer: Any) -> Family:
    options, sources = _moe(layer)
    return options | {"qk_norm": True}, sources


def _gpt_oss(layer: Any) -> Family:
    options, sources = _moe(layer)
    options.pop("window", None)  # of every other layer
    return _windowed(options, layer.self_attn.sliding_window) | {"sinks": f"{ATTENTION}.sinks"}, sources


def _windowed(options: Options, window: int | None) -> Options:
    """transformers counts the query's own key in a window, a block does not."""
    return options if window is None else options | {"window": window - 1}


def _mistral(layer: Any) -> Family:
    options, sources = _llama(layer)
    return _windowed(options, getattr(layer.self_attn.config, "sliding_window", None)), sources


def _qwen2(layer: Any) -> Family:
    options, sources = _llama(layer)
    return _windowed(options, layer.self_attn.sliding_window), sources


def _qwen3(layer: Any) -> Family:
    options, sources = _qwen2(layer)
    return options | {"qk_norm": True}, sources + _norms(f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm")


def _smollm3(layer: Any) -> Family:
    options, sources = _qwen2(layer)
    return options | {"rope": bool(layer.self_attn.use_rope)}, sources


def _granite(layer: Any) -> Family:
    options, sources = _llama(layer)
    return options | {"residual_multiplier": float(layer.residual_multiplier)}, sources


def _gemma2(layer: Any) -> Family:
    options, sources = _qwen2(layer)
    options |= {
        "norm_placement": "sandwich",
        "norm_offset": 1.0,
        "softcap": layer.self_attn.attn_logit_softcapping,
    }
    return options, sources + _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gemma3(layer: Any) -> Family:
    options, sources = _gemma2(layer)
    # The class has the softcap as an attribute and does not pass it on.
    options |= {"qk_norm": True, "softcap": None}
    return options, sources + _norms(f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm")


def _gemma(layer: Any) -> Family:
    options, sources = _llama(layer)
    return options | {"norm_offset": 1.0}, sources


def _interleaved(layer: Any) -> Family:
    options, sources = _llama(layer)
    return options | {"rope_interleaved": True}, sources


def _olmo2(layer: Any) -> Family:
    options, sources = _llama(layer)
    sources = [s for s in sources if s.path != "input_layernorm"]
    norms = _norms("post_feedforward_layernorm", f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm")
    return options | {"norm_placement": "output", "qk_norm": "full"}, sources + norms


def _olmo3(layer: Any) -> Family:
    options, sources = _olmo2(layer)
    return _windowed(options, layer.self_attn.sliding_window), sources


def _exaone4(layer: Any) -> Family:
    options, sources = _olmo2(layer)
    window, sliding = layer.self_attn.sliding_window, layer.self_attn.is_sliding
    options |= {"qk_norm": True, "rope": window is None or sliding}
    return _windowed(options, window if sliding else None), sources


def _cohere(layer: Any) -> Family:
    options, sources = _llama(layer, eps="layer_norm_eps")
    sources = [s for s in sources if s.path != "post_attention_layernorm"]
    if getattr(layer.self_attn, "use_qk_norm", False):
        options["qk_norm"] = UnsupportedError("its QK-norm is a LayerNorm with a weight for each head")
    return options | {"norm": "layernorm", "residual": "parallel_shared", "rope_interleaved": True}, sources


def _cohere2(layer: Any) -> Family:
    options, sources = _cohere(layer)
    window = layer.self_attn.sliding_window
    return _windowed(options | {"rope": window is not None}, window), sources


def _plain(layer: Any) -> Family:
    """An MLP without a gate."""
    options, sources = _heads(layer) | {"mlp": activation(layer.mlp.act_fn, gated=False)}, _linears()
    sources = [s for s in sources if "gate" not in s.path] + _norms("input_layernorm", "post_attention_layernorm")
    return options, sources


def _arcee(layer: Any) -> Family:
    options, sources = _plain(layer)
    return options | {"norm_eps": layer.self_attn.config.rms_norm_eps}, sources


def _nemotron(layer: Any) -> Family:
    options, sources = _plain(layer)
    eps = layer.self_attn.config.norm_eps
    return options | {"norm": "layernorm", "norm_offset": 1.0, "norm_eps": eps}, sources


def _phi(layer: Any) -> Family:
    options = _heads(layer) | {
        "norm": "layernorm",
        "norm_eps": layer.self_attn.config.layer_norm_eps,
        "mlp": activation(layer.mlp.activation_fn, gated=False),
        "residual": "parallel_shared",
    }
    if layer.self_attn.qk_layernorm:
        options["qk_norm"] = UnsupportedError("its QK-norm is a LayerNorm")
    sources = [
        *(_same(f"{ATTENTION}.{n}_proj") for n in "qkv"),
        Source("self_attn.dense", (f"{ATTENTION}.o_proj",)),
        Source("mlp.fc1", (f"{MLP}.up_proj",)),
        Source("mlp.fc2", (f"{MLP}.down_proj",)),
        *_norms("input_layernorm"),
    ]
    return options, sources


def _starcoder2(layer: Any) -> Family:
    config = layer.self_attn.config
    options = _heads(layer) | {
        "norm": "layernorm",
        "norm_eps": config.norm_epsilon,
        "mlp": activation(layer.mlp.act, gated=False),
    }
    sources = _of_attention()
    sources += [Source("mlp.c_fc", (f"{MLP}.up_proj",)), Source("mlp.c_proj", (f"{MLP}.down_proj",))]
    sources += _norms("input_layernorm", "post_attention_layernorm")
    return _windowed(options, getattr(config, "sliding_window", None)), sources


def _phi3(layer: Any) -> Family:
    config = layer.self_attn.config
    options = _heads(layer) | {
        "norm_eps": config.rms_norm_eps,
        "mlp": activation(layer.mlp.activation_fn, gated=True),
    }
    d_q, d_kv = (options[n] * options["head_dim"] for n in ("n_heads", "n_kv_heads"))
    qkv = (f"{ATTENTION}.{n}_proj" for n in "qkv")
    sources = [
        Source("self_attn.qkv_proj", tuple(qkv), (d_q, d_kv, d_kv)),
        _same(f"{ATTENTION}.o_proj"),
        *_gate_up(options["d_ff"]),
        *_norms("input_layernorm", "post_attention_layernorm"),
    ]
    return _windowed(options, getattr(config, "sliding_window", None)), sources


def _glm(layer: Any) -> Family:
    options = _heads(layer) | {
        "norm_eps": layer.self_attn.config.rms_norm_eps,
        "mlp": activation(layer.mlp.activation_fn, gated=True),
        "rope_interleaved": True,
    }
    norms = _norms("input_layernorm", "post_attention_layernorm")
    return options, [*_of_attention(), *_gate_up(options["d_ff"]), *norms]


def _glm4(layer: Any) -> Family:
    options, sources = _glm(layer)
    sources = [s for s in sources if s.path != "post_attention_layernorm"]
    sources += [
        Source("post_self_attn_layernorm", ("post_attention_layernorm",)),
        Source("post_attention_layernorm", ("pre_feedforward_layernorm",)),
        Source("post_mlp_layernorm", ("post_feedforward_layernorm",)),
    ]
    return options | {"norm_placement": "sandwich"}, sources


def _gpt_neox(layer: Any) -> Family:
    config = layer.attention.config
    options = {
        "attention": "attention",
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "head_dim": layer.attention.head_size,
        "d_ff": config.intermediate_size,
        "norm": "layernorm",
        "norm_eps": config.layer_norm_eps,
        "mlp": activation(layer.mlp.act, gated=False),
        "residual": "parallel" if layer.use_parallel_residual else "sequential",
    }
    sources = [
        Source("attention.query_key_value", tuple(f"{ATTENTION}.{n}_proj" for n in "qkv"), heads=options["n_heads"]),
        Source("attention.dense", (f"{ATTENTION}.o_proj",)),
        Source("mlp.dense_h_to_4h", (f"{MLP}.up_proj",)),
        Source("mlp.dense_4h_to_h", (f"{MLP}.down_proj",)),
        *_norms("input_layernorm", "post_attention_layernorm"),
    ]
    return options, sources


def _gpt2(layer: Any) -> Family:
    if hasattr(layer, "crossattention"):
        raise UnsupportedError("it has cross attention")
    config = layer.attn.config
    d_model = config.hidden_size
    options = {
        "attention": "attn",
        "rope": False,
        "d_model": d_model,
        "n_heads": config.num_attention_heads,
        "head_dim": layer.attn.head_dim,
        "d_ff": config.n_inner or 4 * d_model,
        "norm": "layernorm",
        "norm_eps": config.layer_norm_epsilon,
        "mlp": activation(layer.mlp.act, gated=False),
    }
    qkv = tuple(f"{ATTENTION}.{n}_proj" for n in "qkv")
    sources = [
        Source("attn.c_attn", qkv, (d_model,) * 3, transposed=True),
        Source("attn.c_proj", (f"{ATTENTION}.o_proj",), transposed=True),
        Source("mlp.c_fc", (f"{MLP}.up_proj",), transposed=True),
        Source("mlp.c_proj", (f"{MLP}.down_proj",), transposed=True),
        Source("ln_1", ("input_layernorm",)),
        Source("ln_2", ("post_attention_layernorm",)),
    ]
    return options, sources


_RESIDUAL = (
    ("dropout", f"{ATTENTION}.residual_dropout"),
    ("dropout", f"{MLP}.residual_dropout"),
    ("attention_dropout", f"{ATTENTION}.attention_dropout"),
)
# Where rates of dropout are; of the other classes attention's alone.
RATES: dict[str, tuple[tuple[str, str], ...]] = {
    "GPT2Block": (
        ("dropout", "attn.resid_dropout"),
        ("dropout", "mlp.dropout"),
        ("attention_dropout", "attn.attn_dropout"),
    ),
    "GPTNeoXLayer": (
        ("dropout", "post_attention_dropout"),
        ("dropout", "post_mlp_dropout"),
        ("attention_dropout", "attention.attention_dropout"),
    ),
    "PhiDecoderLayer": (("dropout", "resid_dropout"), ("attention_dropout", f"{ATTENTION}.attention_dropout")),
    "Phi3DecoderLayer": (
        ("dropout", "resid_attn_dropout"),
        ("dropout", "resid_mlp_dropout"),
        ("attention_dropout", f"{ATTENTION}.attention_dropout"),
    ),
    "SeedOssDecoderLayer": _RESIDUAL,
    "Starcoder2DecoderLayer": _RESIDUAL,
}

FAMILIES: dict[str, Callable[[Any], Family]] = {
    "ArceeDecoderLayer": _arcee,
    "CohereDecoderLayer": _cohere,
    "Cohere2DecoderLayer": _cohere2,
    "Ernie4_5DecoderLayer": _interleaved,
    "Exaone4DecoderLayer": _exaone4,
    "GPT2Block": _gpt2,
    "GPTNeoXLayer": _gpt_neox,
    "GemmaDecoderLayer": _gemma,
    "Gemma2DecoderLayer": _gemma2,
    "Gemma3DecoderLayer": _gemma3,
    "GlmDecoderLayer": _glm,
    "Glm4DecoderLayer": _glm4,
    "GptOssDecoderLayer": _gpt_oss,
    "GraniteDecoderLayer": _granite,
    "HeliumDecoderLayer": _interleaved,
    "LlamaDecoderLayer": _llama,
    "MinistralDecoderLayer": _qwen2,
    "MistralDecoderLayer": _mistral,
    "MixtralDecoderLayer": _moe,
    "NemotronDecoderLayer": _nemotron,
    "Olmo2DecoderLayer": _olmo2,
    "Olmo3DecoderLayer": _olmo3,
    "PhiDecoderLayer": _phi,
    "Phi3DecoderLayer": _phi3,
    "Qwen2DecoderLayer": _qwen2,
    "Qwen3DecoderLayer": _qwen3,
    "Qwen3MoeDecoderLayer": _qwen3_moe,
    "SeedOssDecoderLayer": _llama,
    "SmolLM3DecoderLayer": _smollm3,
    "Starcoder2DecoderLayer": _starcoder2,
}
