"""A decoder layer by its own modules around our attention: what runs adapters, and activations that no block has.

`pre` and `post` are put together from the layer's modules in the order that its family's `BlockSpec` gives, and are
differentiated by autograd, one tile at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyckpt.attend.dense import DenseAttend
from pyckpt.block import CheckpointedBlock
from pyckpt.exec.plan import generic_plan
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.tiling import TILE_BYTES
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.rope import rope_tables
from pyckpt.save import Save, SaveSet
from pyckpt.spec import BlockSpec
from pyckpt.swap.apart import apart
from pyckpt.swap.around import may_be_called_again, watched, what_watches
from pyckpt.swap.experts import UnreadExperts, are_known
from pyckpt.swap.modules import UnsupportedError, is_known, submodule
from pyckpt.swap.numbers import numbers_of
from pyckpt.swap.rope import MovingRope
from pyckpt.swap.shadow import twin_of, unsharded_class
from pyckpt.swap.weights import Mapping
from pyckpt.tokenwise.generic import in_place, precision, strip
from pyckpt.tokenwise.interface import Weights
from pyckpt.tokenwise.parameters import ATTENTION, norm_names
from pyckpt.tokenwise.seeded import SeededTokenwise, drops_inside
from pyckpt.tokenwise.settings import Settings

kernels = torch.ops.pyckpt
SINKS = "attend.sinks"  # among the weights, beside those of "pre." and "post."
ADVICE = "leave the model as it is: pyckpt.unswap(model)"
_QKV = tuple(f"{ATTENTION}.{n}_proj" for n in "qkv")


def check(layer: nn.Module, spec: BlockSpec) -> None:
    """Raise `UnsupportedError` where the layer's modules can't be run again tile by tile."""
    if spec.dropout:
        raise UnsupportedError("it drops values of its sublayers' outputs, which the generic path does not")
    names = [*_QKV, f"{ATTENTION}.o_proj", "mlp", *(n for n in _norms(spec) if n is not None)]
    missing = [n for n in names if not _has(layer, n)]
    if missing:
        raise UnsupportedError(f"it has no {', '.join(missing)}, of which the generic path is put together")
    drawing = next((path for path, module in inner(layer) if _draws(module)), None)
    if drawing is not None:
        raise UnsupportedError(f"{drawing} draws random numbers by itself")
    check_unwatched(layer)


def check_unwatched(layer: nn.Module, known: Callable[[str, nn.Module], bool] | None = None) -> None:
    """Raise `UnsupportedError` where a module inside the layer has forward hooks, but for those that are `known`."""
    _check_none(layer, watched, known)


def check_runs_twice(layer: nn.Module) -> None:
    """Raise `UnsupportedError` where hooks inside the layer would see a second run.

    Those that bring weights, inputs or outputs together may (ZeRO-3, FSDP2, tensor parallelism).
    """
    _check_none(layer, lambda module: not may_be_called_again(module))


def _check_none(
    layer: nn.Module, is_odd: Callable[[nn.Module], bool], known: Callable[[str, nn.Module], bool] | None = None
) -> None:
    all_odd = ((path, module) for path, module in inner(layer) if is_odd(module))
    odd = next(((path, module) for path, module in all_odd if known is None or not known(path, module)), None)
    if odd is not None:
        raise UnsupportedError(f"{odd[0]} {what_watches(odd[1])}")


def _draws(module: nn.Module) -> bool:
    """Of PEFT: LoHa and LoKr draw in every call, BOFT where it drops blocks, and none of them by `nn.Dropout`.

    Known by name, since a trial (`probe.check_steady`) needs weights, and can't tell these from what has a seed.
    """
    names = {kind.__name__ for kind in type(module).__mro__}
    return "LycorisLayer" in names or ("MultiplicativeDropoutLayer" in names and bool(getattr(module, "p", 0.0)))


def _norms(spec: BlockSpec) -> tuple[str | None, ...]:
    names = norm_names(spec)
    return names.attention, names.after_attention, names.mlp, names.after_mlp


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def inner(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside the layer, by path."""
    return [(path, module) for path, module in layer.named_modules() if path]


class _Pre(nn.Module):
    """q, k, v (t, heads * head_dim) of x (t, d_model) and positions (t,)."""

    def __init__(self, layer: nn.Module, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        norm = norm_names(spec).attention
        self.norm = layer.get_submodule(norm) if norm else nn.Identity()
        self.q_proj, self.k_proj, self.v_proj = (layer.get_submodule(n) for n in _QKV)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (layer.get_submodule(f"{ATTENTION}.{n}_norm") for n in "qk")

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.spec.qk_norm:
            q, k = self.q_norm(self._by_head(q)).flatten(1), self.k_norm(self._by_head(k)).flatten(1)
        if self.spec.rope_theta is not None:
            dtype = acc_dtype(q.dtype)
            scaling = self.spec.rope_scaling
            tables = rope_tables(positions, self.spec.d_rope, self.spec.rope_theta, scaling, dtype)
            rest = (*tables, False, self.spec.rope_interleaved)
            q, k = (kernels.rope(self._by_head(t), *rest).flatten(1) for t in (q, k))
        return q, k, v

    def _by_head(self, t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, self.spec.head_dim))


class _Post(nn.Module):
    """y (t, d_model) of x (t, d_model) and the attention output o (t, heads * head_dim)."""

    def __init__(self, layer: nn.Module, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.o_proj, self.mlp = layer.get_submodule(f"{ATTENTION}.o_proj"), layer.get_submodule("mlp")
        after_attention, mlp, after_mlp = _norms(spec)[1:]
        self.after_attention, self.before_mlp, self.after_mlp = (
            layer.get_submodule(n) if n else nn.Identity() for n in (after_attention, mlp, after_mlp)
        )

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        m = self.spec.residual_multiplier
        mid = x + m * self.after_attention(self.o_proj(o))
        source = x if self.spec.parallel else mid
        # As a batch of one: mixtures of experts ask for three dims.
        made = self.mlp(self.before_mlp(source)[None])
        return mid + m * self.after_mlp((made[0] if isinstance(made, tuple) else made)[0])


def _unread_experts(post: nn.Module) -> nn.Module | None:
    """`post` with what stands for its mixture's experts in a backward; None where it has none that are known.

    Of the families' mixtures: nothing but a sum reads what the experts make.
    """
    mlp = post.get_submodule("mlp") if isinstance(post, _Post) else None
    experts = getattr(mlp, "experts", None)
    if mlp is None or experts is None or not (is_known(unsharded_class(mlp)) and are_known(experts)):
        return None
    return twin_of(post, lambda _, config: config, {"mlp.experts": UnreadExperts(experts)})


class LayerTokenwise(SeededTokenwise):
    """Modules of a layer, in which nothing is put for a call."""

    _advice = ADVICE

    def __init__(
        self,
        pre: nn.Module,
        post: nn.Module,
        precision: AbstractContextManager[Any],
        post_again: nn.Module | None = None,
    ) -> None:
        """post_again: `post` in which nothing is made that no gradient depends on, where it is another."""
        super().__init__(apart(pre), apart(post), precision)
        self._post_again = None if self._post_twice or post_again is None else apart(post_again)
        if self._post_again is not None:
            self._settings = Settings(self._pre, self._post, self._post_again)

    def _call_post_again(self, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        if self._post_again is None:
            return self._call_post(w, x, o)
        with self._precision, in_place():
            return functional_call(self._post_again, strip(w, "post."), (x, o))


class OwnModulesBlock(CheckpointedBlock):
    """A block that runs a layer's own modules, on the layer's parameters, around our attention."""

    def __init__(self, layer: nn.Module, mapping: Mapping, save: str | Save, tile: int | None) -> None:
        super().__init__(mapping.spec.d_model, save, tile, TILE_BYTES)
        self.mapping = mapping
        self._layer = (layer,)

    @property
    def experts_per_token(self) -> int:
        counts = (getattr(m, "top_k", None) for m in self._layer[0].modules())
        return next((n for n in counts if isinstance(n, int)), 1)

    def mixes_dtypes(self, name: str) -> bool:
        return True  # adapters have a dtype of their own

    def _check_save(self, save: SaveSet) -> SaveSet:
        # What lies inside `post` it can't see; it keeps the rest of the save set.
        return SaveSet(save.name, attention=save.attention, qkv=save.qkv)


Parts = tuple[nn.Module, nn.Module]


class GenericMappedBlock(OwnModulesBlock):
    """The modules in the order that the layer's family has, those of a decoder layer here."""

    def __init__(self, layer: nn.Module, mapping: Mapping, save: str | Save, tile: int | None) -> None:
        super().__init__(layer, mapping, save, tile)
        self._put_together: tuple[list[Any], Parts] = self._read(), self._made_of(layer, mapping.spec)
        self.draws = False  # that a function drops in training, and no module for it

    @property
    def parts(self) -> Parts:
        """`pre` and `post` (see `CkptGenericBlock`) of what is in the layer now: a module may have been replaced."""
        now = self._read()
        then, parts = self._put_together
        if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
            parts = self._made_of(self._layer[0], self.mapping.spec)
            self._put_together = now, parts
        return parts

    def _read(self) -> list[Any]:
        """What of the layer its parts are made of."""
        layer, spec = self._layer[0], self.mapping.spec
        norms = [*(f"{ATTENTION}.{n}_norm" for n in "qk" if spec.qk_norm), *(n for n in _norms(spec) if n is not None)]
        return [submodule(layer, n) for n in (*_QKV, f"{ATTENTION}.o_proj", "mlp", *norms)]

    def _made_of(self, layer: nn.Module, spec: BlockSpec) -> Parts:
        return _Pre(layer, spec), _Post(layer, spec)

    @property
    def drops(self) -> bool:
        layer = self._layer[0]
        by_function = self.draws and any(m.training for m in layer.modules())
        return by_function or self._attend().dropout > 0.0 or drops_inside(layer)

    def _attend(self) -> DenseAttend:
        spec = self.mapping.spec_but_for_rope(self._layer[0])
        attend = dataclasses.replace(DenseAttend.of(spec), sinks=self.mapping.sinks and SINKS)
        training = submodule(self._layer[0], ATTENTION).training
        return attend if training else dataclasses.replace(attend, dropout=0.0)

    def weights(self) -> dict[str, Tensor]:
        parts = zip(("pre", "post"), self.parts, strict=True)
        found: dict[str, Tensor] = {f"{n}.{k}": p for n, m in parts for k, p in m.named_parameters()}
        if self.mapping.sinks:
            found[SINKS] = self._layer[0].get_parameter(self.mapping.sinks)
        return found

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        options: Any = (self.tile, self.d_model, tokens, dtype, device, self.tile_bytes)
        pre, post = self.parts
        if self.mapping.moving is not None:
            pre = _Pre(self._layer[0], self.mapping.spec_now(self._layer[0]))  # of this call, also in its backward
        again = None if self.mapping.spec.norms_after else _unread_experts(post)
        tokenwise = LayerTokenwise(pre, post, precision(device, x_dtype, dtype), again)
        return generic_plan(tokenwise, self._attend(), self._save, *options)


def mapping_of(
    layer: nn.Module,
    spec: BlockSpec,
    why: str,
    sinks: str | None = None,
    moving: MovingRope | None = None,
    rates: tuple[tuple[str, str], ...] = (),
) -> Mapping:
    """The mapping of a layer on the generic path; `why` it is not on the standard one."""
    check(layer, spec)
    kinds = tuple((path, type(module)) for path, module in inner(layer))
    return Mapping(spec, (), kinds, why, sinks, moving, rates=rates, numbers=numbers_of(layer, ("", ATTENTION)))
