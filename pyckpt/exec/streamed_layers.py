"""A streamed run over layers whose weights are there for one layer at a time, as a chain of autograd nodes.

    the ends' weights -> first layer's node -> ... -> last layer's node -> the loss

FSDP2 gathers a layer's weights before the layer is called and lets them go after, and does the same around its
backward, which it hears of by the gradients of what the layer was given and has returned (Zhao et al. 2023, "PyTorch
FSDP", section 4); so does DeepSpeed's ZeRO-3 with a layer that is one of its leaves. So a layer's tiles are walked
through inside the layer's own call, and the walk back is the backward of a node that was made there. Between the layers
goes an empty token in the place of hidden states, which wait in the store; its gradient says that the layer behind is
done.

Nothing can be made again of a layer but in its own backward: each layer's input is kept, and a backward is not run
twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pyckpt import errors
from pyckpt.exec.ends import Gradients, Named, Sink, Source
from pyckpt.exec.places import store_plan
from pyckpt.exec.schedule import Back
from pyckpt.exec.session import HOW_TO, Node, at_work, check_backward, given_gradient, summed
from pyckpt.exec.stack import Stack
from pyckpt.exec.streamed import Progress, Streamed
from pyckpt.exec.unchanged import Unchanged
from pyckpt.store import OpenStore, Store


class _Here:
    """The weights of the block under way. Apart from `LayerRun`: a circle would keep its store."""

    def __init__(self) -> None:
        self._block, self._weights = -1, Named()

    @contextmanager
    def with_weights(self, block: int, weights: Named) -> Iterator[None]:
        self._block, self._weights = block, weights
        try:
            yield
        finally:
            self._weights = {}

    def of(self, block: int) -> Named:
        assert block == self._block
        return self._weights


class LayerRun:
    """A streamed run whose blocks bring their weights: `begin`, `layer` of one after the other, `end`.

    x: what the source is given, where it is a stack's alone. start: see `Ends`. ends: the weights of source and sink,
    there from the forward to the end of the backward; tied ones are one tensor under two names. make_ends: makes the
    source and the sink. check: raises where weights of a block are not what the run's stack was made for.
    """

    def __init__(
        self,
        stack: Stack,
        store: Store,
        x: Tensor | None,
        start: Tensor | None,
        ends: Named,
        make_ends: Callable[[], tuple[Source, Sink]],
        check: Callable[[int, Named], None],
        progress: Progress | None,
    ) -> None:
        errors.check_transforms("a streamed run", x, *ends.values())
        assert all(isinstance(step, Back) for step in stack.schedule.backward)
        self.stack, self.ends, self._x, self._start, self._check = stack, ends, x, start, check
        self._backs = frozenset(stack.schedule.backward_blocks)
        self._here, self._begun, self._next = _Here(), False, 0
        self._source, sink = make_ends()
        self._given = Unchanged()
        self._given.note(stack, self._source, sink)
        self._store: OpenStore | None = store.open(store_plan(stack), stack.device)
        self._run = Streamed(stack, self._store, self._source, sink, self._here.of, progress)

    # What the model's forward calls.

    def begin(self) -> Tensor:
        """The first layer's token."""
        return _Ends.apply(self, self._x, self._start, *{id(w): w for w in self.ends.values()}.values())

    def layer(self, block: int, token: Tensor, read: Callable[[], Named]) -> Tensor:
        """The next layer's token. `read` gives the block's weights while the layer is called, and in its backward."""
        if block != self._next:
            raise RuntimeError(
                f"layer {block} of a streamed run was called out of turn: each is called once, one after the other. "
                "What runs a layer again in the backward (torch.utils.checkpoint, checkpoint_wrapper) has to go: a "
                "streamed layer keeps nothing on the device that would be worth it"
            )
        self._next += 1
        weights = read()
        if block not in self._backs:
            self.advance(block, weights)
            return token.clone()  # where FSDP2 looks for the layer's gradients, it warns of views
        # Whether what is before it wants its input's gradient.
        inward = self.reads_source if block == 0 else block - 1 in self._backs
        return _Layer.apply(self, block, inward, read, tuple(weights), token, *weights.values())

    def end(self, token: Tensor) -> Tensor:
        """The sink's result."""
        if torch.is_grad_enabled() and token.requires_grad:
            return _Loss.apply(self, tuple(self.ends.values()), token)
        result = self.end_forward()
        self.close()
        return result

    @property
    def reads_source(self) -> bool:
        """The source wants its gradient."""
        read = (self._x, self.ends.get("embed"), self.ends.get("table"))
        return any(t is not None and t.requires_grad for t in read)

    # What its nodes call.

    def begin_forward(self) -> None:
        with self._at_work():
            self._run.begin_forward(self.ends)

    def advance(self, block: int, weights: Named) -> None:
        with self._at_work(), self._here.with_weights(block, weights):
            self._check(block, weights)
            self._run.advance(block)

    def end_forward(self) -> Tensor:
        with self._at_work():
            return self._run.end_forward(self.ends)

    def begin_backward(self, upstream: Tensor) -> None:
        if self._store is None or self._begun:
            raise RuntimeError(
                "a streamed run of layers whose weights are gathered one layer at a time has one backward, and this is "
                "the second. " + HOW_TO.format(what="retain_graph")
            )
        self._given.check(forward=False)
        self._begun = True
        with self._at_work():
            self._run.begin_backward(self.ends, upstream)

    def back(self, block: int, weights: Named, wanted: list[str], need_dx: bool, last: bool) -> Gradients:
        """The gradients of a block's weights. `last`: nothing comes after this."""
        with self._at_work(), self._here.with_weights(block, weights):
            found = self._run.back(block, wanted, need_dx)
        if last:
            self.close()
        return found

    def end_backward(self) -> Gradients:
        with self._at_work():
            found = self._run.end_backward(self.ends, self.reads_source)
        self.close()
        return found

    @property
    def dx(self) -> Tensor | None:
        """The gradient of the x that was given, where that wants one."""
        return given_gradient(self._source, None if self._x is None else self._x.shape)

    def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            del self._run  # its scratch, and what its ends hold
            store.close()

    def _at_work(self) -> AbstractContextManager[None]:
        return at_work(self.stack.device, self.close)


@dataclasses.dataclass(frozen=True)
class InRun:
    """What tells a layer that it is called as a block of this run, with a token."""

    run: LayerRun
    block: int


class _Ends(Node):
    """Last in the backward: what surrounds the layers. x, start: see `LayerRun`; weights: of the ends, each once."""

    @staticmethod
    def forward(ctx: Any, run: LayerRun, x: Tensor | None, start: Tensor | None, *weights: Tensor) -> Tensor:
        run.begin_forward()
        ctx.run, ctx.names = run, [[n for n, w in run.ends.items() if w is weight] for weight in weights]
        ctx.save_for_backward(*weights)
        return torch.zeros((), device=run.stack.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        (need_start, *need), grads = ctx.needs_input_grad[2:], ctx.run.end_backward()
        given = [
            summed((grads.get(n) for n in names), weight) if needed else None
            for needed, names, weight in zip(need, ctx.names, ctx.saved_tensors, strict=True)
        ]
        return None, ctx.run.dx, torch.zeros_like(grad_outputs[0]) if need_start else None, *given


class _Layer(Node):
    """`inward`: something before the block wants the gradient of its input.

    A weight that is not the layer's parameter but made of it (GPT-NeoX's by head), or a view of it, would have what was
    gathered outlive the call: it is read again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: LayerRun,
        block: int,
        inward: bool,
        read: Callable[[], Named],
        names: tuple[str, ...],
        token: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        run.advance(block, dict(zip(names, weights, strict=True)))
        ctx.run, ctx.block, ctx.inward, ctx.read, ctx.names = run, block, inward, read, names
        ctx.save_for_backward(*(w if w.is_leaf and not w._is_view() else None for w in weights))
        return torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        (need_token, *need), weights = ctx.needs_input_grad[5:], dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if any(w is None for w in weights.values()):
            weights |= {n: w for n, w in ctx.read().items() if weights[n] is None}
        wanted = [n for n, needed in zip(ctx.names, need, strict=True) if needed]
        grads = ctx.run.back(ctx.block, weights, wanted, ctx.inward, not need_token)
        given = [summed([grads.get(n)], w) if n in wanted else None for n, w in weights.items()]
        return *[None] * 5, torch.zeros_like(grad_outputs[0]) if need_token else None, *given


class _Loss(Node):
    """First in the backward. `weights`: of the ends, whose gradients come last."""

    @staticmethod
    def forward(ctx: Any, run: LayerRun, weights: tuple[Tensor, ...], token: Tensor) -> Tensor:
        ctx.run, ctx.like = run, torch.zeros_like(token)
        ctx.save_for_backward(*weights)
        return run.end_forward()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        _ = ctx.saved_tensors  # raises where they were written to since
        ctx.run.begin_backward(grad_outputs[0])
        return None, None, ctx.like
