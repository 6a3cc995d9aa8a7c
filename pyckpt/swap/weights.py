"""Where a block's weights are among the parameters of another layer."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import Tensor, nn

from pyckpt.spec import BlockSpec
from pyckpt.swap.rope import MovingRope
from pyckpt.tokenwise.parameters import parameter_shapes


class UnsupportedError(Exception):
    """The layer computes something that a standard block does not; the message says what."""


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

    def read(self, layer: nn.Module) -> dict[str, Tensor]:
        """The block's parameters by name, views of the layer's (copies with `heads`), differentiable."""
        module = layer.get_submodule(self.path)
        found: dict[str, Tensor] = {}
        for kind, name in (("weight", self.weight), ("bias", self.bias)):
            t = getattr(module, name, None)
            if t is not None:
                found |= zip((f"{n}.{kind}" for n in self.names), self._parts(t), strict=True)
        return found

    def _parts(self, t: Tensor) -> tuple[Tensor, ...]:
        if self.transposed and t.dim() == 2:
            t = t.t()
        if self.heads:
            return tuple(p.flatten(0, 1) for p in t.unflatten(0, (self.heads, len(self.names), -1)).unbind(1))
        # One split, not slices: its gradient is one concatenation.
        return t.split(self.rows) if len(self.names) > 1 else (t,)


@dataclasses.dataclass(frozen=True)
class Mapping:
    """A layer as a block: what it computes, and where its weights are.

    `sinks` is the name of the parameter that holds attention's, where it has any (on the generic path alone).
    `moving` says where RoPE's frequencies are to be read at each call, where they depend on it.
    `why` it is on the generic path, where it is. `kinds` are the classes of the modules that are read, by path: another
    class there means that the layer has changed.
    """

    spec: BlockSpec
    sources: tuple[Source, ...]
    kinds: tuple[tuple[str, type], ...]
    why: str = ""
    sinks: str | None = None
    moving: MovingRope | None = None

    @property
    def spec_now(self) -> BlockSpec:
        """The spec for the call under way."""
        return self.spec if self.moving is None else self.moving.now(self.spec)

    def weights(self, layer: nn.Module) -> dict[str, Tensor]:
        """The block's weights in the order of `parameter_shapes`; biases that the layer lacks are zeros."""
        found: dict[str, Tensor] = {}
        for source in self.sources:
            found |= source.read(layer)
        like = next(iter(found.values()))
        shapes = parameter_shapes(self.spec)
        return {n: found[n] if n in found else like.new_zeros(s) for n, s in shapes.items()}

    def check(self, layer: nn.Module) -> None:
        """Raise `UnsupportedError` where the layer's weights do not make up the spec's parameters."""
        shapes = parameter_shapes(self.spec)
        with _whole(layer):
            found = {name: t for source in self.sources for name, t in source.read(layer).items()}
        odd = sorted(n for n in found if n not in shapes)
        missing = sorted(n for n in shapes if n not in found and not n.endswith(".bias"))
        if odd or missing:
            raise UnsupportedError(f"its parameters are not a block's: {', '.join(odd + missing)} too many or missing")
        for name, t in found.items():
            if t.shape != torch.Size(shapes[name]):
                raise UnsupportedError(f"{name} has shape {tuple(t.shape)}, expected {shapes[name]}")

    def change(self, layer: nn.Module) -> str | None:
        """What about the layer's inside has changed since the mapping was made, or None."""
        for path, kind in self.kinds:
            module = layer.get_submodule(path)
            if type(module) is not kind:
                now, then = (f"{k.__module__}.{k.__name__}" for k in (type(module), kind))
                return f"{path} is now a {now}, not the {then} it was when swapped (unswap and swap again)"
            if watched(module):
                return f"{path} has forward hooks, which a swapped layer would not run{_advice(layer)}"
        return None


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


def is_known(kind: type) -> bool:
    """A class of PyTorch or transformers themselves: adapters have classes of the same names."""
    return kind.__module__.startswith(("torch.nn.modules.", "transformers."))


def norm_eps(module: nn.Module) -> float | None:
    """The eps of an RMSNorm or a LayerNorm of a known class; None of anything else."""
    if not (type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and is_known(type(module))):
        return None
    return next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)


# By which transformers records attentions and hidden states, and makes embeddings want a gradient for checkpointing.
_HARMLESS_HOOKS = ("output_capturing_hook", "make_inputs_require_grads")


def watched(module: nn.Module, replaced: bool = False) -> bool:
    """The module has forward hooks, other than transformers' own that change no value.

    Or a forward of its own, as Accelerate puts there, unless that is known to be `replaced`.
    """
    if "forward" in module.__dict__ and not replaced:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(h, "__name__", "") not in _HARMLESS_HOOKS for h in hooks)


def bias_of(names: set[str]) -> bool | str:
    """The smallest of BlockSpec's kinds of `bias` that has biases on these linear layers."""
    parts = {n.rpartition(".")[2].removesuffix("_proj") for n in names}
    for kind, members in (("qkv", "q k v"), ("attention", "q k v o"), ("mlp", "gate up down")):
        if parts and parts <= set(members.split()):
            return kind
    return bool(parts)
