"""The forward of a model with swapped decoder layers: it turns masks into packed sequences, once for all layers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.attend.context import ContextParallel
from pyckpt.block import CheckpointedBlock
from pyckpt.compiling import uncompiled
from pyckpt.exec.lm_ends import Ends, Targets
from pyckpt.stream import Parts
from pyckpt.swap import again, attention, masks
from pyckpt.swap.around import gathers, watched, wraps
from pyckpt.swap.code import functions
from pyckpt.swap.families import odd_rotary
from pyckpt.swap.layer import CALL, Call, Gathered, Streaming, SwappedLayer
from pyckpt.swap.modules import UnsupportedCallError, UnsupportedError
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.rope import Frequencies
from pyckpt.swap.shadow import kinds_of, unsharded_class
from pyckpt.swap.survey import packs_by_itself

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Arguments that do not change what a layer computes from its hidden states, or that are looked at below.
_KNOWN = frozenset(
    (
        *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache"),
        *(
            "token_type_ids",
            "cache_position",
            "output_attentions",
            "output_router_logits",
            "output_hidden_states",
            "return_dict",
        ),
        # Beside position_ids, which say the same (TRL's packing): for kernels that take packed sequences.
        *(*_LENGTHS, "seq_idx"),
        *("num_items_in_batch", "labels", "shift_labels", "ignore_index", "logits_to_keep"),
    )
)
_FAR = 2**40  # beyond any sequence
# What is added to hidden states between layers (Qwen3-VL): then nobody may run several at once.
_BETWEEN = frozenset(("visual_pos_masks", "deepstack_visual_embeds"))


@contextlib.contextmanager
def _not_checkpointed(layers: list[Any]) -> Iterator[None]:
    """Layers without transformers' checkpointing, which older versions do around a layer's call, not its forward."""
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


class SwappedDecoder(Replaced):
    """Calls the original forward, with what swapped layers need; or without, and they run as they did before.

    An argument `CALL` says that the outputs only serve a loss: no cache is made then. It is the mask (B, S) of the
    tokens whose outputs that reads; or what `prepare` has made of this call.

    `layers` are the swapped ones; `complete` says that the model has no others, `unread` that
    nothing reads the mask that the model would make; `segments` are the layers in the runs that
    keep one input. With `stream`, the layers that stand next to each other are one streamed run. `cuts`: whether the
    model's masks are cut where position_ids start anew; None: not known. `known`: arguments that
    change nothing else. `axes`: how many position_ids may have, (axes, B, S), which the layers turn by; with `text`
    one more may stand before them, which cuts the model's masks. `trains_without_cache`: it makes none in training
    where the call does not ask for one, whatever its config says.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: list[SwappedLayer],
        complete: bool,
        unread: bool,
        segments: list[list[SwappedLayer]],
        stream: Streaming | None = None,
        cuts: bool | None = True,
        known: frozenset[str] = _KNOWN,
        axes: int = 0,
        text: bool = False,
        trains_without_cache: bool = False,
    ) -> None:
        super().__init__(module)
        self.cuts, self.known, self.axes, self.text = cuts, known, axes, text
        self.trains_without_cache = trains_without_cache
        self.layers, self.complete, self.unread = layers, complete, unread
        self.segments, self.stream = segments, stream
        self._limits = attention.limits(module.config)
        own = [s.block.mapping.moving for s in layers if not s.handed]
        self._frequencies = Frequencies(getattr(module, "rotary_emb", None) if own and not any(own) else None)
        self._turns = any(s.block.mapping.spec.rope_theta is not None for s in layers if not s.handed)
        own_kinds = [kind for s in layers if not s.handed for kind in kinds_of(s.module)]  # others run what they call
        self._kinds = list(dict.fromkeys([unsharded_class(module), *own_kinds]))
        self._functions = functions(self._kinds)
        held, lists = {s.module for s in layers}, module.named_children()
        self._lists = [(name, found) for name, m in lists if held.intersection(found := tuple(m.children()))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        # A break inside the model's own forward would be resumed by a call of its `forward`, which is this one.
        run = _run_uncompiled if torch.compiler.is_compiling() and self._breaks() else SwappedDecoder._run
        return run(self, given)

    def _breaks(self) -> bool:
        """Some layer breaks a compiled graph, or has RoPE whose frequencies are read at each call.

        So do rates of dropout that were changed: as a number that varies, one is no constant of a graph.
        """
        if any(s.block.mapping.has_other_rates(s.module) for s in self.layers):
            return True
        blocks = [s.block for s in self.layers]
        return self.keeps_inputs_alone or any(b.spec_text is None or b.placed or b.mapping.moving for b in blocks)

    @property
    def keeps_inputs_alone(self) -> bool:
        return len(self.segments) != len(self.layers) or self.stream is not None

    @property
    def paths(self) -> list[str]:
        """Where its layers are inside the model."""
        found = {layer: path for path, layer in self.module.named_modules()}
        return [found[s.module] for s in self.layers]

    @property
    def streams(self) -> bool:
        """All of its layers are one streamed run, which needs nothing that the model's own forward makes."""
        return self.complete and all(not s.apart and s.block.mapping.moving is None for s in self.layers)

    def streamed_parts(self) -> Parts | None:
        """What is streamed of the layers; None where they are not all one run."""
        if not self.streams:
            return None
        length = max(map(len, self.segments)) if self.stream is None else self.stream.segments
        return Parts([s.block for s in self.layers], length)

    def _run(self, given: dict[str, Any]) -> Any:
        told = given.pop(CALL, None)
        call = told if isinstance(told, Call) else self.prepare(given, told)
        if call is None:
            return self.original(**given)
        if call.context is not None:
            given, call = self._dealt_out(given, call, call.context)
        if self.unread and not call.whole:
            # Any mask of four dims is taken as it is: none of S x S is made, and no layer reads this one.
            given["attention_mask"] = self._like(given).new_zeros((1, 1, 1, 1), dtype=torch.bool)
        elif self._makes_cache(given) and given.get("position_ids") is not None and given.get("attention_mask") is None:
            # With the cache that it is not to make here it would not look whether positions start anew.
            given["attention_mask"] = self._like(given).new_ones(self._like(given).shape[:2], dtype=torch.bool)
        with _not_checkpointed([] if call.whole else self._checkpointed):
            return self.original(**{**given, "use_cache": False, CALL: call})

    def stream_loss(self, call: Call, ids: Tensor, targets: Targets, ends: Ends) -> Tensor:
        """The loss of token ids (B, S), over all layers, in a call that was prepared as streamed."""
        with _not_checkpointed(self._checkpointed):
            return call.stream_loss(self.layers, ids, targets, ends)

    def _dealt_out(self, given: dict[str, Any], call: Call, context: ContextParallel) -> tuple[dict[str, Any], Call]:
        """This process's part of a call of whole sequences, which are padded at the end to what can be dealt out.

        Packed rows that would have to be padded are one row: what is padded is one more sequence at its end.
        """
        like, pad = self._like(given), torch.nn.functional.pad
        rows, tokens = like.shape[:2]
        as_one = call.cu_seqlens is not None and context.padding(tokens) > 0
        padding = context.padding(rows * tokens if as_one else tokens)

        def part(t: Tensor) -> Tensor:
            t = t.expand(rows, *t.shape[1:]).reshape(1, -1, *t.shape[2:]) if as_one else t
            if t.dim() == 2:
                return context.shard(context.padded(t, padding))
            return context.shard(pad(t, (*(0, 0) * (t.dim() - 2), 0, padding)))

        positions, cu_seqlens = call.positions, call.cu_seqlens
        if positions is None:
            positions = self._expanded(torch.arange(tokens, device=like.device)[None])
            assert positions is not None
        if as_one and padding and cu_seqlens is not None:
            cu_seqlens = pad(cu_seqlens, (0, 1), value=rows * tokens + padding)
        given = {n: value for n, value in given.items() if n not in (*_LENGTHS, "seq_idx", "cache_position")}
        for name in ("input_ids", "inputs_embeds", "token_type_ids"):
            if (t := given.get(name)) is not None:
                given[name] = part(t)
        positions = part(positions)
        ids = positions.movedim(-1, 0) if positions.dim() == 3 else positions
        given |= {"position_ids": ids, "attention_mask": None}
        return given, dataclasses.replace(call, positions=positions, cu_seqlens=cu_seqlens)

    def prepare(
        self, given: dict[str, Any], read: Tensor | None, context: ContextParallel | None = None
    ) -> Call | None:
        """What the layers are told in a call with these arguments; None where the original forward is to run.

        context: the processes that share the sequences, of which the arguments are whole.
        read: (B, S) bool, of which tokens a loss reads the outputs; None: somebody else may read all.
        """
        if self._like(given) is None:
            return None  # of neither tokens nor embeddings: an error of the model's own
        if any(again.is_cache(n, value) for n, value in given.items()):
            if self.module.training and torch.is_grad_enabled():
                self.warn(
                    "a cache is given in training (a prefix?): the original forward runs, which stores everything"
                )
            return None
        if self._caches(given, read is not None):
            return None
        try:
            call = self._call(given, read, context)
        except UnsupportedError as reason:
            whole = isinstance(reason, UnsupportedCallError) and all(s.twice for s in self.layers)
            how = "each layer again as a whole in the backward" if whole else "which stores everything"
            self.warn(f"{reason}: {type(self.module).__name__} runs its original forward, {how}")
            return Call(None, None, whole=True) if whole else None
        if self._implementation == "sdpa" and any(s.softcap for s in self.layers):
            self.warn(
                f"{type(self.module).__name__} caps its attention's scores, which transformers' sdpa leaves out: "
                'swapped layers cap them, as attn_implementation="eager" does'
            )
        if self.module.training and self._checkpointed:
            self.warn("gradient checkpointing is ignored in swapped layers, which recompute already")
        return call

    @property
    def _implementation(self) -> str | None:
        """By which of transformers' attention functions the original would compute."""
        return getattr(self.module.config, "_attn_implementation", None)

    @property
    def _checkpointed(self) -> list[nn.Module]:
        """Layers whose gradient checkpointing is switched on."""
        return [s.module for s in self.layers if getattr(s.module, "gradient_checkpointing", False)]

    def _caches(self, given: dict[str, Any], scored: bool) -> bool:
        """Keys and values are to be returned: asked for, or by default, unless in training or only for a loss."""
        asked = given.get("use_cache")
        if asked is None:
            return not (self.module.training or scored) and self._caches_by_default
        if asked and self.module.training and torch.is_grad_enabled():
            self.warn("use_cache=True in training: the original forward runs, which stores everything")
        return bool(asked)

    @property
    def _caches_by_default(self) -> bool:
        return bool(getattr(self.module.config, "use_cache", False))

    def _makes_cache(self, given: dict[str, Any]) -> bool:
        """The original would, whether or not somebody is to have it.

        Not where transformers' own checkpointing is on, nor does every class by default in training.
        """
        asked, training = given.get("use_cache"), self.module.training
        if training and torch.is_grad_enabled() and getattr(self.module, "gradient_checkpointing", False):
            return False
        if asked is None:
            return self._caches_by_default and not (training and self.trains_without_cache)
        return bool(asked)

    def _call(self, given: dict[str, Any], read: Tensor | None, context: ContextParallel | None) -> Call:
        for name in ("output_attentions", "output_router_logits"):
            if self.asks(given, name):
                raise UnsupportedError(f"{name}=True asks for what swapped layers do not return")
        if self.patched:
            raise UnsupportedError(self.patched)
        if self._has_other_layers():
            # One that is not swapped would read the mask that stands for the model's.
            raise UnsupportedError("its layers are not those that were swapped (unswap and swap again)")
        if not getattr(self.module.config, "is_causal", True):
            raise UnsupportedError("its attention is not causal any more (unswap and swap again)")
        # From here on: what the layers' own forwards may run twice for.
        for layer in self.layers:
            change = layer.patched or layer.block.mapping.change(layer.module)
            if change is not None:
                raise UnsupportedCallError(change)
        self._check_attention()
        odd = sorted(n for n, value in given.items() if n not in self.known and value is not None)
        if odd:
            raise UnsupportedCallError(f"the argument {', '.join(odd)} is not known")
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        batch, seq = self._like(given).shape[:2]
        dense = mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2)
        handed = self._handed_masks(mask, seq) if dense else []
        mask = masks.tokens_of(handed, batch, seq) if dense else mask
        added = self._implementation == "eager" or any(m is not None and m.is_floating_point() for m, _ in handed)
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            raise UnsupportedCallError("an attention_mask that has a gradient, which blocks do not give")
        seen = [n for n in sorted(_BETWEEN) if given.get(n) is not None]
        on_axes, positions = self._on_axes(positions, batch, seq)
        if positions is not None and tuple(positions.shape) not in ((batch, seq), (1, seq)):
            raise UnsupportedCallError(f"position_ids of shape {tuple(positions.shape)}")
        if read is not None and (read.numel() != batch * seq or self.asks(given, "output_hidden_states")):
            read = None
        flash = packs_by_itself(self.module.config)
        # Of several axes the one that stands before the others; a whole mask says all.
        cuts = False if dense else True if on_axes is not None else self.cuts
        cut = self._flash_cut(positions, batch) if flash else self._cut(given, positions, cuts)
        cu_seqlens = masks.packed(mask, cut, batch, seq, self._sight(read, added))
        if flash and (mask is None or cu_seqlens is None or cu_seqlens.dim() == 1):
            told = masks.given_lengths({n: given.get(n) for n in _LENGTHS}, batch * seq)
            cu_seqlens = cu_seqlens if told is None else told
        if cu_seqlens is not None and mask is None and cuts is None and not flash:
            raise UnsupportedCallError("position_ids start anew, and whether that cuts the model's masks is not known")
        if on_axes is not None:
            positions = on_axes
        elif positions is None and cu_seqlens is not None:
            # As the model counts them: over the whole row.
            positions = torch.arange(seq, device=cu_seqlens.device)[None]
        positions = self._expanded(positions)
        if context is not None and seen:
            raise UnsupportedError(f"{', '.join(seen)} change what each layer is handed, which processes can't share")
        runs, streamed, gathered = self._runs(given, seen)
        return Call(positions, cu_seqlens, runs, self.stream if streamed else None, gathered, context=context)

    def _handed_masks(self, mask: Any, seq: int) -> list[tuple[Any, int]]:
        """Of masks (B, 1, S, S), one or some by layers' types, those that layers are handed, with their windows."""
        handed = mask.values() if isinstance(mask, dict) else [mask]
        if self._implementation == "eager" and any(isinstance(m, Tensor) and m.dtype == torch.bool for m in handed):
            raise UnsupportedCallError(
                "an attention_mask of bools, which eager attention adds to the scores as numbers"
            )
        if not isinstance(mask, dict):
            return [(mask, window) for window in {s.window for s in self.layers}]
        types = getattr(self.module.config, "layer_types", None) or []
        if any(s.place >= len(types) or types[s.place] not in mask for s in self.layers):
            raise UnsupportedCallError("an attention_mask that is not (B, S): dict")
        found = [(mask[kind], window) for kind, window in sorted({(types[s.place], s.window) for s in self.layers})]
        # Of sdpa None is causal, without a window, and of eager attention no mask at all.
        for odd in (window for m, window in found if m is None and not packs_by_itself(self.module.config)):
            if self._implementation != "sdpa" or 0 <= odd < seq - 1:
                raise UnsupportedCallError("an attention_mask that is None for layers of some type")
        return found

    def _on_axes(self, positions: Tensor | None, batch: int, seq: int) -> tuple[Tensor | None, Tensor | None]:
        """Of position_ids of several axes: (B, S, axes), which layers turn by, and (B, S), which cut the masks."""
        if not self.axes or positions is None or positions.dim() != 3:
            return None, positions
        shape, turning = tuple(positions.shape), positions[-self.axes :].movedim(0, -1)
        rows = ((batch, seq), (1, seq))
        if shape[0] == self.axes and shape[1:] in rows:
            return turning, None
        if self.text and shape[0] == self.axes + 1 and shape[1:] in rows:
            return turning, positions[0]
        return None, positions

    def _expanded(self, positions: Tensor | None) -> Tensor | None:
        """On all axes, where there are some, the same."""
        if positions is None or not self.axes or positions.dim() == 3:
            return positions
        return positions.unsqueeze(-1).expand(*positions.shape, self.axes)

    def _check_attention(self) -> None:
        """Raise `UnsupportedCallError` where the config has attention computed otherwise than when it was swapped."""
        other = attention.other(self.module.config)
        if other is not None:
            raise UnsupportedCallError(other)
        now = attention.limits(self.module.config)
        odd = next((n for n in (*self._limits, *now) if now.get(n) != self._limits.get(n)), None)
        if odd is not None:
            was = self._limits.get(odd)
            raise UnsupportedCallError(
                f"config.{odd} is now {now.get(odd)}, not the {was} it was when swapped (unswap and swap again)"
            )
        if torch.compiler.is_compiling():
            return
        present = functions(self._kinds)
        odd = next((n for n, written in self._functions.items() if present.get(n) != written), None)
        if odd is not None:
            raise UnsupportedCallError(
                f"{odd} is now {present.get(odd)}, not the {self._functions[odd]} it was when swapped (unswap and "
                "swap again)"
            )
        rotary = getattr(self.module, "rotary_emb", None)
        reads = self._turns or self.keeps_inputs_alone  # else a layer is handed what the model has made of it
        if reads and rotary is not None and (odd := odd_rotary(rotary)) is not None:
            raise UnsupportedCallError(f"{odd}, as it was when swapped (unswap and swap again)")
        if self._frequencies.differ(rotary):
            raise UnsupportedCallError("RoPE's frequencies are not those of the swap any more (unswap and swap again)")

    def _cut(self, given: dict[str, Any], positions: Tensor | None, cuts: bool | None) -> Tensor | None:
        """Positions that cut the model's masks where they start anew: making a cache, it does not look at them."""
        return None if cuts is False or self._makes_cache(given) else positions

    @staticmethod
    def _flash_cut(positions: Tensor | None, batch: int) -> Tensor | None:
        """Flash attention looks by itself, with a cache too, but at a single row alone."""
        return None if positions is None or batch != 1 else masks.restarted(positions)

    def _has_other_layers(self) -> bool:
        """Some were put in or taken out since, or unswapped by themselves; not: wrapped."""
        for name, before in self._lists:
            now = tuple(getattr(self.module, name).children())
            if len(now) != len(before) or not all(a is b or b in a.modules() for a, b in zip(now, before, strict=True)):
                return True
        return not all(s.installed for s in self.layers)

    def _leaves_layers_out(self) -> bool:
        """Models of transformers call as many of their layers as the config says."""
        count = getattr(self.module.config, "num_hidden_layers", None)
        return self.complete and count is not None and count != len(self.layers)

    def _sight(self, read: Tensor | None, added: bool) -> masks.Sight:
        """What padding sees in transformers' attention functions: to flash attention it does not even come.

        added: the mask is one of numbers that are added to scores.
        """
        if packs_by_itself(self.module.config):
            return masks.Sight("none")
        if not added:
            return masks.Sight("before", None, read)
        # It adds the least number to what is hidden: where all is, all has the same share. But a sink has more.
        reaches = [_FAR if s.reach < 0 else s.reach for s in self.layers if s.reach is not None]
        return masks.Sight("before", min(reaches, default=None), read)

    def _runs(
        self, given: dict[str, Any], seen: list[str]
    ) -> tuple[dict[int, list[CheckpointedBlock]], bool, Gathered | None]:
        """What the layer at each place runs, nothing where all run one by one; whether it is streamed, and how.

        seen: arguments that change what layers are handed, each by itself.
        """
        streamed = self.stream is not None
        segments = together(self.layers, len(self.layers)) if streamed else self.segments
        what = "streaming is" if streamed else "segments are"
        if not streamed and len(segments) == len(self.layers):
            return {}, False, None
        if self.asks(given, "output_hidden_states"):
            self.warn(f"output_hidden_states=True asks for every layer's: {what} not used")
            return {}, False, None
        if seen:
            self.warn(f"{', '.join(seen)} change what each layer is handed: {what} not used")
            return {}, False, None
        if self._leaves_layers_out():
            self.warn(f"config.num_hidden_layers is not the number of its layers: {what} not used")
            return {}, False, None
        if wraps(self.module):
            self.warn(f"FSDP1 has a layer's weights in a call of the layer alone: {what} not used. FSDP2 can stream")
            return {}, False, None
        hooked = [s for s in self.layers if watched(s.module, replaced=True)]
        if self.stream is not None and hooked and all(gathers(s.module) for s in hooked):
            if self.stream.segments > 1:
                self.warn("FSDP2 gathers one layer at a time: streamed without segments, each layer's input is kept")
            return {}, True, Gathered(segments)
        if hooked:
            self.warn(f"a {type(hooked[0].module).__name__} has forward hooks: {what} not used")
            return {}, False, None
        runs: dict[int, list[CheckpointedBlock]] = {}
        for segment in segments:
            runs |= {s.place: [] for s in segment}
            runs[segment[0].place] = [s.block for s in segment]
        return runs, streamed, None

    def tokens(self, given: dict[str, Any]) -> tuple[int, ...] | None:
        """(B, S) of a call with these arguments."""
        like = self._like(given)
        return None if like is None else tuple(like.shape[:2])

    @staticmethod
    def _like(given: dict[str, Any]) -> Any:
        ids = given.get("input_ids")
        return given.get("inputs_embeds") if ids is None else ids


_run_uncompiled = uncompiled(SwappedDecoder._run)


def arguments(layers: list[SwappedLayer]) -> frozenset[str]:
    """Arguments of the model that change nothing of what these layers compute from their hidden states."""
    known = _KNOWN - {"token_type_ids"} if any(s.surveyed for s in layers) else _KNOWN
    return known | _BETWEEN if all(s.surveyed for s in layers) else known


def together(layers: list[SwappedLayer], length: int) -> list[list[SwappedLayer]]:
    """Layers in runs of at most `length` that stand next to each other; those that are `apart` alone."""
    found: list[list[SwappedLayer]] = []
    for layer in layers:
        alone = layer.apart or (found and found[-1][-1].apart)
        if found and not alone and len(found[-1]) < length and layer.place == found[-1][-1].place + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return found
