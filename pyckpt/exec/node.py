"""The autograd node of a run of blocks (one block, or a segment of a stack).

Weights are explicit inputs and their gradients are returned once, so the hooks of DDP, FSDP2 and ZeRO fire once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyckpt import errors
from pyckpt.attend.context import ContextParallel
from pyckpt.attend.dense import Layout
from pyckpt.exec.asked import asked
from pyckpt.exec.offload import Parcel, keep
from pyckpt.exec.resident import BlockPlan, Cast, Inputs, Kept, run_backward, run_forward
from pyckpt.exec.shares import part_of, whole_of
from pyckpt.save import Save
from pyckpt.tokenwise.tensor_parallel import TensorParallel

NO_SEED = -1  # in a tensor of seeds, of a block that drops nothing
_HOW_TO = "Use the block without {what}, or a plain PyTorch block for that part of the model."


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive blocks that run as one node: their plans, each one's weight names, where what is kept waits.

    With `context`, x is this process's part of the sequences, packed ones of so many `rows`, and cu_seqlens, of which
    `read` are the values (`Layout`), are those of all tokens.
    """

    plans: list[BlockPlan]
    names: list[tuple[str, ...]]
    dtype: torch.dtype
    placed: Save | None = None
    context: ContextParallel | None = None
    read: tuple[Sequence[int], Sequence[int]] | None = None
    rows: int = 1

    @property
    def shared(self) -> tuple[str, ...]:
        """Of what is kept, those tensors of which each of the blocks' `processes` keeps a part."""
        return () if self.placed is None else self.placed.shared

    @property
    def processes(self) -> TensorParallel:
        """That have the first block's weights together."""
        found = self.plans[0].processes
        assert found is not None
        return found

    def split(self, weights: tuple[Tensor, ...]) -> list[Cast]:
        """Flat weights, in order, by block, to be had in the dtype that the products take while a block runs."""
        out: list[Cast] = []
        i = 0
        for plan, names in zip(self.plans, self.names, strict=True):
            part = dict(zip(names, weights[i : i + len(names)], strict=True))
            out.append(functools.partial(plan.tokenwise.cast, part, self.dtype))
            i += len(names)
        return out


def execute(
    run: Run,
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: tuple[Tensor, ...],
) -> Tensor:
    """y of the run; one autograd node where a gradient can be asked for, nothing kept where none can.

    seeds: int64 (blocks,) on the CPU, of each block's dropout; None drops nothing.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "pyckpt blocks do not support torch.func transforms (vmap, grad, jvp, jacrev, ...). "
            + _HOW_TO.format(what="the transform")
        )
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        if run.placed is not None:
            x = x.contiguous()  # as it comes back: the backward runs on what the forward ran on
        return _RunFunction.apply(run, x, positions, cu_seqlens, seeds, *weights)
    errors.check_transforms("a pyckpt block", x, *weights)  # a node has its own word on tangents
    return forward(run, x, positions, cu_seqlens, seeds, weights, keeping=False)[0]


def inputs(run: Run, x: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Inputs:
    batch, seq = (run.rows, x.shape[0] // run.rows) if x.dim() == 2 else (x.shape[0], x.shape[1])
    flat = x.reshape(-1, x.shape[-1])
    layout = Layout(batch, seq, cu_seqlens, run.read)
    if positions is None and run.context is not None:
        positions = run.context.places(layout.starts[0], batch, seq, x.device)
    return Inputs(flat, positions, layout, run.dtype)


def _seeds(run: Run, x: Tensor, seeds: Tensor | None) -> list[int | None]:
    if seeds is None:
        return [None] * len(run.plans)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a block that drops values is being captured in a CUDA graph, which would drop the same ones at each "
            "replay: what is dropped follows from a number that is drawn on the CPU. Capture without dropout "
            "(block.eval(), or dropout=0), or run it uncaptured"
        )
    drawn = [None if s == NO_SEED else s for s in seeds.tolist()]
    return drawn if run.context is None else [run.context.seed(s) for s in drawn]


def forward(
    run: Run,
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: tuple[Tensor, ...],
    keeping: bool,
) -> tuple[Tensor, Kept]:
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        inp = inputs(run, x, positions, cu_seqlens)
        y, kept = run_forward(run.plans, run.split(weights), inp, _seeds(run, x, seeds), keeping)
    # No view: nobody could write to one that a Function returns, and `x = block(x); x += ...` is what people write.
    return torch.ops.aten._unsafe_view(y, x.shape), kept


def backward(
    run: Run,
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: tuple[Tensor, ...],
    kept: Kept,
    dy: Tensor,
    need_dx: bool,
    need_weights: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and one gradient (or None) for each of the flat weights, in the weights' own dtypes."""
    wanted, i = [], 0
    for names in run.names:
        wanted.append([n for n, need in zip(names, need_weights[i : i + len(names)], strict=True) if need])
        i += len(names)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dx, grads = run_backward(
            run.plans,
            run.split(weights),
            inputs(run, x, positions, cu_seqlens),
            _seeds(run, x, seeds),
            kept,
            dy.reshape(-1, dy.shape[-1]),
            wanted,
            need_dx,
        )
    flat = [g.get(n) for g, names in zip(grads, run.names, strict=True) for n in names]
    flat = [None if g is None else g.to(w.dtype) for g, w in zip(flat, weights, strict=True)]
    return None if dx is None else dx.view(x.shape), flat


class _RunFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, positions: Any, cu_seqlens: Any, seeds: Any, *weights: Tensor) -> Tensor:
        y, kept = forward(run, x, positions, cu_seqlens, seeds, weights, keeping=True)
        here = {"x": x, **kept}
        parcel: Parcel | None = None
        ctx.shared = {n: here[n].shape for n in run.shared if n in here}
        here |= {n: part_of(here[n], run.processes) for n in ctx.shared}
        if run.placed is not None:
            parcel, here = keep(here, run.placed)
        ctx.run, ctx.parcel, ctx.here, ctx.n_weights = run, parcel, tuple(here), len(weights)
        ctx.save_for_backward(positions, cu_seqlens, seeds, *weights, *here.values())
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        errors.check_unbatched("a pyckpt block", grad_outputs)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward through a pyckpt block is not supported: backward() or grad() was called with "
                "create_graph=True, and the block's backward is made of kernels that have no derivative of their own. "
                + _HOW_TO.format(what="create_graph")
            )
        positions, cu_seqlens, seeds, *rest = ctx.saved_tensors
        weights, values = tuple(rest[: ctx.n_weights]), rest[ctx.n_weights :]
        del rest
        kept = dict(zip(ctx.here, values, strict=True))
        del values
        if ctx.parcel is not None:
            kept |= ctx.parcel.fetch()
        kept |= {n: whole_of(kept[n], shape, ctx.run.processes) for n, shape in ctx.shared.items()}
        x = kept.pop("x")
        need = asked(ctx)
        dx, grads = backward(
            ctx.run, x, positions, cu_seqlens, seeds, weights, kept, grad_outputs[0], need[1], tuple(need[5:])
        )
        if ctx.parcel is not None:
            if graph_is_kept():
                ctx.parcel.rest()
            else:
                ctx.parcel.release()
        return None, dx, None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            "forward-mode differentiation through a pyckpt block is not supported. "
            + _HOW_TO.format(what="forward-mode")
        )


def graph_is_kept() -> bool:
    """Whether the backward under way was asked for with retain_graph, so that there may be another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
