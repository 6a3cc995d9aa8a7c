"""`keep_within`: as much kept from forward to backward as some memory holds, so that less of it is made again."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import torch
from torch import nn

from pyckpt import errors
from pyckpt.block import CheckpointedBlock, compute_dtype
from pyckpt.measure.units import format_bytes, parse_bytes
from pyckpt.model import CkptTransformer
from pyckpt.save import SAVE_SETS, kept_bytes
from pyckpt.swap.replaced import replaced_in


@dataclasses.dataclass(frozen=True)
class Kept:
    """What `keep_within` chose.

    sets: the save set of each block, in the order of the model's modules; one entry for a block that is in several
    places of a stack, which keeps as often. bytes: what they keep of a forward of `tokens` tokens, of the `memory` that
    they might.
    """

    sets: tuple[str, ...]
    bytes: int
    memory: int
    tokens: int

    @property
    def runs(self) -> str:
        """The save sets of blocks one after another: "2 of 'attention', 6 of 'all'"."""
        return ", ".join(f"{len(list(same))} of {name!r}" for name, same in itertools.groupby(self.sets))

    def __str__(self) -> str:
        return (
            f"{len(self.sets)} block{'s' if len(self.sets) != 1 else ''} ({self.runs}) keep {format_bytes(self.bytes)} "
            f"of {format_bytes(self.memory)} for {self.tokens:,} tokens"
        )


def keep_within(model: nn.Module, memory: int | str, tokens: int, dtype: torch.dtype | None = None) -> Kept:
    """Set each block's save set: together they keep as much from forward to backward as `memory` holds.

    What a block keeps it need not make again: the more memory, the fewer products. All blocks keep attention's output
    before one keeps more, since its forward grows with the square of the length; then the last blocks come first, whose
    tensors the backward takes up first. Gradients are the same bits. A later call, with other numbers, chooses anew.

    To find out how much memory there is: run a step, and take what its peak left free of the device.

    Args:
        model: with swapped layers (`swap`), or with blocks of pyckpt anywhere in it.
        memory: bytes, or text such as "20GiB", for what all blocks keep of one forward. What else a step takes, and
            layers that run again as a whole, which keep their inputs and attention's output, are not in it.
        tokens: the most tokens of one forward, batch times sequence; a longer one keeps more.
        dtype: of products, as under autocast; None: autocast's where it is on, else the weights'.

    Raises TypeError for what is no module, and for what is no dtype. Raises ValueError for numbers and dtypes that do
    not fit, where the inputs of all blocks, the least that they may keep, take more than `memory`, and where the model
    has no blocks, or has some that run in segments or streamed, or keep tensors in places of their own (`Save`).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    room = parse_bytes(memory, "memory")
    count = errors.as_int(tokens)
    if count is None or count < 1:
        raise ValueError(f"tokens={tokens!r}: expected a positive number of tokens, batch times sequence")
    errors.check_dtype("dtype", dtype)
    blocks = _blocks(model)
    _check(model, blocks)
    if not blocks:
        swapped = any(True for _ in replaced_in(model))
        raise ValueError(
            f"this {type(model).__name__} has no blocks that keep a save set: "
            + (
                "its swapped layers run again as a whole, see the report of pyckpt.swap"
                if swapped
                else "call pyckpt.swap(model) first, or build it of pyckpt.CkptTransformerBlock"
            )
        )
    uses = _uses(model)
    options = [_options(ways[0], count * max(1, uses[id(ways[0])]), dtype) for ways in blocks]
    sets = _chosen(options, room)
    for ways, name in zip(blocks, sets, strict=True):
        for block in ways:
            block.save = name
    return Kept(tuple(sets), sum(o[name] for o, name in zip(options, sets, strict=True)), room, count)


def _blocks(model: nn.Module) -> list[tuple[CheckpointedBlock, ...]]:
    """The blocks, in the order of the modules; several together where one of them runs in a call."""
    replaced = dict(replaced_in(model))
    found: list[tuple[CheckpointedBlock, ...]] = []
    for name, module in model.named_modules():
        if isinstance(module, CheckpointedBlock):
            found.append((module,))
        elif name in replaced and replaced[name].ways:
            found.append(replaced[name].ways)
    return found


def _uses(model: nn.Module) -> Counter[int]:
    """How many times a forward calls each block, by its id: one in two places of a stack keeps twice as much."""
    stacks = (m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
    return Counter(id(child) for stack in stacks for child in stack._modules.values())


def _check(model: nn.Module, blocks: list[tuple[CheckpointedBlock, ...]]) -> None:
    segmented = any(isinstance(m, CkptTransformer) and m.segment_length > 1 for m in model.modules())
    if segmented or any(r.keeps_inputs_alone for _, r in replaced_in(model)):
        raise ValueError(
            "the model's blocks run in segments or streamed, where no save set is kept: take segments=None and no "
            "stream to spend memory on fewer repetitions"
        )
    if any(block.placed for ways in blocks for block in ways):
        raise ValueError(
            "the blocks have a pyckpt.Save that places what they keep elsewhere: give them the name of a save set, "
            "save='attention', before you call keep_within"
        )


def _options(block: CheckpointedBlock, tokens: int, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes that the block keeps of so many tokens, by the save sets that it has, from the one that keeps least."""
    x = block.like_weights()
    made_in = dtype or compute_dtype(x)
    given, found = block.save, {}
    try:
        for name in reversed(SAVE_SETS):
            try:
                block.save = name
            except ValueError:
                continue
            plan = block.plan(tokens, x.dtype, made_in, x.device)
            kept = (plan.save, plan.attend, plan.post_tensors, block.d_model, x.dtype, made_in)
            found[name] = tokens * kept_bytes(*kept)
    finally:
        block.save = given
    return found


def _chosen(options: list[dict[str, int]], room: int) -> list[str]:
    """One save set a block, together in `room` bytes."""
    sets = [next(iter(o)) for o in options]
    left = room - sum(o[name] for o, name in zip(options, sets, strict=True))
    if left < 0:
        raise ValueError(
            f"memory={format_bytes(room)} is less than the inputs of all blocks take, {format_bytes(room - left)}: "
            "give more, or fewer tokens, or take segments= or stream=, which keep fewer inputs, or none on the device"
        )
    for wanted in (("attention",), SAVE_SETS):
        for i in reversed(range(len(sets))):
            o = options[i]
            more = [n for n in wanted if n in o and o[sets[i]] < o[n] <= o[sets[i]] + left]
            if more:
                left -= o[more[0]] - o[sets[i]]
                sets[i] = more[0]
    return sets
