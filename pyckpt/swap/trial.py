"""A decoder layer that no table knows is tried out: whether it is a standard block, else whether it can be cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyckpt.exec import node
from pyckpt.exec.plan import standard_plan
from pyckpt.save import save_set
from pyckpt.spec import BlockSpec
from pyckpt.swap import families, quantized
from pyckpt.swap import survey as surveys
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.probe import FAR, TILE, Probe, Watch, close, exact
from pyckpt.swap.recognize import Cut, guesses
from pyckpt.swap.shadow import twin_of, untouched
from pyckpt.swap.survey import SEQ, Handed, packed_lengths, packed_positions
from pyckpt.swap.traced import TracedBlock, cut_mapping
from pyckpt.swap.weights import Mapping
from pyckpt.tokenwise.settings import mode


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a layer stands that may be a standard block: `rotary` is its model's rotary embedding.

    far: what the model hands to the layer for the tokens of two rows as one, at these `positions` (t,) or (t, axes).
    """

    rotary: nn.Module | None
    positions: Tensor
    far: dict[str, Any]


def tried_block(
    layer: nn.Module,
    handed: Handed,
    why: str,
    save: Any,
    tile: int | None,
    alike: dict[Any, Any],
    standing: Standing | None = None,
) -> MappedBlock | TracedBlock:
    """The layer's block, a standard one if it can be, with `standing`.

    Raises `UnsupportedError`, saying why it can't be cut; the layer stays as it is.

    `alike`: what makes layers alike, of those whose gradients were held to the layer's own, with their `Trace.unread`,
    or which guess was right. Of another one like them the output is; it is added to.
    """
    surveys.check_here(layer)
    device = next(layer.parameters()).device
    with untouched(layer) as changed, surveys.forked(device), exact(device):
        probe = Probe(quantized.plain(layer), handed, device)
        with untouched(probe.eager) as of_twins:
            cut = probe.cut()
            mapping = None if standing is None else _Standard(probe, layer, cut, standing).mapping(alike)
            trace = None if mapping is not None else probe.trace(cut, alike)
    if changed or of_twins:
        raise UnsupportedError(f"its {(changed or of_twins)[0]} keeps what it has seen")
    if mapping is not None:
        return MappedBlock(layer, mapping, save, tile)
    assert trace is not None
    return TracedBlock(layer, cut_mapping(layer, trace.attention, handed.width, why), save, tile, trace)


class _Standard:
    """Whether a layer that a probe has cut is a standard block: its output and gradients are held to the layer's own.

    The probe runs what has plain linear layers in the place of the layer's quantized ones.
    """

    def __init__(self, probe: Probe, layer: nn.Module, cut: Cut, standing: Standing) -> None:
        self._probe, self._layer, self._cut, self._standing = probe, layer, cut, standing

    def mapping(self, alike: dict[Any, Any]) -> Mapping | None:
        """The layer as a standard block; None where it is none. `alike`: see `tried_block`."""
        key = self._probe.key(("standard", self._cut.trace))
        known = alike.get(key, -1)
        if known is None:
            return None
        with self._probe.handed_far(self._standing.far):
            for number, guess in self._guesses(known):
                try:
                    sources = list(guess.sources)
                    mapping = families.finish(self._layer, dict(guess.options), sources, None, guess.rates)
                    self._check(mapping, gradients=number != known)
                except Exception:  # of a wrong guess anything may come
                    continue
                alike[key] = number
                return mapping
        alike[key] = None
        return None

    def _guesses(self, first: int) -> list[tuple[int, Any]]:
        """Numbered; this one before the others. An empty list where it can be no block."""
        try:
            families.check_forwards(self._layer)
            axes = self._standing.positions.shape[1] if self._standing.positions.dim() == 2 else 0
            found = list(enumerate(guesses(self._layer, self._cut, self._standing.rotary, axes)))
        except UnsupportedError:
            return []
        return sorted(found, key=lambda numbered: numbered[0] != first)

    def _check(self, mapping: Mapping, gradients: bool) -> None:
        """Raise `UnsupportedError` where the standard block's output is not the layer's.

        Nor, with `gradients`, its gradients, nor anything else that is the same of layers that are alike.
        """
        probe = self._probe
        if (odd := mapping.change(self._layer)) is not None:
            raise UnsupportedError(odd)  # a number of the layer's that it does not compute with, for one
        with mode(probe.layer, training=False), torch.no_grad():
            for kind in ("plain", FAR):
                if not close(self._forward(mapping, probe.x, kind), probe.layer_forward(probe.x, kind)):
                    raise UnsupportedError("its output is not that of this block")
            if not gradients:
                return
            if not self._reads_no_number():
                raise UnsupportedError("it reads positions")
        with mode(probe.layer, training=True), torch.no_grad(), Watch() as watch:
            probe.post({}, probe.some_o(self._cut.trace), probe.x[:1])
        if watch.drops:
            raise UnsupportedError("it drops values beside attention's")
        probe.compare_modes(lambda x, kind, _: self._forward(mapping, x, kind), gradients=True)

    def _reads_no_number(self) -> bool:
        """The layer makes the same of other whole numbers among its arguments, such as positions."""
        probe = self._probe
        truth = probe.layer_forward(probe.x, FAR)
        try:
            with probe.handed_far(_moved(self._standing.far)):
                return torch.equal(probe.layer_forward(probe.x, FAR), truth)
        except Exception:  # an index, say
            return False

    def _forward(self, mapping: Mapping, x: Tensor, kind: str) -> Tensor:
        """As the layer's block computes it, which drops nothing here."""
        handed, device = self._probe.handed, self._probe.device
        text, weights = self._read(mapping)
        spec = BlockSpec.from_string(text).without_dropout()
        plan = standard_plan(spec, save_set("attention"), TILE, 2 * SEQ, x.dtype, x.dtype, device)
        run, rest = node.Run([plan], [tuple(weights)], x.dtype), (None, tuple(weights.values()))
        if kind == FAR:
            return node.execute(run, x.reshape(1, 2 * SEQ, -1), self._standing.positions, None, *rest).view(x.shape)
        if kind == "packed" and handed.cut:
            return node.execute(run, x.flatten(0, 1), None, packed_lengths(device), *rest).view(x.shape)
        apart = kind == "packed" and not surveys.same(handed.plain, handed.packed)
        return node.execute(run, x, packed_positions(device).flatten() if apart else None, None, *rest)

    def _read(self, mapping: Mapping) -> tuple[str, dict[str, Tensor]]:
        """The block's spec and weights, of the probe's random ones in the layer's place."""
        reader = twin_of(self._probe.layer, lambda _, config: config)
        reader.__dict__["forward"] = lambda: (mapping.text_now(reader), mapping.weights(reader))
        found: tuple[str, dict[str, Tensor]] = functional_call(reader, self._probe.weights, ())
        return found


def _moved(values: Any) -> Any:
    """With other whole numbers in tensors, far from those that they had."""
    if isinstance(values, dict):
        return {n: _moved(v) for n, v in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_moved(v) for v in values)
    whole = isinstance(values, Tensor) and not values.is_floating_point() and values.dtype != torch.bool
    return values * 1009 + 2**20 if whole else values
