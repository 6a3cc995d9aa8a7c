"""A decoder layer of any class, by its own forward: up to its attention function, and from there on.

`pyckpt.swap.probe` finds out whether that is exact, and how the class calls its attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyckpt.attend.dense import DenseAttend
from pyckpt.block import CheckpointedBlock
from pyckpt.compiling import uncompiled
from pyckpt.exec.plan import generic_plan
from pyckpt.exec.resident import BlockPlan
from pyckpt.save import Save
from pyckpt.spec import BlockSpec, Window
from pyckpt.swap import lora
from pyckpt.swap.apart import apart
from pyckpt.swap.by_thread import ByThread
from pyckpt.swap.generic import ADVICE, SINKS, OwnModulesBlock, inner
from pyckpt.swap.handing import MASK, Arguments, Handing, Placed
from pyckpt.swap.layer import Call, SwappedLayer
from pyckpt.swap.modules import UnsupportedError, submodule
from pyckpt.swap.numbers import numbers_of
from pyckpt.swap.tap import Idle, Tap, configs_of, tapped
from pyckpt.swap.unread import stand_in
from pyckpt.swap.weights import Mapping, rate_at
from pyckpt.tokenwise.generic import precision
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.seeded import SeededTokenwise, drops_inside
from pyckpt.tokenwise.settings import Settings


@dataclasses.dataclass(frozen=True)
class Trace:
    """How a layer's forward falls into `pre` and `post`, and what its attention is.

    `attention`: the path of the module that calls the attention function. `dropout`: its rate, or the path where the
    layer has that. `pre`, `post`: the layer's parameters that each runs on. `idle`: modules that `post` need not run,
    with their outputs' widths; `unread`: modules whose outputs its gradients do not depend on. `arguments`: names
    of what the layer is called with, beside hidden states and mask. `returns`: the length of the tuple that it returns,
    0 for none. `draws`: it drops values by functions, which no module tells of.
    """

    attention: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: Window
    softcap: float
    scale: float
    dropout: float | str
    sinks: str | None
    pre: tuple[str, ...]
    post: tuple[str, ...]
    idle: tuple[tuple[str, int], ...]
    unread: tuple[str, ...]
    arguments: tuple[str, ...]
    returns: int
    draws: bool

    def parts(self, names: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of the layer's parameters now that `pre` and `post` run on, of adapters that were added since too."""
        return self._of_part(self.pre, names), self._of_part(self.post, names)

    def _of_part(self, known: tuple[str, ...], names: Collection[str]) -> tuple[str, ...]:
        units = {unit_of(n, self.attention) for n in known}
        return tuple(n for n in names if unit_of(n, self.attention) in units)

    def attend(self, dropout: float) -> DenseAttend:
        return DenseAttend(
            self.n_heads,
            self.n_kv_heads,
            self.head_dim,
            self.window,
            self.softcap,
            self.scale,
            dropout,
            self.sinks and SINKS,
            None if self.v_head_dim == self.head_dim else self.v_head_dim,
        )


class TracedTokenwise(SeededTokenwise):
    """`pre` and `post` of one call, `around` each forward of the layer.

    What is no weight of theirs is on the meta device, so that it can't be read.
    """

    _advice = ADVICE

    def __init__(
        self, block: TracedBlock, arguments: Arguments | Placed, precision: AbstractContextManager[Any]
    ) -> None:
        trace = block.trace
        self._trace, self._tap, self._arguments, self.around = trace, block.tap, arguments, precision
        self._pre_of, self._post_of = block.parts()
        self.pre_names = tuple(f"pre.{n}" for n in self._pre_of)
        self.post_names = tuple(f"post.{n}" for n in self._post_of)
        idle: dict[str, nn.Module] = {path: Idle(width) for path, width in trace.idle}
        self._pre_twin, self._post_twin = apart(block.twin()), apart(block.twin(idle))
        unread = block.unread()
        self._post_again_twin = apart(block.twin(idle | unread)) if unread else self._post_twin
        self._settings = Settings(self._pre_twin, self._post_twin, self._post_again_twin)
        parts = ((self._pre_twin, self._pre_of), (self._post_twin, self._post_of))
        self._others = [_others(twin, names) for twin, names in parts]
        self._options: dict[str, Any] = {}

    @contextlib.contextmanager
    def _at(self, tile: Tile, site: int) -> Iterator[None]:
        self._options = {**self._arguments.at(tile), MASK: None}
        with super()._at(tile, site):
            yield

    def _call_pre(self, w: Weights, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = self._others[0] | {n: w[f"pre.{n}"] for n in self._pre_of}
        taken = self._tap.take(lambda: self._call(self._pre_twin, values, x))
        return taken.q, taken.k, taken.v

    def _call_post(self, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        return self._posted(self._post_twin, w, x, o)

    def _call_post_again(self, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        return self._posted(self._post_again_twin, w, x, o)

    def _posted(self, twin: nn.Module, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        values = self._others[1] | {n: w[f"post.{n}"] for n in self._post_of}
        heads = o.unflatten(1, (self._trace.n_heads, -1))
        made = self._tap.fill(lambda: self._call(twin, values, x), heads)
        return (made[0] if isinstance(made, tuple) else made)[0]

    def _call(self, twin: nn.Module, values: dict[str, Tensor], x: Tensor) -> Any:
        with self.around:
            return functional_call(twin, values, (x[None],), self._options)


@functools.cache
def unit_of(path: str, attention: str) -> str:
    """The outermost module that holds the module or parameter at `path` and does not hold the attention."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        if not is_around(".".join(parts[:i]), attention):
            return ".".join(parts[:i])
    return path


def is_around(path: str, attention: str) -> bool:
    return path in ("", attention) or attention.startswith(f"{path}.")


def _others(twin: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    chosen = frozenset(names)
    return {n: torch.empty_like(p, device="meta") for n, p in twin.named_parameters() if n not in chosen}


class TracedBlock(OwnModulesBlock):
    """A layer's own forward around our attention.

    It has to be told what the layer is called with (`called_with`), or takes what the model hands to the layer at its
    `place`, made anew for each tile, where there is a `handing`.
    """

    handing: Handing | None = None
    place = 0

    def __init__(self, layer: nn.Module, mapping: Mapping, save: str | Save, tile: int | None, trace: Trace) -> None:
        super().__init__(layer, mapping, save, tile)
        self.trace, self.tap = trace, Tap()
        self._configs = configs_of(layer, self.tap)
        self._of_call = ByThread()

    def twin(self, replaced: dict[str, nn.Module] | None = None) -> nn.Module:
        # Anew for each call: what was put into the layer since is in it.
        return tapped(self._layer[0], self._configs, replaced)

    def unread(self) -> dict[str, nn.Module]:
        """What stands in a backward for modules whose outputs it does not read."""
        modules = dict(self._layer[0].named_modules())
        found = {path: stand_in(modules.get(path)) for path in self.trace.unread}  # an adapter's may be gone
        return {path: m for path, m in found.items() if m is not None}

    @contextlib.contextmanager
    def called_with(self, given: dict[str, Any], batch: int, seq: int) -> Iterator[None]:
        """Plans made inside are for a call of the layer with these arguments."""
        self._of_call.arguments = Arguments({n: given.get(n) for n in self.trace.arguments}, batch, seq)
        try:
            yield
        finally:
            del self._of_call.arguments

    @property
    def drops(self) -> bool:
        training = any(m.training for m in self._layer[0].modules())
        return self._attend().dropout > 0.0 or drops_inside(self._layer[0]) or (self.trace.draws and training)

    def _attend(self) -> DenseAttend:
        layer, rate = self._layer[0], self.trace.dropout
        if not submodule(layer, self.trace.attention).training:
            return self.trace.attend(0.0)
        return self.trace.attend(rate_at(layer, rate) if isinstance(rate, str) else rate)

    def weights(self) -> dict[str, Tensor]:
        return self.named(dict(self._layer[0].named_parameters()))

    def parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The layer's parameters that `pre` and `post` run on now."""
        return self.trace.parts([n for n, _ in self._layer[0].named_parameters()])

    def named(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The block's weights, from the layer's parameters by name."""
        parts = zip(("pre", "post"), self.trace.parts(found), strict=True)
        weights = {f"{part}.{n}": found[n] for part, names in parts for n in names}
        return weights | ({SINKS: found[self.trace.sinks]} if self.trace.sinks else {})

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        around = precision(device, x_dtype, dtype)
        tokenwise = TracedTokenwise(self, self._handed(around), around)
        options: Any = (self.tile, self.d_model, tokens, dtype, device, self.tile_bytes)
        return generic_plan(tokenwise, self._attend(), self._save, *options)

    def _handed(self, around: AbstractContextManager[Any]) -> Arguments | Placed:
        arguments: Arguments | None = self._of_call.arguments
        if arguments is not None:
            return arguments
        if self.handing is None:
            raise RuntimeError("this layer runs on what its model hands to it, and cannot be planned without a call")
        return Placed(self.handing, self.place, self.trace.arguments, around)


def cut_mapping(layer: nn.Module, attention: str, width: int, why: str) -> Mapping:
    """Of a layer that is cut at its attention, with hidden states of this width; `why` it is no standard block."""
    # Of the spec the block reads its width alone; the trace has the rest.
    spec = BlockSpec.make(width, 1, rope_theta=None, mlp="gelu")
    adapters = lora.inside(layer)
    kinds = tuple((path, type(m)) for path, m in inner(layer) if path not in adapters)
    return Mapping(spec, (), kinds, why, complete=True, numbers=numbers_of(layer, ("", attention)))


class TracedLayer(SwappedLayer):
    """A layer whose block takes what the layer is called with; it returns what the class returns."""

    block: TracedBlock
    handed = True

    def __init__(self, module: nn.Module, block: TracedBlock, place: int) -> None:
        # Without a handing it runs on what it is itself called with.
        super().__init__(module, block, place, apart=block.handing is None, surveyed=True)

    @property
    def reach(self) -> int | None:
        return None if self.block.trace.sinks else self.window

    @property
    def window(self) -> int:
        return self.block.trace.window[0]

    @property
    def softcap(self) -> float:
        return self.block.trace.softcap

    @uncompiled
    def run(self, blocks: list[CheckpointedBlock], x: Tensor, call: Call, given: dict[str, Any]) -> Any:
        alone = len(blocks) == 1 and (self.apart or call.stream is None)
        try:
            with self.block.called_with(given, *x.shape[:2]) if alone else contextlib.nullcontext():
                y = super().run(blocks, x, call, given)
        except UnsupportedError as reason:
            raise RuntimeError(
                f"a swapped {type(self.module).__name__} is called in another way than when it was tried out: "
                f"{reason}; call pyckpt.unswap(model)"
            ) from reason
        return self.returned(y)

    def returned(self, y: Tensor) -> Any:
        return (y, *[None] * (self.block.trace.returns - 1)) if self.block.trace.returns else y
