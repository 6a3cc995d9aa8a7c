"""Where a block's weights are among the parameters of another layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.compiling import constant_result
from pyckpt.spec import BlockSpec, LowRank
from pyckpt.swap import lora, parallel, quantized
from pyckpt.swap.around import lacks_parameters, watched, what_watches
from pyckpt.swap.modules import UnsupportedError, is_patched, submodule
from pyckpt.swap.numbers import ANEW, Numbers, other_number
from pyckpt.swap.rope import MovingRope
from pyckpt.tokenwise.packed import Packed
from pyckpt.tokenwise.parameters import ATTENTION, MLP, parameter_shapes
from pyckpt.vocab_parallel import is_dealt_out, own_part


@dataclasses.dataclass(frozen=True)
class Source:
    """One module of the layer, and the linear layers or the norm of a block that its parameters are.

    `names` are several where one matrix holds them in turn, `rows` of each. `transposed`: stored (in, out).
    `heads`: the rows are not one after the other, but in turn for each head.
    """

    path: str
    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False
    heads: int = 0
    weight: str = "weight"
    bias: str = "bias"

    def read(self, layer: nn.Module, part: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """The block's parameters by name, views of the layer's (copies with `heads`), differentiable.

        A quantized weight is given as it is, once for each of its names. part: what to take of a parameter, if not all.
        """
        module = submodule(layer, self.path)
        packed = _quantized(module) is not None
        found: dict[str, Tensor] = {}
        for kind, name in (("weight", self.weight), ("bias", self.bias)):
            t = getattr(module, name, None)
            if t is not None:
                t = t if part is None else part(t)
                parts = (t,) * len(self.names) if packed and kind == "weight" else self._parts(t)
                found |= zip((f"{n}.{kind}" for n in self.names), parts, strict=True)
        return found

    @property
    def dealt_out(self) -> str | None:
        """In which way tensor parallelism deals the module out, if it does."""
        if "norm" in self.names[0]:
            return parallel.SUMMED if self.names[0] in _HEADS_NORMS else None
        return parallel.ROWS if self.names[0] in _READERS else parallel.COLUMNS

    def part_of(self, processes: int) -> Source:
        """Where a process has its part. Raises `UnsupportedError` where the rows that it has are not one of each."""
        if self.rows and processes > 1:
            raise UnsupportedError(f"{self.path} is dealt out to processes (tensor parallelism), and holds several")
        return dataclasses.replace(self, heads=self.heads // processes)

    def packed(self, layer: nn.Module, dtype: torch.dtype) -> list[Packed]:
        """What makes matrices of such a weight, for an x of this dtype."""
        base = _quantized(submodule(layer, self.path))
        if base is None:
            return []
        matrix = quantized.Matrix(base, dtype)
        return [Packed(tuple(f"{n}.weight" for n in self.names), matrix.dtype, lambda t: self._split(matrix(t)))]

    def matrices(self, layer: nn.Module) -> dict[str, Tensor]:
        """What has the shapes of these matrices, on the meta device."""
        base = _quantized(submodule(layer, self.path))
        if base is None:
            return {}
        parts = self._split(torch.empty(quantized.shape_of(base), device="meta"))
        return {f"{n}.weight": t for n, t in zip(self.names, parts, strict=True)}

    def adapters(self, layer: nn.Module) -> list[tuple[LowRank, Tensor, Tensor]]:
        """What LoRA adds to them in this call, with its A and B."""
        module = submodule(layer, self.path)
        if not lora.is_adapted(module):
            return []
        return [
            (LowRank(name, key, a.shape[0], scale, rate), a, part)
            for key, a, b, scale, rate in lora.active(module)
            for name, part in zip(self.names, self._split(b), strict=True)
        ]

    def _parts(self, t: Tensor) -> tuple[Tensor, ...]:
        return self._split(t.t() if self.transposed and t.dim() == 2 else t)

    def _split(self, t: Tensor) -> tuple[Tensor, ...]:
        """Rows (out, ...) of each."""
        if self.heads:
            return tuple(p.flatten(0, 1) for p in t.unflatten(0, (self.heads, len(self.names), -1)).unbind(1))
        # One split, not slices: its gradient is one concatenation.
        return t.split(self.rows) if len(self.names) > 1 else (t,)


_HEADS_NORMS = tuple(f"{ATTENTION}.{n}_norm" for n in "qk")
_READERS = (f"{ATTENTION}.o_proj", f"{MLP}.down_proj")  # of what is dealt out


def _quantized(module: nn.Module) -> Any:
    """The linear layer that the module is, or has adapters beside, if its weight is quantized."""
    base = lora.base_of(module)
    return base if quantized.is_quantized(base) else None


@dataclasses.dataclass(frozen=True)
class Mapping:
    """A layer as a block: what it computes, and where its weights are.

    `sinks` is the name of the parameter that holds attention's, where it has any (on the generic path alone).
    `adapted`: LoRA adapters stand beside some of its linear layers; `quantized`: some of their weights are of 4 bits.
    `moving` says where RoPE's frequencies are to be read at each call, where they depend on it. `rates`: where those of
    dropout are, by the spec's names of them; "inside" is one that a block does not have, which has to stay 0. `text`:
    the spec as a string. `why` it is on the generic path, where it is. `kinds` are the classes of the modules that are
    read, by path: another class there means that the layer has changed. `complete`: they are all that run, so that
    another module beside them would not. `dealt`: tensor parallelism has dealt it out, and spec and sources are of what
    this process has. `numbers`: those of the layer's modules that the spec, or a trace of the layer, goes by.
    """

    spec: BlockSpec
    sources: tuple[Source, ...]
    kinds: tuple[tuple[str, type], ...]
    why: str = ""
    sinks: str | None = None
    moving: MovingRope | None = None
    adapted: bool = False
    quantized: bool = False
    rates: tuple[tuple[str, str], ...] = ()
    complete: bool = False
    dealt: parallel.Dealt | None = None
    numbers: Numbers = ()
    text: str = dataclasses.field(init=False, compare=False)
    biased: frozenset[str] = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.spec.to_string())
        biased = (name for name in parameter_shapes(self.spec) if name.endswith(".bias"))
        object.__setattr__(self, "biased", frozenset(name.removesuffix(".bias") for name in biased))

    def spec_now(self, layer: nn.Module) -> BlockSpec:
        """The spec for the call under way."""
        spec = self.spec_but_for_rope(layer)
        return spec if self.moving is None else self.moving.now(spec)

    def spec_but_for_rope(self, layer: nn.Module) -> BlockSpec:
        """The same, with RoPE's frequencies as they were when the mapping was made: they are not read."""
        text = self.text_now(layer)
        return self.spec if text == self.text else BlockSpec.from_string(text)

    def text_now(self, layer: nn.Module) -> str:
        """The spec for the call under way, as a string, but for RoPE's frequencies: what a compiled graph can hold."""
        return self._text_with(self._adapters(layer), layer)

    def _text_with(self, adapters: list[tuple[LowRank, Tensor, Tensor]], layer: nn.Module) -> str:
        text = self.text
        if self.has_other_rates(layer):
            text = _with_rates(text, tuple(self._rates_now(layer)))
        if not self.adapted:
            return text
        return _beside(text, tuple(tuple(entry) for entry, _, _ in adapters), layer.training)

    def has_other_rates(self, layer: nn.Module) -> bool:
        """Dropout's rates are others than when the mapping was made."""
        return any(rate != getattr(self.spec, name) for name, rate in self._rates_now(layer))

    def _rates_now(self, layer: nn.Module) -> list[tuple[str, float]]:
        return [(name, rate_now(layer, name, path)) for name, path in self.rates if name != "inside"]

    def _adapters(self, layer: nn.Module) -> list[tuple[LowRank, Tensor, Tensor]]:
        return [found for source in self.sources for found in source.adapters(layer)] if self.adapted else []

    def weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """The block's weights in the order of `parameter_shapes`; biases that the layer lacks are zeros."""
        found: dict[str, Tensor] = {}
        for source in self.sources:
            found |= source.read(layer, self._part(source))
        like = next(iter(found.values()))
        adapters = self._adapters(layer)
        for adapter, a, b in adapters:
            found |= {adapter.a: a, adapter.b: b}
        shapes = _shapes(self._text_with(adapters, layer))
        return {n: found[n] if n in found else like.new_zeros(s) for n, s in shapes}

    def _part(self, source: Source) -> Callable[[Tensor], Tensor] | None:
        """What this process has of the source's parameters, if not all."""
        if self.dealt is None:
            return None
        processes = self.dealt.processes
        if source.dealt_out == parallel.SUMMED and processes.sums_qk_norm:
            return functools.partial(parallel.summed_part, processes=processes)
        return own_part

    def packed(self, layer: nn.Module, dtype: torch.dtype) -> tuple[Packed, ...]:
        """What of the block's weights is to be made of quantized ones, for an x of this dtype."""
        return tuple(p for source in self.sources for p in source.packed(layer, dtype)) if self.quantized else ()

    def matrices(self, layer: nn.Module) -> dict[str, Tensor]:
        """What has the shapes of the matrices that quantized weights stand for, by name, on the meta device."""
        found = (source.matrices(layer) for source in self.sources if self.quantized)
        return {n: t for of_source in found for n, t in of_source.items()}

    def check(self, layer: nn.Module) -> None:
        """Raise `UnsupportedError` where the layer's weights do not make up the spec's parameters."""
        shapes = parameter_shapes(self.spec)
        with _whole(layer):
            found = {name: t.shape for source in self.sources for name, t in source.read(layer, _whole_shape).items()}
        odd = sorted(n for n in found if n not in shapes)
        missing = sorted(n for n in shapes if n not in found and not n.endswith(".bias"))
        if odd or missing:
            raise UnsupportedError(f"its parameters are not a block's: {', '.join(odd + missing)} too many or missing")
        for name, shape in (found | {n: t.shape for n, t in self.matrices(layer).items()}).items():
            if shape != torch.Size(shapes[name]):
                raise UnsupportedError(f"{name} has shape {tuple(shape)}, expected {shapes[name]}")

    def part_of(self, dealt: parallel.Dealt) -> Mapping:
        """What this process has of it, of a layer that is dealt out to some.

        Raises `UnsupportedError` where its parts can't be a block's.
        """
        why = dealt.processes.why_not(self.spec)
        if self.adapted or self.quantized:
            why = "it is quantized, or has adapters"
        if why is not None:
            raise UnsupportedError(f"it is dealt out to processes (tensor parallelism), and {why}")
        sources = tuple(source.part_of(dealt.processes.size) for source in self.sources)
        return dataclasses.replace(self, spec=dealt.processes.part_of(self.spec), sources=sources, dealt=dealt)

    def change(self, layer: nn.Module) -> str | None:
        """What about the layer's inside has changed since the mapping was made, or None."""
        for path, kind in self.kinds:
            module = _submodule(layer, path)
            if module is None:
                return f"{path} has been taken away since it was swapped (unswap and swap again)"
            if type(module) is not kind:
                now, then = (f"{k.__module__}.{k.__name__}" for k in (type(module), kind))
                return f"{path} is now a {now}, not the {then} {ANEW}"
            if watched(module) and not (self.dealt is not None and self.dealt.knows(path, module)):
                return f"{path} {what_watches(module)}{_advice(layer)}"
            if not self.complete and (patched := is_patched(module)) is not None:
                return patched
            try:
                if self.adapted and lora.is_adapted(module):
                    lora.check(path, module)
                if self.quantized and quantized.is_quantized(module):
                    quantized.check(path, module)
            except UnsupportedError as reason:
                return str(reason)
        if self.complete and (odd := self._change_beside(layer)) is not None:
            return odd
        if self.why and lacks_parameters(layer):
            return "under FSDP1 it takes use_orig_params=True, else modules have no parameters"
        return self._added_bias(layer) or other_number(layer, self.numbers) or self._change_of_rates(layer)

    def _change_beside(self, layer: nn.Module) -> str | None:
        """Of modules that it did not have: those of adapters run, if nothing watches them."""
        known = {"", *(path for path, _ in self.kinds)}
        unknown = {path: module for path, module in layer.named_modules() if path not in known}
        adapters = lora.inside(layer) if unknown else {}
        for path, module in unknown.items():
            if path not in adapters:
                return f"{path} has been added since it was swapped (unswap and swap again)"
            if watched(module):
                return f"{path} {what_watches(module)}"
        return None

    def _added_bias(self, layer: nn.Module) -> str | None:
        for source in self.sources:
            added = source.names[0] not in self.biased
            if added and getattr(submodule(layer, source.path), source.bias, None) is not None:
                return f"{source.path} now has a bias, which it had not when swapped (unswap and swap again)"
        return None

    def _change_of_rates(self, layer: nn.Module) -> str | None:
        try:
            found = read_rates(layer, self.rates)
        except UnsupportedError as reason:
            return str(reason)
        if found.get("inside") or (self.why and found.get("dropout")):
            return "its dropout was switched on since it was swapped, where its block has none (unswap and swap again)"
        if self.dealt is not None and any(found.values()):
            return "its dropout was switched on since it was swapped, and processes would draw others (swap again)"
        if not (layer.training or self.why):  # a block has one mode, its own modules have theirs
            on = next(
                (path for name, path in self.rates if rate_at(layer, path) and _drops_at(layer, name, path)), None
            )
            return on and f"{on} is in training mode, and drops values, in a layer in eval mode"
        return None


def _whole_shape(t: Tensor) -> Tensor:
    """What has the shape of a parameter that may be dealt out to processes."""
    return torch.empty(t.shape, device="meta") if is_dealt_out(t) else t


def _submodule(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return submodule(layer, path)
    except AttributeError:
        return None


def read_rates(layer: nn.Module, rates: tuple[tuple[str, str], ...]) -> dict[str, float]:
    """The rates of dropout now, by name. Raises `UnsupportedError` where two of one name differ."""
    found: dict[str, float] = {}
    for name, path in rates:
        rate = rate_now(layer, name, path)
        if found.setdefault(name, rate) != rate:
            both = sorted((found[name], rate))
            raise UnsupportedError(f"dropout after attention and after the MLP differ: {both}")
    return found


def rate_now(layer: nn.Module, name: str, path: str) -> float:
    """Of a layer's dropout while it is in training mode: none where what drops is in eval mode then."""
    rate = rate_at(layer, path)
    return 0.0 if rate and layer.training and not _drops_at(layer, name, path) else rate


def _drops_at(layer: nn.Module, name: str, path: str) -> bool:
    """The mode of what drops: a torch.nn.Dropout, or what has the rate. Attention asks for its own in any case."""
    around, _, last = path.rpartition(".")
    holder = submodule(layer, around)
    dropout = getattr(holder, last)
    asked = dropout if isinstance(dropout, nn.Module) and name != "attention_dropout" else holder
    return bool(asked.training)


def rate_at(layer: nn.Module, path: str) -> float:
    """Of a torch.nn.Dropout there, of an Identity in the place of one, or a number."""
    value: Any = layer
    for part in path.split("."):
        value = getattr(value, part)
    if isinstance(value, nn.Identity):
        return 0.0
    return float(value.p if isinstance(value, nn.Dropout) else value)


# What torch.compile need not trace: it guards what the arguments are made of, which are strings and numbers.


@constant_result
def _beside(text: str, low_rank: tuple[tuple[Any, ...], ...], training: bool) -> str:
    """The spec with adapters, whose dropout may be on where the layer's own is off."""
    return _cached_beside(text, low_rank, training)


@functools.lru_cache(maxsize=256)
def _with_rates(text: str, rates: tuple[tuple[str, float], ...]) -> str:
    """The spec with these rates of dropout, which were others when the layer was swapped."""
    changes: Any = dict(rates)
    return dataclasses.replace(BlockSpec.from_string(text), **changes).to_string()


@functools.lru_cache(maxsize=256)
def _cached_beside(text: str, low_rank: tuple[tuple[Any, ...], ...], training: bool) -> str:
    spec = BlockSpec.from_string(text)
    spec = spec if training else dataclasses.replace(spec, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(spec, low_rank=tuple(LowRank(*a) for a in low_rank)).to_string()


@constant_result
def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(parameter_shapes(BlockSpec.from_string(text)).items())


@constant_result
def drops(text: str) -> bool:
    """Whether a block of this spec draws random numbers in training."""
    return BlockSpec.from_string(text).drops


def _sharded(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that DeepSpeed's ZeRO-3 has dealt out to the processes."""
    return [p for p in layer.parameters() if hasattr(p, "ds_id")]


def _whole(layer: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The layer's parameters gathered, where they are dealt out: in every process of the group at once."""
    sharded = _sharded(layer)
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def _advice(layer: nn.Module) -> str:
    """What to do about hooks on the modules inside the layer."""
    if not _sharded(layer):
        return ""
    return (
        " (for ZeRO-3 to gather a layer whole, call deepspeed.utils.set_z3_leaf_modules(model, "
        f"[{type(layer).__name__}]) before deepspeed.initialize)"
    )


def bias_of(names: set[str]) -> bool | str:
    """The smallest of BlockSpec's kinds of `bias` that has biases on these linear layers."""
    parts = {n.rpartition(".")[2].removesuffix("_proj") for n in names}
    for kind, members in (("qkv", "q k v"), ("attention", "q k v o"), ("mlp", "gate up down")):
        if parts and parts <= set(members.split()):
            return kind
    return bool(parts)
