"""`swap` and `unswap`."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyckpt import errors
from pyckpt.attend.context import ContextParallel, check_context
from pyckpt.block import CheckpointedBlock
from pyckpt.model import segment_length
from pyckpt.save import Save, save_set
from pyckpt.stream import Stream, check_stream
from pyckpt.swap import aligned, encoder, families, own, quantized, tables, whole
from pyckpt.swap import loss as losses
from pyckpt.swap.around import is_compiled, is_replaced, what_watches
from pyckpt.swap.choose import Chooser
from pyckpt.swap.decoder import SwappedDecoder, arguments, together
from pyckpt.swap.generic import check_unwatched
from pyckpt.swap.layer import Streaming, SwappedLayer
from pyckpt.swap.modules import UnsupportedError, passes, whose
from pyckpt.swap.replaced import Replaced, replaced_in
from pyckpt.swap.report import CHECKPOINTED, GENERIC, ORIGINAL, STANDARD, Entry, Report
from pyckpt.swap.survey import check_weights
from pyckpt.swap.weights import Mapping
from pyckpt.swap.whole import CheckpointedLayer


def swap(
    model: nn.Module,
    save: str | Save = "attention",
    *,
    segments: int | str | None = None,
    stream: Stream | None = None,
    tile: int | None = None,
    loss: bool | str = True,
    context: ContextParallel | None = None,
) -> Report:
    """Make the model's transformer layers keep the save set alone from forward to backward, in place.

    Modules, parameters and their names stay: only the forward of the decoder layers is replaced, and that of a causal
    language model, so that with labels it computes the loss without logits. Gradients are exact. `unswap` undoes it.

    Args:
        model: a model of transformers, any model that has one inside, or one with torch.nn.TransformerEncoderLayer.
        save: what lives from forward to backward, as in `CkptTransformerBlock`.
        segments: as in `CkptTransformer`: with k, or "sqrt", k decoder layers next to each other run as one, and only
            the input of the first is kept. Where a layer has forward hooks, which would see nothing of that (FSDP2's
            gather one layer at a time), or where hidden states are asked for, layers run one by one, with a warning.
        stream: run the decoder layers streamed, and with labels the embedding and the loss too, so that memory on the
            device does not depend on the sequence length; under FSDP2 each layer inside its own call. Where a layer has
            other forward hooks, or hidden states are asked for, layers run one by one on the device, with a warning.
        tile: tokens that the tokenwise parts take at a time; None chooses.
        loss: True: while gradients are enabled a call with labels returns logits=None (`output_logits=True` in the call
            asks for both); "always": without gradients too; "recompute": as True, and the backward makes the logits
            again, so that no gradient of the embeddings waits for it in float32: a fourth product for two fifths of
            the loss's memory, see `linear_cross_entropy`. False: the loss is left as it is.
        context: the processes that share every sequence (context parallelism), of a causal language model whose layers
            can be streamed. Each is called with the same whole input_ids and labels, computes its own tokens' part, and
            returns the loss of all; gradients are to be averaged over them, see `ContextParallel`. A call without
            labels, or that asks for logits, runs whole in every process. With `stream` each streams its own tiles, from
            the token ids on. Not with loss=False.

    Returns a `Report`: each layer, the path it takes and why. Layers that cannot be cut at their attention run again as
    a whole in the backward; those with hooks inside are left as they are.

    Raises ValueError where nothing can be swapped, with the reasons, or where the model is swapped already; TypeError
    where it is no module, or `stream` no `Stream`. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    save_set(save)
    errors.check_tile(tile)
    errors.check_segments(segments)
    if stream is not None:
        check_stream(stream)
    if context is not None:
        check_context(context)
        if loss is False:
            raise ValueError("context and loss=False don't go together: it is the loss that processes share; leave one")
    if loss not in (True, False, *losses.KINDS):
        raise ValueError(f"loss must be True, False, 'always' or 'recompute', got {loss!r}")
    if any(True for _ in replaced_in(model)):
        raise ValueError("the model is swapped already; call pyckpt.unswap(model) first to swap it with other options")
    with quantized.never_packed(model):
        return _swap(model, save, segments, stream, tile, loss, context)


def _swap(
    model: nn.Module,
    save: str | Save,
    segments: int | str | None,
    stream: Stream | None,
    tile: int | None,
    loss: bool | str,
    context: ContextParallel | None,
) -> Report:
    entries: list[Entry] = []
    made: list[Replaced] = []
    wrapped: list[str] = []  # what PyTorch's wrapper is around
    for name, module in model.named_modules():
        if name.startswith(tuple(wrapped)):
            continue
        if own.is_checkpointed(module):
            wrapped.append(f"{name}." if name else "")
            why = (
                "PyTorch's checkpoint_wrapper runs it again already: swap the model before it is put around its layers"
            )
            entries.append(Entry(name, type(next(module.children())).__name__, ORIGINAL, why))
        elif isinstance(module, nn.TransformerEncoderLayer):
            if not _inside(name, entries):
                made += _encoder_layer(name, module, save, tile, _apart(segments, stream), entries)
        elif layers := _decoder_layers(module):
            made += _decoder(name, module, layers, save, segments, stream, tile, entries)
        elif (layers := _other_layers(module)) and not _inside(name, entries):
            made += _others(name, layers, _apart(segments, stream), save, entries)
    made += _own(model, _apart(segments, stream), save, entries)
    if not made and any(isinstance(m, CheckpointedBlock) for m in model.modules()):
        raise ValueError(
            f"there is nothing to swap in this {type(model).__name__}: its blocks are pyckpt's own. What they keep is "
            "set by their `save`, and a stream is an argument of their stack's call, or of its loss"
        )
    if not made:
        found = "".join(f"\n  {e.name} ({e.kind}): {e.why}" for e in entries)
        raise ValueError(
            f"there is nothing to swap in this {type(model).__name__}: "
            + (f"its layers cannot be swapped{found}" if found else "no transformer layer was found")
            + f"\nKnown layers: {', '.join(sorted(tables.FAMILIES))}, TransformerEncoderLayer. Others are found in "
            "lists of modules, by the attention in them. For another architecture see pyckpt.CkptGenericBlock"
        )
    if stream is not None and not any(isinstance(r, SwappedLayer) and not r.apart for r in made):
        raise ValueError("stream= takes decoder layers of transformers, and this model has none that can be streamed")
    if loss:
        decoders = [r for r in made if isinstance(r, SwappedDecoder)]
        made += _heads(model, loss, stream, decoders, context, entries)
    if context is not None and not any(isinstance(r, losses.SwappedHead) for r in made):
        why = next((f"{e.kind}: {e.why}" for e in entries if e.why.startswith("loss: ")), "this model is none")
        raise ValueError(f"context= takes causal language models of transformers whose loss is swapped; {why}")
    for replaced in made:
        replaced.install()
    return Report(tuple(entries))


def unswap(model: nn.Module) -> None:
    """Undo `swap`: every forward is what it was.

    Raises ValueError where the model is not swapped, RuntimeError where a forward was replaced by something else since.
    """
    found = list(replaced_in(model))
    if not found:
        raise ValueError("the model is not swapped: there is nothing to undo")
    for name, replaced in found:
        if not replaced.in_place():
            raise RuntimeError(
                f"the forward of {name or 'the model'} was replaced after the swap by something that calls ours; undo "
                "that first"
            )
    for _, replaced in found:
        replaced.remove()
    quantized.may_be_packed(model)


def _decoder_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Decoder layers of transformers in a list that the module holds: they take their masks from its forward."""
    return [
        (f"{name}.{i}", layer)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
        for i, layer in child.named_children()
        if _is_decoder_layer(layer)
    ]


def _is_decoder_layer(layer: nn.Module) -> bool:
    kind = families.family_class(layer)
    attends = any(part in name for name, _ in layer.named_children() for part in ("attn", "attention", "mixer"))
    named = any(k.__name__.endswith("DecoderLayer") for k in type(layer).__mro__)
    return kind in tables.FAMILIES or named or (kind.endswith("Block") and attends)


def _other_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers of any other kind that transformers' own checkpointing knows: encoders', of text, images or sound."""
    return [
        (f"{name}.{i}", layer)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
        for i, layer in child.named_children()
        if whole.known(layer)
    ]


def _inside(name: str, entries: list[Entry]) -> bool:
    """The module of this name is, or is part of, a layer that runs again: with it all that is inside does."""
    again = (e.name for e in entries if e.path == CHECKPOINTED)
    return any(name == n or name.startswith(f"{n}.") for n in again)


def _others(
    name: str,
    layers: list[tuple[str, nn.Module]],
    note: str,
    save: str | Save,
    entries: list[Entry],
) -> list[Replaced]:
    made: list[Replaced] = []
    for path, layer in layers:
        full = f"{name}.{path}" if name else path
        entries.append(_refused(full, layer, "it is no decoder layer", save, note))
        made += [CheckpointedLayer(layer, False, save)] if entries[-1].path == CHECKPOINTED else []
    return made


def _own(model: nn.Module, note: str, save: str | Save, entries: list[Entry]) -> list[Replaced]:
    """Layers of classes that nobody knows, where none of those above is, around or inside."""
    made: list[Replaced] = []
    found = own.layers_of(model)
    kinds = {type(layer) for _, layer in found if not type(layer).__module__.startswith("torch.")}
    first: dict[nn.Module, str] = {}  # its path, of a layer that stands in several places
    for path, layer in (*found, *own.are_layers(model, kinds)):
        first.setdefault(layer, path)
    inside = {m for layer in first for m in layer.modules() if m is not layer}  # by whatever path
    taken = [f"{e.name}." for e in entries]
    for layer, path in first.items():
        if layer in inside or any(f"{path}.".startswith(name) or name.startswith(f"{path}.") for name in taken):
            continue
        entries.append(_refused(path, layer, whose(layer), save, note))
        made += [CheckpointedLayer(layer, False, save)] if entries[-1].path == CHECKPOINTED else []
    return made


def _check_forward(module: nn.Module) -> None:
    if is_compiled(module):
        raise UnsupportedError(what_watches(module))
    if is_replaced(module):
        raise UnsupportedError("its forward was replaced already (by Accelerate?); swap the model before that")


def _decoder(
    name: str,
    module: Any,
    layers: list[tuple[str, nn.Module]],
    save: str | Save,
    segments: int | str | None,
    stream: Stream | None,
    tile: int | None,
    entries: list[Entry],
) -> list[Replaced]:
    swapped: list[SwappedLayer] = []
    refused: list[nn.Module] = []
    chooser = Chooser(module, [path for path, _ in layers], save, tile)
    for place, (path, layer) in enumerate(layers):
        full, kind = f"{name}.{path}" if name else path, type(layer).__name__
        try:
            _check_forward(layer)
            made = chooser.layer(layer, place)
        except UnsupportedError as reason:
            entries.append(_refused(full, layer, str(reason), save, _apart(segments, stream)))
            refused += [layer] if entries[-1].path == CHECKPOINTED else []
            continue
        swapped.append(made)
        entries.append(_entry(full, kind, made.block.mapping, save, _notes(made, segments, stream)))
    again = [CheckpointedLayer(layer, bool(swapped), save) for layer in refused]
    if not swapped:
        return [*again]
    if segments is not None or stream is not None:
        _check_all_differ(name, module)
    if stream is not None:
        _check_dealt_out_alike(name, swapped)
    length, complete = segment_length(segments, len(layers)), len(swapped) == len(layers)
    streaming = None if stream is None else Streaming(stream, length)
    unread = complete and chooser.maskless(swapped)
    more = (together(swapped, length), streaming, chooser.cuts(), arguments(swapped), *chooser.axes(swapped))
    return [*swapped, *again, SwappedDecoder(module, swapped, complete, unread, *more)]


def _check_all_differ(name: str, module: nn.Module) -> None:
    """Raise ValueError where a list of the module has one layer several times: a run of layers would have it once."""
    for path, found in module.named_children():
        if isinstance(found, nn.ModuleList) and len({id(m) for m in found}) < len(found):
            raise ValueError(
                f"{name}.{path}".removeprefix(".") + " has one layer in several places: its layers can neither be "
                "streamed nor run in segments. Leave stream and segments out"
            )


def _check_dealt_out_alike(name: str, layers: list[SwappedLayer]) -> None:
    """Raise ValueError where processes have a part of some layers and the whole of others: a run has one store."""
    sizes = {1 if s.block.mapping.dealt is None else s.block.mapping.dealt.processes.size for s in layers}
    if len(sizes) > 1:
        raise ValueError(
            f"the layers of {name or 'the model'} are dealt out to {' or '.join(map(str, sorted(sizes)))} processes "
            "(tensor parallelism). A streamed run takes layers that are dealt out alike; leave stream out"
        )


def _refused(name: str, layer: nn.Module, reason: str, save: str | Save, note: str) -> Entry:
    """Of a layer that can't be cut, for this reason: it runs again as a whole where it may."""
    kind = type(layer).__name__
    try:
        _check_forward(layer)
        if whole.known(layer) and passes(check_unwatched, layer):
            check_weights(layer)  # with its weights it might be cut
        whole.check(layer)
    except UnsupportedError as other:
        return Entry(name, kind, ORIGINAL, reason if str(other) in reason else f"{reason}; {other}")
    kept = "its input and its attention's output are kept" if save_set(save).attention else "its input alone is kept"
    kept += ", where they are" if isinstance(save, Save) and save.place else ""
    return Entry(name, kind, CHECKPOINTED, f"run again as a whole, {kept}: {reason}{note}")


def _notes(layer: SwappedLayer, segments: int | str | None, stream: Stream | None) -> str:
    if stream is not None and not layer.apart:
        return f"; streamed by {stream.tile} tokens, store {stream.store.kind!r}"
    return _apart(segments, stream) if stream is not None or layer.apart else ""


def _apart(segments: int | str | None, stream: Stream | None) -> str:
    """Of a layer that always runs by itself."""
    return "; not streamed" if stream is not None else "; not in segments" if segments is not None else ""


def _entry(name: str, kind: str, mapping: Mapping, save: str | Save, note: str = "") -> Entry:
    """Of a layer that is swapped."""
    kinds = {"LoRA adapters": mapping.adapted, "weights of 4 bits": mapping.quantized}
    beside = " and ".join(kind for kind, found in kinds.items() if found)
    standard = "as a standard block" + (f" with {beside}" if beside else "")
    if mapping.dealt is not None:
        standard += f", of which each of {mapping.dealt.processes.size} processes has a part"
    why = f"its own modules, tile by tile: {mapping.why}" if mapping.why else standard
    return Entry(name, kind, GENERIC if mapping.why else STANDARD, f"{why}; save={save!r}{note}")


def _encoder_layer(
    name: str,
    layer: nn.TransformerEncoderLayer,
    save: str | Save,
    tile: int | None,
    note: str,
    entries: list[Entry],
) -> list[Replaced]:
    kind = type(layer).__name__
    try:
        if type(layer) is not nn.TransformerEncoderLayer:
            raise UnsupportedError("a class derived from TransformerEncoderLayer is not known")
        _check_forward(layer)
        blocks = {causal: encoder.block_of(layer, causal, save, tile) for causal in (False, True)}
    except UnsupportedError as reason:
        entries.append(_refused(name, layer, str(reason), save, note))
        return [CheckpointedLayer(layer, False, save)] if entries[-1].path == CHECKPOINTED else []
    entries.append(_entry(name, kind, blocks[False].mapping, save))
    return [encoder.SwappedEncoderLayer(layer, blocks)]


def _heads(
    model: nn.Module,
    loss: bool | str,
    stream: Stream | None,
    decoders: list[SwappedDecoder],
    context: ContextParallel | None,
    entries: list[Entry],
) -> list[Replaced]:
    """The loss of every language model inside."""
    made: list[Replaced] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        # Of its class: wrappers such as PEFT's pass every attribute of the model on.
        if not all(hasattr(type(module), n) for n in ("loss_function", "get_output_embeddings")):
            continue
        if module.get_output_embeddings() is None:
            continue
        why = "loss: linear_cross_entropy, no logits with labels"
        why += ", which the backward makes again" if loss == "recompute" else ""
        try:
            _check_forward(module)
            head = _causal_head(module, decoders)
            if head is None:
                made += aligned.swapped(module, loss)
                entries.append(Entry(name or "(model)", kind, STANDARD, why))
                continue
        except UnsupportedError as reason:
            entries.append(Entry(name or "(model)", kind, ORIGINAL, f"loss: {reason}"))
            continue
        swapped = losses.SwappedHead(module, head, loss, context)
        made.append(swapped)
        decoder = next((d for d in decoders if d.module is swapped.body), None)
        if context is not None:
            try:
                swapped.check_shared(decoder)
            except UnsupportedError as reason:
                odd = [e for path in (ORIGINAL, CHECKPOINTED, GENERIC) for e in entries if e.path == path]
                which = f" ({odd[0].name}: {odd[0].why})" if odd else ""
                raise ValueError(f"processes can't share the sequences of a {kind}: {reason}{which}") from None
            why += f"; shared by {context.size} processes, {context.method}"
        if stream is not None:
            try:
                swapped.check_streamed(decoder)
                why += "; streamed from the token ids on"
            except UnsupportedError as reason:
                if context is not None:
                    raise ValueError(
                        f"processes can't share the streamed sequences of a {kind}: not streamed from the token ids "
                        f"on: {reason}. Leave stream or context out"
                    ) from None
                why += f"; not streamed from the token ids on: {reason}"
        entries.append(Entry(name or "(model)", kind, STANDARD, why))
    return made


def _causal_head(model: Any, decoders: list[SwappedDecoder]) -> losses.Head | None:
    """None where the labels are aligned with the logits, if anything."""
    if aligned.decodes(model):
        return None
    try:
        return losses.head_of(model, decoders)
    except UnsupportedError:
        if not hasattr(type(model), "can_generate") or model.can_generate():
            raise
        return None
