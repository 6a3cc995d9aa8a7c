"""Where the tensors of a streamed run are in its store, and so what the store has to hold."""

from __future__ import annotations

import torch

from pyckpt.exec.schedule import Advance, Back
from pyckpt.exec.stack import Stack
from pyckpt.ops.chunks import acc_dtype
from pyckpt.store import Plan, Slab

HIDDEN = ("h", 0)
"""The last block's output; from the loss on, the gradient of the present block's output, and then of its input."""


class Numbers:
    """Which tensors of each slab are in use; the lowest free number is taken first."""

    def __init__(self) -> None:
        self._used: dict[str, set[int]] = {}
        self.most: dict[str, int] = {}

    def take(self, name: str) -> int:
        used = self._used.setdefault(name, set())
        number = next(i for i in range(len(used) + 1) if i not in used)
        used.add(number)
        self.most[name] = max(self.most.get(name, 0), number + 1)
        return number

    def give(self, name: str, number: int) -> None:
        self._used[name].remove(number)


class Places:
    """Where each block's input and what is kept of it are: the same while planning and while running."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._last = stack, len(stack.plans)
        self.numbers = Numbers()
        self.x: dict[int, tuple[str, int]] = {}
        self.kept: dict[int, dict[str, int]] = {}

    def input(self, block: int) -> tuple[str, int]:
        """Of the block; that of the one after the last is the stack's output."""
        if block not in self.x:
            self.x[block] = HIDDEN if block == self._last else ("x", self.numbers.take("x"))
        return self.x[block]

    def keep(self, block: int) -> dict[str, int]:
        self.kept[block] = {name: self.numbers.take(name) for name in self._stack.kept(block)}
        return self.kept[block]

    def forget(self, block: int) -> list[tuple[str, int]]:
        """Give back the block's input and all that was kept of it."""
        found = [*self.kept.pop(block, {}).items()]
        place = self.x.pop(block, None)
        found += [place] if place is not None else []
        for name, number in found:
            if name != HIDDEN[0]:
                self.numbers.give(name, number)
        return found


def store_plan(stack: Stack) -> Plan:
    """The slabs that this run needs: the numbers of its schedule, walked through without running it."""
    places = Places(stack)
    places.input(0)
    needs_back = False
    for step in stack.schedule:
        with_kept = isinstance(step, Advance) and step.keep
        scratch = [n for n in ("k", "v") if not (with_kept and n in stack.kept(step.block))]
        if isinstance(step, Back):
            needs_back = True
            scratch = [n for n in scratch if n not in places.kept.get(step.block, {})]
        numbers = [(n, places.numbers.take(n)) for n in scratch]
        if isinstance(step, Advance):
            places.input(step.block + 1)
            if step.keep:
                places.keep(step.block)
        for n, number in numbers:
            places.numbers.give(n, number)
        if isinstance(step, Back) or step.drop:
            places.forget(step.block)
    return Plan(stack.tokens, stack.tile, tuple(_slabs(stack, places.numbers.most, needs_back)))


# Tiles on the device at a time: what compute holds, the next one on its way in, the last one on its way out.
_BUFFERS = {"x": 4, "h": 3, "k": 4, "v": 4, "dk": 3, "dv": 3, "dq": 2}


def _slabs(stack: Stack, most: dict[str, int], needs_back: bool) -> list[Slab]:
    acc = acc_dtype(stack.dtype)
    shapes: dict[str, tuple[int, torch.dtype]] = {
        "x": (stack.d_model, stack.x_dtype),
        "h": (stack.d_model, stack.x_dtype),
    }
    for block, plan in enumerate(stack.plans):
        d_k, d_v = stack.key_widths(plan)
        widths = {"k": (d_k, stack.dtype), "v": (d_v, stack.dtype)}
        if needs_back:
            widths |= {"dk": (d_k, acc), "dv": (d_v, acc)}
            if plan.attend.window[1] != 0:
                widths["dq"] = (plan.d_q, stack.dtype)
        for name, shape in {**widths, **stack.kept(block)}.items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"block {block} has {name} of width {shape[0]}, an earlier one of {shapes[name][0]}; a "
                    "streamed stack needs blocks with the same heads, head_dim and d_ff"
                )
    always = {"h": 1, "dk": 1, "dv": 1, "dq": 1}
    counts = {name: most.get(name, always.get(name, 0)) for name in shapes}
    return [Slab(n, *shapes[n], counts[n], _BUFFERS.get(n, 2)) for n in shapes if counts[n]]
