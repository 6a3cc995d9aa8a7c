"""`Stream`: how to run a model or a stack with only tiles of the sequence on the device."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.attend.context import ContextParallel, check_context, processes_of
from pyckpt.attend.dense import Layout
from pyckpt.block import CheckpointedBlock, axes_of, check_weights, compute_dtype, draw_seeds, waited_for
from pyckpt.exec.ends import Given, Sink, Source, Whole
from pyckpt.exec.estimate import Estimate, estimate, work_of
from pyckpt.exec.gathering import gather, gathers, hooks_of, others
from pyckpt.exec.layouts import check_whole_tokens, deals_out
from pyckpt.exec.lm_ends import IGNORE, EmbeddingOptions, Ends, LossOptions, Targets, last_tokens
from pyckpt.exec.node import NO_SEED
from pyckpt.exec.places import store_plan
from pyckpt.exec.resident import NOTHING
from pyckpt.exec.schedule import by_segments, by_slots, without_gradient
from pyckpt.exec.session import ENDS, Session
from pyckpt.exec.stack import Stack
from pyckpt.exec.streamed_layers import InRun, LayerRun
from pyckpt.exec.streamed_node import execute
from pyckpt.measure.units import parse_bytes
from pyckpt.shared_loss import of_all_tiles, padded
from pyckpt.store import Store, make_store
from pyckpt.surroundings import check_streamed
from pyckpt.tokenwise.norm import norm_of
from pyckpt.vocab_parallel import Words, check_layout, is_dealt_out, own_part

if TYPE_CHECKING:
    from pyckpt.model import CkptCausalLM, CkptTransformer

MOST_TILE = 1 << 20
GRADIENTS = ("together", "by block")


class Stream:
    """Streamed execution: `model.loss(tokens, stream=Stream(...))`, or `stack(x, stream=Stream(...))`.

    The sequence lives in a store, and only tiles of it visit the device: activation memory there does not depend on
    the sequence length. Gradients are exact, and bitwise the same over runs.

    Args:
        tile: tokens of a tile. Larger ones have more arithmetic for each byte that is copied, and take more memory.
        store: "host" (page-locked memory; on a CPU the device's own), "device", "file" (a scratch file that is gone
            when the process ends, however it ends), or a `pyckpt.store.Store`.
        path: folder of the scratch file; default the system's temporary one.
        limit: the most that one run may take of the store: bytes, or text such as "200GiB". Where what the blocks'
            save sets and `segments` keep does not fit, less is kept and more made again: x of every block, then of
            fewer and fewer blocks, by the schedule with the fewest repeats. Gradients are the same. A run that can't
            fit is refused before it starts.
        gradients: when weights get them. "together": at the end of the backward, all at once, so that a run that ends
            before leaves none. "by block": those of each block when it has them. Where `.grad` is there already
            (accumulation), or an optimizer steps in `register_post_accumulate_grad_hook` and frees it, there is then no
            second set of all gradients at any time. The same bits.
        progress: called between tiles with ("embed", "forward", "head" or "backward", block, tile). What it raises
            ends the run and leaves no gradient: Ctrl-C between two tiles changes nothing. (With "by block" it leaves
            those that were given before.) On a GPU autograd runs the backward in a thread of its own, and Python raises
            KeyboardInterrupt in the main one, when the backward is over: raise something here to stop between tiles.

    Keep a `Stream` for the whole training: it keeps the store's memory from step to step. Processes that share
    sequences (`context=`) have to have the same tile, limit and gradients, and to be ended by `progress` all in the
    same place: one that ends alone leaves others waiting.
    """

    def __init__(
        self,
        tile: int = 4096,
        store: str | Store = "host",
        path: str | os.PathLike[str] | None = None,
        limit: int | str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        gradients: str = "together",
    ) -> None:
        if gradients not in GRADIENTS:
            raise ValueError(f"gradients must be {' or '.join(map(repr, GRADIENTS))}, got {gradients!r}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be None or a function of (part, block, tile), got {progress!r}")
        expected = f"an int of 1 to {MOST_TILE:,} (tokens)"
        self.tile = errors.positive_int("tile", tile, expected)
        if self.tile > MOST_TILE:
            raise ValueError(f"tile must be {expected}, got {tile!r}")
        self.store = make_store(store, path, None if limit is None else parse_bytes(limit, "limit"))
        self.progress = progress
        self.gradients = gradients

    def estimate(
        self, model: nn.Module, tokens: int, batch: int = 1, context: ContextParallel | None = None
    ) -> Estimate:
        """What a training step on (batch, tokens) will take, streamed: see `pyckpt.exec.estimate.Estimate`.

        Forward and backward, under torch.no_grad() too; frozen weights have no gradients, and blocks before the first
        that is trained no backward.

        model: a `CkptCausalLM`, a `CkptTransformer` (whose whole x and y come beside), or a model with swapped layers,
        whatever `swap` was told of streaming; without its loss where that cannot be streamed. context: the processes
        that will share the sequences, of which one is estimated; default: those that `swap` was told of.

        Raises ValueError, as the run would, where the store's limit is too small for it; and where the model has
        nothing that can be streamed as one run.
        """
        for name, value in (("tokens", tokens), ("batch", batch)):
            if (errors.as_int(value) or 0) < 1:
                raise ValueError(f"{name}={value!r}: expected a positive whole number")
        parts = _parts_of(model)
        context = parts.context if context is None else check_context(context)
        layout = Layout(int(batch), int(tokens))
        x, looked_up = parts.residual()
        dealt = padded(layout, processes_of(context), x.device)
        with torch.enable_grad():  # a step has a backward, wherever it is asked about
            given = (parts.blocks, parts.segments, dealt, None, x, looked_up, self)
            stack = _stack(*given, seeded=False, context=context)
        works = [
            work_of(plan, block.matrices(), layout, block.experts_per_token, context)
            for plan, block in zip(stack.plans, parts.blocks, strict=True)
        ]
        products = parts.head_products(inward=bool(stack.schedule.backward))
        return estimate(stack, self.store, works, parts.trained_ends, parts.vocab, products)


def options_of(stream: Stream | None) -> str | None:
    """What processes that share sequences are to be told alike."""
    return None if stream is None else f"tile={stream.tile}, limit={stream.store.limit}, gradients={stream.gradients!r}"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What of a model is streamed: blocks, how many make a segment, and the weights of `Ends` where those are too.

    context: the processes that share its sequences, where the model says so itself.
    """

    blocks: list[CheckpointedBlock]
    segments: int
    ends: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    context: ContextParallel | None = None

    def residual(self) -> tuple[Tensor, bool]:
        """An empty tensor like the residual stream, and whether it wants a gradient where the first block begins."""
        embed = self.ends.get("embed")
        if embed is not None:
            return embed.new_empty(0), embed.requires_grad
        return self.blocks[0].like_weights(), True

    @property
    def trained_ends(self) -> int:
        return sum({id(w): w.numel() for w in self.ends.values() if w.requires_grad}.values())

    def head_products(self, inward: bool) -> int:
        """Products of all tokens with the head: of the logits, of the gradient `inward`, to blocks, and of its own."""
        trained = {name for name, w in self.ends.items() if w.requires_grad}
        inward = inward or any(name.startswith("norm") for name in trained)
        return 1 + inward + ("head" in trained)

    @property
    def vocab(self) -> int:
        return self.ends["head"].shape[0] if "head" in self.ends else 0


FINDERS: list[Callable[[nn.Module], Parts | None]] = []
"""Ways to what is streamed of models that do not say so (`streamed_parts`): `pyckpt.swap` adds its own."""


def _parts_of(model: nn.Module) -> Parts:
    if isinstance(model, nn.Module):
        own = getattr(model, "streamed_parts", None)
        ways = ([own] if callable(own) else []) + [functools.partial(find, model) for find in FINDERS]
        for way in ways:
            if (parts := way()) is not None:
                return parts
    raise ValueError(
        f"this {type(model).__name__} has nothing that can be streamed as one run: expected a CkptCausalLM, a "
        "CkptTransformer, or a model whose decoder layers pyckpt.swap(model) has all swapped"
    )


def run_loss(
    model: CkptCausalLM,
    tokens: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    stream: Stream,
    context: ContextParallel | None,
    options: dict[str, Any],
) -> Tensor:
    """`CkptCausalLM.loss` of checked tokens, labels, their weights and numbers of `options`, streamed."""
    _check_called(model)
    gather(model.model.embed_tokens, model.model.norm, model.lm_head)
    check_streamed(model.model.embed_tokens, model.model.norm, model.spec)
    embed, head, norm = model.model.embed_tokens.weight, model.lm_head.weight, model.model.norm
    check_whole_tokens("model.embed_tokens", model.model.embed_tokens)
    check_whole_tokens("model.norm", norm)
    words = _words(model)
    if is_dealt_out(embed) and "embed" not in words:
        raise ValueError(
            "the embedding is sharded: FSDP2 gathers it for the model's forward, and this is another method. Call "
            "torch.distributed.fsdp.register_fsdp_forward_method(model, 'loss') first, or wrap the loss in a forward"
        )
    weights: dict[str, Tensor] = {"embed": embed, **{f"norm.{n}": p for n, p in norm.named_parameters()}, "head": head}
    embedding = EmbeddingOptions(unlearned=model.model.embed_tokens.padding_idx)
    weights |= {name: own_part(weights[name]) for name in words}
    how = (norm_of(model.spec, "norm"), model.spec.norm_offset, embedding, _loss_options(**options))
    ends = Ends(weights, *how, words=words)
    if positions is not None:
        positions = errors.check_positions(positions, tokens.unsqueeze(-1), model.spec.position_axes)
    layout = _layout(tokens.shape, cu_seqlens)
    targets = Targets(labels, last_tokens(layout), IGNORE, label_weights)
    blocks, segments = blocks_of(model.model.layers)
    _check_unwatched(blocks, "embed" in words, embed_tokens=model.model.embed_tokens, layers=model.model.layers)
    given = (tokens, targets, ends, layout, positions, stream)
    losses = stream_loss(blocks, segments, *given, _gathered(blocks), context)
    return losses if losses.dim() == 0 else losses.view(tokens.shape)


def _words(model: CkptCausalLM) -> dict[str, Words]:
    """Which words this process has of embedding and head, where tensor parallelism has dealt them out."""
    parts: dict[str, Any] = {"embed": model.model.embed_tokens, "head": model.lm_head}
    found: dict[str, Words] = {}
    for name, module in parts.items():
        weight = module.weight
        if is_dealt_out(weight) and any(map(deals_out, hooks_of(module))) and weight.device_mesh.ndim == 1:
            check_layout(weight, None, 0.0)
            found[name] = Words.of(weight.device_mesh, weight.shape[0])
    return found


def stream_loss(
    blocks: list[CheckpointedBlock],
    segments: int,
    tokens: Tensor,
    targets: Targets,
    ends: Ends,
    layout: Layout,
    positions: Tensor | None,
    stream: Stream,
    layers: Sequence[nn.Module] | None = None,
    context: ContextParallel | None = None,
) -> Tensor:
    """The loss of tokens, (T,) or (B, S), between these ends: a scalar, or (T,) with reduction "none".

    positions: (T,) or None; all checked by the caller. layers: the modules that the blocks' weights are gathered for,
    where they are gathered for one at a time. context: the processes that share the sequences, each of which is given
    all of this.
    """

    x = ends.weights["embed"].new_empty(0)
    trained = [n for n, w in ends.weights.items() if torch.is_grad_enabled() and w.requires_grad]
    looked_up = not {"embed", "table"}.isdisjoint(trained)

    def of_tiles(tokens: Tensor, targets: Targets, ends: Ends, layout: Layout, positions: Tensor | None) -> Tensor:
        stack = _stack(blocks, segments, layout, positions, x, looked_up, stream, layers, context=context)
        inward = bool(stack.schedule.backward)

        def make_ends() -> tuple[Source, Sink]:
            source = ends.source(tokens, trained, lambda rows: stack.of_positions(rows).tensor)
            return source, ends.sink(targets, layout.tokens, stack.dtype, stack.n_tiles, trained, inward)

        return _run(stack, stream, blocks, layers, make_ends, None, ends)

    if context is None:
        return of_tiles(tokens, targets, ends, layout, positions)
    return of_all_tiles(context, tokens, targets, ends, layout, positions, of_tiles)


def run_stack(
    transformer: CkptTransformer, x: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None, stream: Stream
) -> Tensor:
    """`CkptTransformer.forward`, streamed. x and y are whole: what is flat is all between them."""
    _check_called(transformer)
    errors.check_activations(x, transformer[0].d_model, packed=cu_seqlens is not None)  # type: ignore[arg-type]
    if cu_seqlens is not None:
        errors.check_cu_seqlens(cu_seqlens, x.shape[0], x.device)
    blocks, segments = blocks_of(transformer)
    if positions is not None:
        positions = errors.check_positions(positions, x, axes_of(blocks))
    _check_unwatched(blocks)
    return stream_blocks(blocks, segments, x, positions, cu_seqlens, stream, _gathered(blocks))


def stream_blocks(
    blocks: list[CheckpointedBlock],
    segments: int,
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    stream: Stream,
    layers: Sequence[nn.Module] | None = None,
) -> Tensor:
    """y of these blocks, for checked x (B, S, d_model) or (T, d_model), positions (T,) and cu_seqlens."""
    x = waited_for(x)
    layout = _layout(x.shape[:-1], cu_seqlens)
    stack = _stack(blocks, segments, layout, positions, x, x.requires_grad, stream, layers)
    return _run(stack, stream, blocks, layers, _whole_ends(stack, x), x, None)


def open_blocks(
    blocks: list[CheckpointedBlock],
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    stream: Stream,
    layers: Sequence[nn.Module],
) -> LayerRun:
    """The run of `stream_blocks` for layers that somebody else calls, one after the other."""
    x = waited_for(x)
    stack = _stack(blocks, 1, _layout(x.shape[:-1], cu_seqlens), positions, x, x.requires_grad, stream, layers)
    return _layer_run(stack, stream, blocks, _whole_ends(stack, x), x, None)


def _whole_ends(stack: Stack, x: Tensor) -> Callable[[], tuple[Source, Sink]]:
    flat, need_dx = x.detach().reshape(-1, x.shape[-1]), torch.is_grad_enabled() and x.requires_grad

    def make_ends() -> tuple[Source, Sink]:
        return Given(flat, need_dx), Whole(x.shape)

    return make_ends


def _run(
    stack: Stack,
    stream: Stream,
    blocks: list[CheckpointedBlock],
    layers: Sequence[nn.Module] | None,
    make_ends: Callable[[], tuple[Source, Sink]],
    x: Tensor | None,
    ends: Ends | None,
) -> Tensor:
    """The sink's result."""
    if layers is not None:
        return _through(_layer_run(stack, stream, blocks, make_ends, x, ends), layers)
    weights, uses = _flat({} if ends is None else ends.weights, blocks)
    session = Session(stack, stream.store, uses, make_ends, stream.progress)
    return execute(session, x, weights, stream.gradients == "by block")


def _through(run: LayerRun, layers: Sequence[nn.Module]) -> Tensor:
    token = run.begin()
    for i, layer in enumerate(layers):
        token = layer(token, pyckpt_call=InRun(run, i))
    return run.end(token)


def _layer_run(
    stack: Stack,
    stream: Stream,
    blocks: list[CheckpointedBlock],
    make_ends: Callable[[], tuple[Source, Sink]],
    x: Tensor | None,
    ends: Ends | None,
) -> LayerRun:
    def check(block: int, weights: Mapping[str, Tensor]) -> None:
        like = torch.empty(0, dtype=stack.x_dtype, device=stack.device)
        try:
            check_weights(blocks[block], weights, like, stack.dtype)
        except ValueError as reason:
            raise ValueError(f"layer {block}: {reason}, or give layers and model one MixedPrecisionPolicy") from None

    start, weights = (None, {}) if ends is None else (ends.start, ends.weights)
    return LayerRun(stack, stream.store, x, start, weights, make_ends, check, stream.progress)


def blocks_of(transformer: CkptTransformer) -> tuple[list[CheckpointedBlock], int]:
    """The blocks of a stack, and how many make a segment."""
    transformer.check_filled()
    return list(transformer), transformer.segment_length  # type: ignore[arg-type]


def _check_called(module: nn.Module) -> None:
    """Raise ValueError where something inside has its weights, or has their gradients reduced, in calls of it alone."""
    if any("_fsdp_wrapped_module" in m._modules for m in module.modules()):
        raise ValueError(
            "FSDP1 gathers weights, and reduces their gradients, in calls of the modules that it wraps, and a streamed "
            "run calls none of them. Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or run without stream="
        )


def _check_unwatched(blocks: list[CheckpointedBlock], words: bool = False, **more: nn.Module) -> None:
    """Raise ValueError where hooks wait for what goes through these modules: it may be what they change.

    words: those that look up words of other processes are known.
    """
    for i, block in enumerate(blocks):
        if block.has_own_forward:
            raise ValueError(
                f"block {i} is a {type(block).__name__} with a forward of its own, and a streamed run calls none: it "
                "reads a block's weights and options; run without stream="
            )
    for name, module in (*more.items(), *((f"block {i}", block) for i, block in enumerate(blocks))):
        known = words and name == "embed_tokens"
        if any(not (known and deals_out(hook)) for hook in others(hooks_of(module))):
            raise ValueError(
                f"{name} has hooks, and in a streamed run they would see no hidden states; remove them, or run without "
                "stream="
            )


def _gathered(blocks: list[CheckpointedBlock]) -> list[CheckpointedBlock] | None:
    """The blocks, where their weights are gathered for one at a time."""
    return blocks if any(map(gathers, blocks)) else None


def _layout(shape: torch.Size, cu_seqlens: Tensor | None) -> Layout:
    if len(shape) == 1 or cu_seqlens is not None:
        return Layout(1, shape.numel(), cu_seqlens)
    return Layout(shape[0], shape[1], None)


def _flat(
    ends: dict[str, Tensor], blocks: list[CheckpointedBlock]
) -> tuple[tuple[Tensor, ...], list[list[tuple[int, str]]]]:
    """Every weight once, and where each is used: tied ones, and those of a block used twice, in several places."""
    uses: dict[int, list[tuple[int, str]]] = {}
    weights: dict[int, Tensor] = {}
    owners: list[tuple[int, dict[str, Tensor]]] = [(ENDS, ends)]
    owners += [(i, block.weights()) for i, block in enumerate(blocks)]
    for owner, named in owners:
        for name, w in named.items():
            weights.setdefault(id(w), w)
            uses.setdefault(id(w), []).append((owner, name))
    return tuple(weights.values()), list(uses.values())


def _stack(
    blocks: list[CheckpointedBlock],
    segments: int,
    layout: Layout,
    positions: Tensor | None,
    x: Tensor,
    source_trained: bool,
    stream: Stream,
    layers: Sequence[nn.Module] | None = None,
    seeded: bool = True,
    context: ContextParallel | None = None,
) -> Stack:
    """x has the dtype and the device of the residual stream. `layers`: see `stream_loss`; then no block is run again
    for its output. `seeded`: draw the seeds of what drops.
    """
    compute = compute_dtype(x)
    if layers is None:
        for block in blocks:
            check_weights(block, block.weights(), x, compute)
    read = [b.weights().values() for b in blocks] if layers is None else [m.parameters() for m in layers]
    first = _first_trained((any(w.requires_grad for w in weights) for weights in read), source_trained)
    tile, length = min(stream.tile, layout.tokens // processes_of(context)), segments if layers is None else 1
    stack = Stack(
        plans=[block.plan(tile, x.dtype, compute, x.device) for block in blocks],
        layout=layout,
        positions=positions,
        seeds=[None] * len(blocks),
        x_dtype=x.dtype,
        dtype=compute,
        device=x.device,
        d_model=blocks[0].d_model,
        tile=tile,
        schedule=without_gradient(len(blocks)) if first is None else by_segments(len(blocks), length, first),
        context=context,
    )
    if context is not None:
        for plan in stack.plans:
            context.attend(plan.attend)  # raises where heads can't be dealt out
    fitting = _fit(stack, first, stream.store.limit, again=layers is None)
    seeds = draw_seeds(blocks) if seeded else None  # last: a run that is refused draws nothing
    if seeds is None:
        return fitting
    return dataclasses.replace(fitting, seeds=[None if s == NO_SEED else s for s in seeds.tolist()])


def _first_trained(trained: Iterable[bool], source_trained: bool) -> int | None:
    """The first block whose backward runs; None where none does."""
    if not torch.is_grad_enabled():
        return None
    return 0 if source_trained else next((i for i, wants in enumerate(trained) if wants), None)


def _fit(stack: Stack, first: int | None, limit: int | None, again: bool) -> Stack:
    """The run as its blocks want it or, where that is too much for the store, the one that repeats the least.

    That is: x of every block; then, with `again`, of fewer and fewer blocks (`by_slots`). Raises ValueError where the
    least is too much.
    """
    if limit is None or store_plan(stack).store_bytes <= limit:
        return stack
    least = stack
    if first is not None:
        blocks = len(stack.plans)
        bare = [dataclasses.replace(plan, save=NOTHING) for plan in stack.plans]
        for slots in range(blocks - first, 0 if again else blocks - first - 1, -1):
            least = dataclasses.replace(stack, plans=bare, schedule=by_slots(blocks, slots, first))
            if store_plan(least).store_bytes <= limit:
                return least
    raise ValueError(
        f"this run needs at least {store_plan(least).store_bytes:,} bytes of the store, and the limit is {limit:,} "
        f"({store_plan(stack).store_bytes:,} would be best); raise the limit or take a shorter sequence"
    )


def _loss_options(
    softcap: float, z_loss: float, label_smoothing: float, reduction: str, recompute: bool
) -> LossOptions:
    if recompute:
        raise ValueError(
            "recompute=True is not for a streamed loss, which keeps no logits and sums the head's gradient up tile by "
            "tile; leave it out"
        )
    return LossOptions(reduction, softcap, z_loss, label_smoothing)


def check_stream(stream: object) -> None:
    if not isinstance(stream, Stream):
        raise TypeError(f"stream must be a pyckpt.Stream, got {type(stream).__name__}")
