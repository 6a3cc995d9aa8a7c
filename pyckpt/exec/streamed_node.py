"""The autograd node of a streamed run: weights (and, for a stack alone, x) in, the loss or y out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt import errors
from pyckpt.compiling import uncompiled
from pyckpt.exec import streamed_chain
from pyckpt.exec.session import Node, Session, check_backward


@uncompiled
def execute(session: Session, x: Tensor | None, weights: tuple[Tensor, ...], by_block: bool = False) -> Tensor:
    """The sink's result; one autograd node where a gradient can be asked for, nothing kept where none can.

    by_block: a node for each block instead, so that its weights have their gradients as soon as they are made.
    """
    try:
        errors.check_transforms("a streamed run", x, *weights)
    except RuntimeError:
        session.close()
        raise
    grad = torch.is_grad_enabled()
    if grad and ((x is not None and x.requires_grad) or any(w.requires_grad for w in weights)):
        return streamed_chain.apply(session, x, weights) if by_block else _Streamed.apply(session, x, *weights)
    return session.forward(weights, keeping=False)


class _Streamed(Node):
    @staticmethod
    def forward(ctx: Any, session: Session, x: Tensor | None, *weights: Tensor) -> Tensor:
        result = session.forward(weights, keeping=True)
        ctx.session, ctx.shape = session, None if x is None else x.shape
        ctx.save_for_backward(*weights)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        session, weights = ctx.session, ctx.saved_tensors
        need = ctx.needs_input_grad
        looked_up = any(n and session.reads_source(i) for i, n in enumerate(need[2:]))
        grads = session.backward(weights, grad_outputs[0], tuple(need[2:]), need[1] or looked_up)
        return None, session.dx(ctx.shape), *grads
