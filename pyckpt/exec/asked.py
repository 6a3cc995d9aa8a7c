"""Which gradients of a node the backward under way asks for, as nodes of PyTorch's own ask."""

from __future__ import annotations

from typing import Any

import torch


def asked(ctx: Any) -> tuple[bool, ...]:
    """Of each argument of a `torch.autograd.Function`: `ctx.needs_input_grad`, less what nothing reads this time.

    That is for `torch.autograd.grad` and `backward(inputs=)`, which want some of the leaves: without it a gradient of
    x alone has the products of all weights' made too, and pipelines that put off weights' gradients pay for them twice.
    """
    needed: tuple[bool, ...] = ctx.needs_input_grad
    edges = getattr(ctx, "next_functions", None)  # none where compiled autograd stands in for the engine
    if edges is None:
        return needed
    runs = iter([_runs(node) for node, _ in edges if node is not None])
    return tuple(n and next(runs, True) for n in needed)


def _runs(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # of a leaf that is asked for by `grad`, which is what it says
        return True
