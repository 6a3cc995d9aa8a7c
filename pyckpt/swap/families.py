"""Which decoder layers of transformers are a standard block, with which options, and where their weights are.

A family is known by its layer's class (`pyckpt.swap.tables`). Its options are read from the layer's own modules, where
they stand there, and from its config; whatever a block does not compute raises `UnsupportedError`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyckpt.spec import BlockSpec
from pyckpt.swap import generic, lora, parallel, quantized
from pyckpt.swap.around import foreign, what_watches
from pyckpt.swap.code import odd_function
from pyckpt.swap.modules import (
    UnsupportedError,
    has_plain_weight,
    is_known,
    is_own_forward,
    is_patched,
    norm_eps,
)
from pyckpt.swap.numbers import numbers_of
from pyckpt.swap.rope import MOVING, MovingRope, given
from pyckpt.swap.shadow import kinds_of, unsharded_class
from pyckpt.swap.tables import FAMILIES, RATES, Options
from pyckpt.swap.weights import Mapping, Source, bias_of, read_rates
from pyckpt.tokenwise.parameters import ATTENTION

OLDEST = (5, 4)  # of transformers
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
        of_rope, moving = rope_options(rotary, _layer_type(attention), {} if moving_of is None else moving_of)
        options |= of_rope
        if options.get("rope_dim") == options["head_dim"]:
            del options["rope_dim"]
    else:
        options["rope_theta"] = None
    options["attention_scale"] = float(attention.scaling)
    rates = RATES.get(family_class(layer), (("attention_dropout", f"{ATTENTION}.attention_dropout"),))
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
    read = {n: m for n, m in modules.items() if n in kept or not n.startswith(inside)}
    kinds = tuple((n, type(m)) for n, m in read.items())
    packed = {n for n, m in modules.items() if quantized.is_quantized(m)}
    computing = (n for n in read if n not in adapted and n not in packed)
    mapping = Mapping(
        spec,
        tuple(sources),
        kinds,
        moving=moving,
        adapted=bool(adapted),
        quantized=bool(packed),
        rates=rates,
        numbers=numbers_of(layer, ("", *computing)),
    )
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


def rope_options(
    rotary: Any, layer_type: str | None, moving_of: dict[str, MovingRope]
) -> tuple[Options, MovingRope | None]:
    """RoPE by the very frequencies of the model's rotary embedding, of a layer's type where each has its own.

    With where to read them at each call, if they change.
    """
    if rotary is None:
        raise UnsupportedError("no rotary embedding was found beside the layers")
    if (odd := odd_rotary(rotary)) is not None:
        raise UnsupportedError(odd)
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


def odd_rotary(rotary: nn.Module) -> str | None:
    """That a rotary embedding may give other tables than its frequencies say, or None."""
    if foreign(rotary):
        return f"its rotary embedding {what_watches(rotary)}"
    if is_own_forward(unsharded_class(rotary)):
        return None
    return f"the forward of its rotary embedding, a {type(rotary).__name__}, is not transformers' own"


def _layer_type(attention: Any) -> str | None:
    """By what its class calls it, of those that tell layers apart."""
    found = (getattr(attention, name, None) for name in ("layer_type", "attention_type"))
    return next((kind for kind in found if isinstance(kind, str)), None)


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
