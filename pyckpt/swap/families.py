"""Which decoder layers of transformers are a standard block, with which options, and where their weights are.

A family is known by its layer's class. Its options are read from the layer's own modules, where they stand there, and
from its config; whatever a block does not compute raises `UnsupportedError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyckpt.spec import BlockSpec
from pyckpt.swap import generic, lora, parallel, quantized
from pyckpt.swap.code import odd_function
from pyckpt.swap.modules import UnsupportedError, has_plain_weight, is_known, is_patched, norm_eps
from pyckpt.swap.rope import MOVING, MovingRope, given
from pyckpt.swap.shadow import kinds_of, unsharded_class
from pyckpt.swap.weights import Mapping, Source, bias_of, read_rates

ATTENTION, MLP = "self_attn", "mlp"
OLDEST = (5, 4)  # of transformers
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
# What stands in a spec for an option that says why it is not a block's: the generic path runs the layer's own module.
_PLAIN: Options = {"mlp": "swiglu", "qk_norm": True}
# Models whose masks are not all cut where position_ids start anew.
UNCUT = ("GptOssModel", "FSDPGptOssModel")


def mapping_of(layer: nn.Module, rotary: nn.Module | None, moving_of: dict[str, MovingRope] | None = None) -> Mapping:
    """The layer as a block, standard if it can be, else generic. `rotary` is the model's rotary embedding.

    moving_of: of the layers of one model, filled here: what reads frequencies that move, once for all layers.

    Raises `UnsupportedError`, saying why neither.
    """
    make = FAMILIES.get(family_class(layer))
    if make is None:
        raise UnsupportedError("this class is not known")
    check_version()
    check_forwards(layer)
    options, sources = make(layer)
    attention: Any = layer.get_submodule(options.pop("attention", ATTENTION))
    config = attention.config
    if not attention.is_causal or not getattr(config, "is_causal", True):
        raise UnsupportedError("its attention is not causal")
    sinks = options.pop("sinks", None)
    moving = None
    if options.pop("rope", True):
        of_rope, moving = rope_options(
            rotary, getattr(attention, "layer_type", None), {} if moving_of is None else moving_of
        )
        options |= of_rope
        if options.get("rope_dim") == options["head_dim"]:
            del options["rope_dim"]
    else:
        options["rope_theta"] = None
    options["attention_scale"] = float(attention.scaling)
    rates = _RATES.get(family_class(layer), (("attention_dropout", f"{ATTENTION}.attention_dropout"),))
    options |= read_rates(layer, rates)
    try:
        return finish(layer, options, sources, moving, rates)
    except UnsupportedError as reason:
        plain = {n: _PLAIN[n] if isinstance(v, UnsupportedError) else v for n, v in options.items()}
        try:
            return generic.mapping_of(layer, spec_of(plain, bias=False), str(reason), sinks, moving, rates)
        except UnsupportedError as other:
            raise reason from other


def finish(
    layer: nn.Module,
    options: Options,
    sources: list[Source],
    moving: MovingRope | None = None,
    rates: tuple[tuple[str, str], ...] = (),
) -> Mapping:
    """The mapping, after checking the modules that hold the weights and the weights themselves."""
    for value in options.values():
        if isinstance(value, UnsupportedError):
            raise value
    biased = set()
    for source in sources:
        module = layer.get_submodule(source.path)
        _check_module(source, module, options["norm_eps"])
        if getattr(module, source.bias, None) is not None and "norm" not in source.names[0]:
            biased |= set(source.names)
    spec = spec_of(options, bias_of(biased))
    dealt = parallel.dealt_out(layer, {s.path: kind for s in sources if (kind := s.dealt_out) is not None})
    generic.check_unwatched(layer, None if dealt is None else dealt.knows)
    modules = dict(generic.inner(layer))
    adapted = [path for path, module in modules.items() if lora.is_adapted(module)]
    # What is in an adapted module may come and go, but for what it adapts.
    inside = tuple(f"{path}." for path in adapted)
    kept = {f"{path}.base_layer" for path in adapted}
    kinds = tuple((n, type(m)) for n, m in modules.items() if n in kept or not n.startswith(inside))
    packed = any(map(quantized.is_quantized, modules.values()))
    mapping = Mapping(spec, tuple(sources), kinds, moving=moving, adapted=bool(adapted), quantized=packed, rates=rates)
    mapping.check(layer)
    return mapping if dealt is None else mapping.part_of(dealt)


def check_forwards(layer: nn.Module) -> None:
    """Raise `UnsupportedError` where somebody has put another forward, or what it calls, into the layer's classes."""
    patched = next(filter(None, map(is_patched, layer.modules())), None) or odd_function(kinds_of(layer))
    if patched is not None:
        raise UnsupportedError(patched)


def check_version() -> None:
    """Raise `UnsupportedError` for a transformers whose layers are called in another way."""
    import transformers

    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsupportedError(
            f"transformers is {transformers.__version__}, and its layers are called in another way before {oldest}; "
            f"install transformers>={oldest}"
        )


def spec_of(options: Options, bias: bool | str) -> BlockSpec:
    """The spec of these options. Raises `UnsupportedError` where there is none."""
    try:
        return BlockSpec.make(**options, bias=bias)
    except ValueError as error:
        raise UnsupportedError(str(error)) from error


def family_class(layer: nn.Module) -> str:
    """The name of the layer's class in transformers; of a class made by FSDP2, that of the class it wraps."""
    kind = unsharded_class(layer)
    return kind.__name__ if kind.__module__.startswith("transformers.models.") else ""


def activation(module: nn.Module, gated: bool) -> str | UnsupportedError:
    """The name of the block's MLP with this activation module, or why there is none."""
    kind = _ACTIVATIONS.get(type(module).__name__)
    if type(module) is nn.GELU and module.approximate == "tanh":
        kind = "gelu_tanh"
    names = _GATED if gated else {k: k for k in ("gelu", "gelu_tanh", "relu2")}
    if kind not in names:
        return UnsupportedError(f"the activation {type(module).__name__} is not one of a block's")
    return names[kind]


def rope_options(
    rotary: Any, layer_type: str | None, moving_of: dict[str, MovingRope]
) -> tuple[Options, MovingRope | None]:
    """RoPE by the very frequencies of the model's rotary embedding, of a layer's type where each has its own.

    With where to read them at each call, if they change.
    """
    if rotary is None:
        raise UnsupportedError("no rotary embedding was found beside the layers")
    kind, prefix = rotary.rope_type, ""
    if isinstance(kind, dict):
        kind, prefix = kind.get(layer_type), f"{layer_type}_"
    if kind is None:
        raise UnsupportedError("its rotary embedding does not say of which type it is")
    frequencies = getattr(rotary, f"{prefix}inv_freq")
    if frequencies.is_meta:
        raise UnsupportedError("its rotary embedding is on the meta device; swap the model when it has its weights")
    moving = moving_of.setdefault(prefix, MovingRope(rotary, prefix)) if kind in MOVING else None
    options = {"rope_theta": 10000.0, "rope_scaling": given(rotary, prefix), "rope_dim": 2 * frequencies.numel()}
    return options, moving


def _check_module(source: Source, module: Any, eps: float) -> None:
    if lora.is_adapted(module):
        lora.check(source.path, module)
    module = lora.base_of(module)
    name = type(module).__name__
    if "norm" in source.names[0]:
        found = norm_eps(module)
        if found is None or found != eps:
            raise UnsupportedError(f"{source.path} is a {name} of eps {found}, expected a norm of eps {eps}")
    elif quantized.is_quantized(module):
        quantized.check(source.path, module)
    elif not _is_plain(type(module)):
        raise UnsupportedError(f"{source.path} is a {type(module).__module__}.{name}, not a plain linear layer")
    elif source.weight == "weight" and not has_plain_weight(module):
        raise UnsupportedError(f"the weight of {source.path} is a {type(module.weight).__name__}, not a plain tensor")
    elif source.transposed != (name == "Conv1D"):
        raise UnsupportedError(f"{source.path} is a {name}, whose weight is stored the other way round")


def _is_plain(kind: type) -> bool:
    names = ("Linear", "Conv1D", "MultiheadAttention", "NonDynamicallyQuantizableLinear")
    return kind.__name__ in names and is_known(kind)


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


def _olmo2(layer: Any) -> Family:
    options, sources = _llama(layer)
    sources = [s for s in sources if s.path != "input_layernorm"]
    norms = _norms("post_feedforward_layernorm", f"{ATTENTION}.q_norm", f"{ATTENTION}.k_norm")
    return options | {"norm_placement": "output", "qk_norm": "full"}, sources + norms


def _cohere(layer: Any) -> Family:
    options, sources = _llama(layer, eps="layer_norm_eps")
    sources = [s for s in sources if s.path != "post_attention_layernorm"]
    if layer.self_attn.use_qk_norm:
        options["qk_norm"] = UnsupportedError("its QK-norm is a LayerNorm with a weight for each head")
    return options | {"norm": "layernorm", "residual": "parallel_shared", "rope_interleaved": True}, sources


def _starcoder2(layer: Any) -> Family:
    config = layer.self_attn.config
    options = _heads(layer) | {
        "norm": "layernorm",
        "norm_eps": config.norm_epsilon,
        "mlp": activation(layer.mlp.act, gated=False),
    }
    sources = [s for s in _linears() if s.path.startswith(ATTENTION)]
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
    qkv, gate_up = (f"{ATTENTION}.{n}_proj" for n in "qkv"), (f"{MLP}.gate_proj", f"{MLP}.up_proj")
    sources = [
        Source("self_attn.qkv_proj", tuple(qkv), (d_q, d_kv, d_kv)),
        _same(f"{ATTENTION}.o_proj"),
        Source("mlp.gate_up_proj", gate_up, (options["d_ff"], options["d_ff"])),
        _same(f"{MLP}.down_proj"),
        *_norms("input_layernorm", "post_attention_layernorm"),
    ]
    return _windowed(options, getattr(config, "sliding_window", None)), sources


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


# Where rates of dropout are; of the other classes attention's alone.
_RATES: dict[str, tuple[tuple[str, str], ...]] = {
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
    "Phi3DecoderLayer": (
        ("dropout", "resid_attn_dropout"),
        ("dropout", "resid_mlp_dropout"),
        ("attention_dropout", f"{ATTENTION}.attention_dropout"),
    ),
    "Starcoder2DecoderLayer": (
        ("dropout", f"{ATTENTION}.residual_dropout"),
        ("dropout", f"{MLP}.residual_dropout"),
        ("attention_dropout", f"{ATTENTION}.attention_dropout"),
    ),
}

FAMILIES: dict[str, Callable[[Any], Family]] = {
    "CohereDecoderLayer": _cohere,
    "GPT2Block": _gpt2,
    "GPTNeoXLayer": _gpt_neox,
    "Gemma2DecoderLayer": _gemma2,
    "Gemma3DecoderLayer": _gemma3,
    "GptOssDecoderLayer": _gpt_oss,
    "GraniteDecoderLayer": _granite,
    "LlamaDecoderLayer": _llama,
    "MistralDecoderLayer": _mistral,
    "MixtralDecoderLayer": _moe,
    "Olmo2DecoderLayer": _olmo2,
    "Phi3DecoderLayer": _phi3,
    "Qwen2DecoderLayer": _qwen2,
    "Qwen3DecoderLayer": _qwen3,
    "Qwen3MoeDecoderLayer": _qwen3_moe,
    "SmolLM3DecoderLayer": _smollm3,
    "Starcoder2DecoderLayer": _starcoder2,
}
