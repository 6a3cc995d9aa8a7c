"""Which path a decoder layer takes: a standard block, its family's modules in order, or its own forward cut in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.attend.dense import DenseAttend
from pyckpt.save import Save
from pyckpt.swap import attention, families, probe, recognize, trial
from pyckpt.swap import survey as surveys
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.code import odd_function
from pyckpt.swap.generic import GenericMappedBlock, check_unwatched
from pyckpt.swap.layer import SwappedLayer
from pyckpt.swap.modules import UnsupportedError, is_own_forward, passes, whose
from pyckpt.swap.rope import MovingRope
from pyckpt.swap.shadow import unsharded_class
from pyckpt.swap.survey import Survey
from pyckpt.swap.traced import TracedLayer
from pyckpt.swap.weights import Mapping


class Chooser:
    """For the layers of one model, which is called for a look at what it hands to them where that matters."""

    def __init__(self, model: Any, paths: list[str], save: str | Save, tile: int | None) -> None:
        self._model, self._paths, self._save, self._tile = model, paths, save, tile
        self._seen: Survey | UnsupportedError | None = None
        self._alike: dict[Any, Any] = {}
        self._moving: dict[str, MovingRope] = {}
        self._widths: tuple[int, ...] | None = None

    def layer(self, layer: nn.Module, place: int) -> SwappedLayer:
        """The layer's new forward. Raises `UnsupportedError`, saying why there is none."""
        if not hasattr(self._model, "config"):
            raise UnsupportedError(whose(layer))
        other = attention.other(self._model.config)
        if other is not None:
            raise UnsupportedError(other)
        try:
            self._check_forward()
            mapping = families.mapping_of(layer, getattr(self._model, "rotary_emb", None), self._moving)
            block = self._block(layer, mapping)
        except UnsupportedError as reason:
            return self._tried(layer, place, str(reason))
        except AttributeError as error:
            return self._tried(layer, place, f"it is not as its class was made: {surveys.shown(error)}")
        return SwappedLayer(layer, block, place, apart=not self._fits(DenseAttend.of(mapping.spec)))

    def _block(self, layer: nn.Module, mapping: Mapping) -> MappedBlock | GenericMappedBlock:
        if not mapping.why:
            return MappedBlock(layer, mapping, self._save, self._tile)
        block = GenericMappedBlock(layer, mapping, self._save, self._tile)
        try:
            probe.check_steady(layer, block)
        except UnsupportedError as reason:
            raise UnsupportedError(f"{mapping.why}, and {reason}") from reason
        return block

    def _check_forward(self) -> None:
        """Raise `UnsupportedError` where what the layers are handed is not what transformers' models hand to them."""
        kind = unsharded_class(self._model)
        if not is_own_forward(kind):
            raise UnsupportedError(f"the forward of {kind.__name__} is not transformers' own, and may make other masks")
        if (odd := odd_function([kind])) is not None:
            raise UnsupportedError(odd)

    def _tried(self, layer: nn.Module, place: int, why: str) -> SwappedLayer:
        try:
            families.check_version()
            check_unwatched(layer)  # before it is called for a look
            handed = self._survey().handed[place]
            if isinstance(handed, str):
                raise UnsupportedError(handed)
            try:
                standing = self._standing(layer, handed, place)
            except Exception:  # tables of positions may end before those that are asked for
                standing = None
            block = trial.tried_block(layer, handed, why, self._save, self._tile, self._alike, standing)
            block.position_axes = self._survey().axes
            if isinstance(block, MappedBlock):
                apart = not self._fits(DenseAttend.of(block.mapping.spec))
                return SwappedLayer(layer, block, place, apart, surveyed=True)
            handing = self._survey().handing
            if handing is not None and self._fits(block.trace.attend(0.0)):
                block.handing, block.place = handing, place
            return TracedLayer(layer, block, place)
        except UnsupportedError as reason:
            raise UnsupportedError(why if str(reason) == why else f"{why}, and {reason}") from reason
        except Exception as error:
            # Of any class anything may be met.
            raise UnsupportedError(f"{why}, and it cannot be tried out: {surveys.shown(error)}") from error

    def _standing(self, layer: nn.Module, handed: surveys.Handed, place: int) -> trial.Standing | None:
        """For a layer that may be a standard block; None where it is to run its own forward.

        As one does in a model whose arguments do not follow from positions by RoPE alone.
        """
        survey = self._survey()
        if not (families.family_class(layer) and passes(self._check_forward) and survey.maskless):
            return None
        if survey.handing is None:
            return None
        device, rotary = next(layer.parameters()).device, getattr(self._model, "rotary_emb", None)
        positions, distant = surveys.far_positions(self._model.config, device), surveys.distant_positions(device)
        if survey.axes:
            positions, distant = (surveys.on_axes(p, survey.axes) for p in (positions, distant))
        x = torch.zeros(len(positions), handed.width, dtype=torch.float32, device=device)
        far = survey.handing.of(x, positions)[place]
        turning = [t for t in surveys.leaves(list(far.values())) if isinstance(t, Tensor) and t.is_floating_point()]
        if turning and not recognize.is_rope(survey.handing.of(x, distant)[place], distant, rotary):
            return None
        return trial.Standing(rotary, positions, far)

    def _fits(self, attend: DenseAttend) -> bool:
        """Whether a layer's keys, values and outputs are as wide as the first's: a streamed run has one store."""
        widths = (attend.n_heads, attend.n_kv_heads * attend.head_dim, attend.d_v, attend.d_o)
        self._widths = self._widths or widths
        return widths == self._widths

    def _survey(self) -> Survey:
        if self._seen is None:
            try:
                self._seen = surveys.survey(self._model, self._paths)
            except UnsupportedError as reason:
                self._seen = reason
            except Exception as error:
                self._seen = UnsupportedError(f"its model cannot be looked at: {surveys.shown(error)}")
        if isinstance(self._seen, UnsupportedError):
            raise UnsupportedError(str(self._seen))
        return self._seen

    def cuts(self) -> bool | None:
        """Whether position_ids that start anew cut the model's masks; None where that is not known."""
        if isinstance(self._seen, Survey):
            return self._seen.cuts or surveys.packs_by_itself(self._model.config)
        known = type(self._model).__name__ not in families.UNCUT
        return known or surveys.cuts_by_positions(self._model, self._paths)

    def axes(self, layers: list[SwappedLayer]) -> tuple[int, bool, bool]:
        """How many axes the model's position_ids may have, which all of these layers turn by; whether one more stands
        before them; and whether it trains without a cache (see `Survey`)."""
        if not all(s.surveyed for s in layers):
            return 0, False, False
        survey = self._survey()
        return survey.axes, survey.text, survey.trains_without_cache

    def maskless(self, layers: list[SwappedLayer]) -> bool:
        """The model may be given a mask in place of its own, which none of these layers reads."""
        return not any(s.surveyed for s in layers) or self._survey().maskless
