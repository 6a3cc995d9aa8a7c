"""`CkptCausalLM`'s arguments as a config.json of Hugging Face's dense decoders, and back.

Written: a Llama's config, a Qwen3's where q and k are normed, a Qwen2's where q, k and v alone have biases, a Mistral's
where there is a sliding window; one that transformers refuses where none of them computes the same. Our own arguments
are always there too, under "pyckpt". Read: only what a block computes exactly. Anything else is a ValueError.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from pyckpt.model import CkptCausalLM
from pyckpt.spec import GATED_MLPS, BlockSpec

Config = dict[str, Any]
Arguments = dict[str, Any]

OWN_KEY = OWN_TYPE = "pyckpt"
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers takes where a config.json has no such entry.
_DEFAULTS: dict[str, Config] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "max_position_embeddings": 32768,
    },
}
# The name to write, then others of the same function.
_ACTIVATIONS = {
    "swiglu": ("silu", "swish"),
    "geglu": ("gelu",),
    "geglu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
}
_MAX_POSITIONS = 2048  # what transformers assumes of a Llama that does not say
_CARRIED_DEFAULTS: Config = {
    # A Llama config without these has the token ids 1 and 2, which may be any tokens of ours.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.02,
    "max_position_embeddings": None,
}
CARRIED = tuple(_CARRIED_DEFAULTS)
"""Entries of config.json that describe no computation. They go through `CkptCausalLM.extra_config`."""
_QWEN = ("qwen2", "qwen3")  # of which each layer's window is said in one way
_ROPE_READ = ("default", "linear", "llama3")
_STACK = ("vocab_size", "n_layers", "tie_embeddings")
_OPTIONS = tuple(name for name in inspect.signature(BlockSpec.make).parameters if name != "causal")


def arguments_of(model: CkptCausalLM) -> Arguments:
    """The constructor's arguments in their plainest form; of the embeddings, whether they are tied now."""
    return {**model.config, "tie_embeddings": model.lm_head.weight is model.model.embed_tokens.weight}


def spec_of(arguments: Arguments) -> BlockSpec:
    return BlockSpec.make(**{name: arguments[name] for name in _OPTIONS if name in arguments})


# --- writing ---


def to_config(arguments: Arguments, dtype: torch.dtype, extra: Config | None = None) -> Config:
    """config.json for these arguments. `extra`: entries named in `CARRIED`. Raises ValueError for others."""
    spec = spec_of(arguments)
    kind = standard_type(spec)
    name = str(dtype).removeprefix("torch.")
    config: Config = {
        "architectures": [CkptCausalLM.__name__ if kind is None else _CLASSES[kind]],
        "model_type": kind or OWN_TYPE,
        "dtype": name,
        "torch_dtype": name,  # its name in transformers 4
        "vocab_size": arguments["vocab_size"],
        "tie_word_embeddings": arguments["tie_embeddings"],
        "use_cache": True,
        **_carried(spec, extra),
    }
    if kind is None:
        # A Llama class given this folder by name would fill in its own sizes; it can't without this one.
        config["hidden_size"] = None
    else:
        config |= _standard_fields(kind, spec, arguments["n_layers"])
    return config | {OWN_KEY: arguments}


def standard_type(spec: BlockSpec) -> str | None:
    """The model_type in transformers that computes the same as blocks of this spec; None if none does."""
    if (
        spec.norm != "rmsnorm"
        or spec.norm_offset
        or spec.norm_placement != "pre"
        or spec.parallel
        or spec.mlp not in GATED_MLPS
        or spec.softcap
        or spec.attention_scale is not None
        or spec.residual_multiplier != 1.0
        or dict(spec.rope_scaling or ()).get("rope_type") == "given"
        or spec.rope_dim is not None
        or spec.rope_interleaved
        or spec.rope_axes is not None
        or spec.rope_theta is None
        or not spec.causal
    ):
        return None
    if spec.qk_norm:
        return "qwen3" if spec.bias in (False, "attention") and spec.qk_norm != "full" else None
    # transformers refuses a Llama with such widths, and takes a Mistral.
    uneven = spec.d_model % spec.n_heads != 0
    if spec.bias == "qkv":
        return None if uneven else "qwen2"
    if spec.window[0] >= 0 or uneven:
        return None if spec.bias else "mistral"
    return "llama"


def _carried(spec: BlockSpec, extra: Config | None) -> Config:
    extra = extra or {}
    odd = [key for key in extra if key not in CARRIED]
    if odd:
        raise ValueError(
            f"extra_config has {', '.join(map(repr, odd))}; expected only {', '.join(CARRIED)}: everything else in "
            "config.json follows from the model"
        )
    config = {**_CARRIED_DEFAULTS, **extra}
    if config["max_position_embeddings"] is None:
        scaling: dict[str, Any] = dict(spec.rope_scaling or ())
        before = scaling.get("original_max_position_embeddings", _MAX_POSITIONS)
        config["max_position_embeddings"] = int(before * scaling.get("factor", 1))
    return config


def _standard_fields(kind: str, spec: BlockSpec, n_layers: int) -> Config:
    scaling = {k: float(v) if k.endswith("factor") else v for k, v in spec.rope_scaling or ()} or None
    fields: Config = {
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": _ACTIVATIONS[spec.mlp][0],
        "rms_norm_eps": spec.norm_eps,
        "attention_dropout": spec.attention_dropout,
        "attention_bias": spec.bias in (True, "attention"),
        "mlp_bias": spec.bias in (True, "mlp"),
        # transformers 5 reads the first, 4 the other two.
        "rope_parameters": {"rope_theta": spec.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": spec.rope_theta,
        "rope_scaling": scaling,
    }
    # Ours counts the keys before the query's own, theirs counts that one too.
    window = spec.window[0] + 1 if spec.window[0] >= 0 else None
    if kind == "mistral":
        fields["sliding_window"] = window
    elif kind in _QWEN:
        layer = "full_attention" if window is None else "sliding_attention"
        fields |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": n_layers if window is None else 0,
            "layer_types": [layer] * n_layers,
        }
    return fields


# --- reading ---


def from_config(config: Config, where: str) -> Arguments:
    """`CkptCausalLM`'s arguments from a config.json, which messages call `where`.

    Raises ValueError for entries that are missing or that a `CkptCausalLM` does not compute exactly.
    """
    kind = config.get("model_type")
    if kind == OWN_TYPE:
        return _own(config, where)
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ValueError(
            f"{where}: model_type is {kind!r}, expected one of {', '.join(_CLASSES)} or one that pyckpt wrote. Other "
            "architectures are not computed by its blocks"
        )
    fields = _Fields(where, {**_DEFAULTS[kind], **config})
    try:
        arguments = _standard(kind, fields)
        spec_of(arguments)
    except (ValueError, TypeError) as error:
        raise error if str(error).startswith(where) else fields.error(str(error)) from error
    if OWN_KEY in config:
        own = _own(config, where)
        arguments["dropout"] = own.get("dropout", 0.0)  # on the residual branches: transformers' Llama has none
        _check_agreement(own, arguments, where)
    return arguments


def carried_of(config: Config) -> Config:
    """The entries of a config.json that are named in `CARRIED`, those that transformers would fill in too."""
    whole = {**_DEFAULTS.get(config["model_type"], {}), **config}
    return {key: whole[key] for key in CARRIED if key in whole}


class _Fields:
    """Entries of a config.json, read with the type they must have."""

    def __init__(self, where: str, values: Config) -> None:
        self.where, self.values = where, values

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self.where}: {text}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(f"{key} is {value!r}, expected a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        return positive(self, key, default if value is None else value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, expected true or false")
        return bool(value)


def positive(fields: _Fields, key: str, value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:
        raise fields.error(f"{key} is {value!r}, expected a positive number")
    return value


def _standard(kind: str, fields: _Fields) -> Arguments:
    _check_plain(kind, fields)
    d_model, n_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    n_layers = fields.count("num_hidden_layers")
    theta, scaling = _rope(fields)
    return {
        "vocab_size": fields.count("vocab_size"),
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": fields.count("num_key_value_heads", n_heads),
        "head_dim": fields.count("head_dim", d_model // n_heads),
        "d_ff": fields.count("intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "mlp": _mlp(fields),
        "norm_placement": "pre",
        "residual": "sequential",
        "bias": _bias(kind, fields),
        "qk_norm": kind == "qwen3",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "window": _window(kind, fields, n_layers),
        "softcap": None,
        "dropout": 0.0,
        "attention_dropout": fields.get("attention_dropout") or 0.0,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }


def _check_plain(kind: str, fields: _Fields) -> None:
    """Refuse what changes the computation beside the fields that `_standard` reads."""
    classes = fields.get("architectures")
    if classes and [str(name).lower() for name in classes] != [_CLASSES[kind].lower()]:
        raise fields.error(f"architectures is {classes!r}, expected [{_CLASSES[kind]!r}]: other heads are not read")
    if fields.get("quantization_config") is not None:
        raise fields.error(
            "there is a quantization_config: quantized weights are not read. Dequantize the model and save it again"
        )
    if fields.get("pretraining_tp") not in (None, 1):
        raise fields.error(
            f"pretraining_tp is {fields.get('pretraining_tp')!r}, expected 1. If the products need not be summed in "
            "slices as in pretraining, set it to 1"
        )
    if fields.values.get("is_causal", True) is not True:
        raise fields.error(f"is_causal is {fields.get('is_causal')!r}, expected a causal model: true, or no entry")
    for key in ("per_layer_config", "transformers_weights"):
        if fields.get(key):
            raise fields.error(f"{key} is {fields.get(key)!r}, which is not read; expected none")


def _mlp(fields: _Fields) -> str:
    given = fields.values.get("hidden_act", "silu")
    for mlp, names in _ACTIVATIONS.items():
        if given in names:
            return mlp
    known = ", ".join(name for names in _ACTIVATIONS.values() for name in names)
    raise fields.error(f"hidden_act is {given!r}, expected one of {known}")


def _bias(kind: str, fields: _Fields) -> bool | str:
    if kind in ("mistral", "qwen2"):
        return "qkv" if kind == "qwen2" else False  # in transformers, whatever the config says
    attention, mlp = fields.flag("attention_bias"), kind == "llama" and fields.flag("mlp_bias")
    if attention == mlp:
        return attention
    return "attention" if attention else "mlp"


def _window(kind: str, fields: _Fields, n_layers: int) -> int | None:
    if kind == "llama":
        return None
    sliding = _mistral_slides(fields, n_layers) if kind == "mistral" else _qwen_slides(fields, n_layers)
    return fields.count("sliding_window") - 1 if sliding else None


def _mistral_slides(fields: _Fields, n_layers: int) -> bool:
    types, on = fields.get("layer_types"), fields.get("sliding_window") is not None
    if types is not None and _all_slide(fields, types, n_layers) != on:
        # A Mistral does not read them, and AutoModel makes it a Ministral, which does.
        raise fields.error(
            f"layer_types is {types!r} and sliding_window is {fields.get('sliding_window')!r}: transformers' AutoModel "
            "goes by the one, and its Mistral by the other. Remove layer_types, or make them agree"
        )
    return on


def _qwen_slides(fields: _Fields, n_layers: int) -> bool:
    types = fields.get("layer_types")
    on = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    if types is None:
        first = fields.get("max_window_layers") or 0
        types = ["sliding_attention" if on and i >= first else "full_attention" for i in range(n_layers)]
    slides = _all_slide(fields, types, n_layers)
    if slides and not on:
        raise fields.error("layer_types asks for sliding attention, but use_sliding_window or sliding_window is off")
    return slides


def _all_slide(fields: _Fields, types: Any, n_layers: int) -> bool:
    """Whether all layers have a sliding window; none of them has one if not."""
    if not isinstance(types, list):
        raise fields.error(f"layer_types is {types!r}, expected a list of {n_layers} names")
    kinds = set(map(str, types))
    if len(types) != n_layers or len(kinds) != 1 or not kinds <= {"sliding_attention", "full_attention"}:
        raise fields.error(
            f"the {n_layers} layers are of types {sorted(kinds)}, expected all 'full_attention' or all "
            "'sliding_attention': a CkptCausalLM has one kind of block"
        )
    return kinds == {"sliding_attention"}


def _rope(fields: _Fields) -> tuple[float, dict[str, Any] | None]:
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise _partial(fields, fields.get("partial_rotary_factor"))
    keys = [key for key in ("rope_parameters", "rope_scaling") if fields.get(key)]
    found = [_rope_form(fields, key, fields.get(key)) for key in keys]
    if len(found) == 2 and found[0] != found[1]:
        raise fields.error(
            f"rope_parameters is {fields.get('rope_parameters')!r} and rope_scaling is {fields.get('rope_scaling')!r}: "
            "they disagree. Remove the wrong one"
        )
    return found[0] if found else (fields.number("rope_theta", 10000.0), None)


def _rope_form(fields: _Fields, key: str, given: Any) -> tuple[float, dict[str, Any] | None]:
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fields.error(f"{key} is {given!r}, expected one flat object for all layers")
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in _ROPE_READ:
        raise fields.error(f"{key} is of type {kind!r}, expected {', '.join(_ROPE_READ)}")
    if given.get("partial_rotary_factor") not in (None, 1):
        raise _partial(fields, given["partial_rotary_factor"])
    theta = fields.number("rope_theta", given.get("rope_theta") or 10000.0)
    if given.get("rope_theta") not in (None, theta):
        raise fields.error(f"rope_theta is {theta} and {key} has {given['rope_theta']}. Remove the wrong one")
    return theta, None if kind == "default" else _scaling(fields, key, kind, given)


def _partial(fields: _Fields, value: Any) -> ValueError:
    return fields.error(f"partial_rotary_factor is {value!r}, expected 1: pyckpt's blocks rotate whole heads")


def _scaling(fields: _Fields, key: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": positive(fields, f"{key}: factor", given.get("factor")),
    }
    if kind == "linear":
        return scaling
    before = "original_max_position_embeddings"
    values = {before: fields.get("max_position_embeddings")} | given
    if fields.get(before) not in (None, values[before]):
        raise fields.error(f"{before} is {fields.get(before)!r} and {values[before]!r} in {key}. Remove the wrong one")
    for name in ("low_freq_factor", "high_freq_factor", before):
        scaling[name] = positive(fields, f"{key}: {name}", values.get(name))
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise fields.error(f"{key}: low_freq_factor must be below high_freq_factor, got {given!r}")
    return scaling


# --- our own arguments ---


def _own(config: Config, where: str) -> Arguments:
    given = config.get(OWN_KEY)
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {OWN_KEY!r} is {given!r}, expected the arguments of CkptCausalLM as an object")
    odd = sorted(set(given) - {*_STACK, *_OPTIONS})
    if odd:
        raise ValueError(
            f"{where}: {OWN_KEY!r} has {', '.join(map(repr, odd))}, which this version of pyckpt does not know. Load "
            "it with the version that wrote it, or a newer one"
        )
    fields = _Fields(f"{where}: in {OWN_KEY!r}", given)
    for name in ("vocab_size", "n_layers", "d_model", "n_heads"):
        fields.count(name)
    fields.flag("tie_embeddings")
    try:
        spec_of(given)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {OWN_KEY!r} has arguments that make no model: {error}") from error
    return given


def _check_agreement(own: Arguments, standard: Arguments, where: str) -> None:
    differing = [name for name in _STACK if own.get(name, False) != standard[name]]
    mine, theirs = spec_of(own), spec_of(standard)
    differing += [name for name in _OPTIONS if getattr(mine, name) != getattr(theirs, name)]
    if differing:
        raise ValueError(
            f"{where}: the entry {OWN_KEY!r} and the others disagree on {', '.join(differing)}: something changed one "
            f"of them. Remove {OWN_KEY!r} to go by the others, which are what transformers reads"
        )
