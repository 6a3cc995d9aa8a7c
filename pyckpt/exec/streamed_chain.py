"""A streamed run as a chain of autograd nodes, one for each block, which gives each block's gradients when it has them.

    ends and shared weights -> block 0's -> ... -> the last block's -> the run itself -> the result

Between the nodes goes an empty token, whose gradient says that the block behind is done: so autograd walks them from
the last block to the first, as the executor does. What it has made of a block's weights goes to their `.grad`, or to
hooks, before the next block begins, and never is there a second set of all gradients. (Lv et al. 2023, "Full parameter
fine-tuning for large language models with limited resources", has the optimizer step there.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyckpt.exec.session import Node, Session, check_backward


def apply(session: Session, x: Tensor | None, weights: tuple[Tensor, ...]) -> Tensor:
    """The sink's result."""
    token = _Others.apply(session, x, *(weights[i] for i in session.of_others()))
    inward = (x is not None and x.requires_grad) or any(
        w.requires_grad and session.reads_source(i) for i, w in enumerate(weights)
    )
    for block in session.backward_blocks:
        token = _Block.apply(session, block, inward, token, *(weights[i] for i in session.of_block(block)))
        inward = True
    return _Run.apply(session, weights, token)


class _Others(Node):
    """Last in the backward: what surrounds the blocks, and weights that several of them read."""

    @staticmethod
    def forward(ctx: Any, session: Session, x: Tensor | None, *weights: Tensor) -> Tensor:
        ctx.session, ctx.shape = session, None if x is None else x.shape
        return session.new_token()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        session, (_, need_dx, *need) = ctx.session, ctx.needs_input_grad
        looked_up = any(n and session.reads_source(i) for n, i in zip(need, session.of_others(), strict=True))
        grads = session.end_backward(tuple(need), need_dx or looked_up)
        return None, session.dx(ctx.shape), *grads


class _Block(Node):
    """`inward`: something before the block wants the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, session: Session, block: int, inward: bool, token: Tensor, *weights: Tensor) -> Tensor:
        ctx.session, ctx.block, ctx.inward = session, block, inward
        return session.new_token()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        _, _, _, need_token, *need = ctx.needs_input_grad
        grads = ctx.session.back(ctx.block, tuple(need), ctx.inward and need_token, not need_token)
        return None, None, None, torch.zeros_like(grad_outputs[0]) if need_token else None, *grads


class _Run(Node):
    """The run itself. It keeps the weights for all nodes: its forward may have to run again (retain_graph)."""

    @staticmethod
    def forward(ctx: Any, session: Session, weights: tuple[Tensor, ...], token: Tensor) -> Tensor:
        result = session.forward(weights, keeping=True)
        ctx.session = session
        ctx.save_for_backward(*weights)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        check_backward(grad_outputs)
        ctx.session.begin_backward(ctx.saved_tensors, grad_outputs[0])
        return None, None, ctx.session.new_token()
