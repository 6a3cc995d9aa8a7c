"""Tokenwise parts from any two modules, differentiated by autograd one tile at a time.

The oracle of the hand-written parts, and what runs an architecture that they do not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.workspace import Workspace


class _Recorded(NamedTuple):
    """What `pre` made of x and of leaves in the place of weights, the `names` of which want a gradient."""

    x: Tensor
    made: tuple[Tensor, Tensor, Tensor]
    leaves: dict[str, Tensor]
    names: list[str]


class GenericTokenwise:
    """`Tokenwise` of modules pre(x, positions) -> (q, k, v) and post(x, o) -> y, all on (t, width) tensors.

    Weight names are "pre.<name>" and "post.<name>". No parameter's own gradient hooks run inside the loop over
    tiles: the modules are called on detached stand-ins, and the sums are returned once.
    """

    makes_delta = False
    made_once: frozenset[str] = frozenset()
    by_autograd = True
    _again: _Recorded | None = None

    def __init__(self, pre: nn.Module, post: nn.Module) -> None:
        self._pre, self._post = pre, post
        self.pre_names = tuple(f"pre.{n}" for n, _ in pre.named_parameters())
        self.post_names = tuple(f"post.{n}" for n, _ in post.named_parameters())

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        return dict(w)

    def pre(self, w: Weights, tile: Tile, q: Tensor | None, k: Tensor | None, v: Tensor | None, ws: Workspace) -> None:
        _fill((q, k, v), self._call_pre(w, tile.x.detach(), tile.positions.tensor))

    def pre_again(
        self,
        w: Weights,
        tile: Tile,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        need_dx: bool,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        self._again = self._recorded_pre(w, tile, need_dx, grads)
        _fill((q, k, v), [t.detach() for t in self._again.made])

    def finish_kept(self, w: Weights, tile: Tile, q: Tensor, k: Tensor) -> None:
        raise AssertionError("a generic block keeps q and k as attention reads them")

    def post(self, w: Weights, tile: Tile, o: Tensor, y: Tensor, ws: Workspace) -> None:
        got = self._call_post(w, tile.x.detach(), o.detach())
        _check_shape("post's output", got, y)
        y.copy_(got)

    def post_bwd(
        self,
        w: Weights,
        tile: Tile,
        o: Tensor,
        dy: Tensor,
        dx: Tensor | None,
        do: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        leaves, names = _leaves(w, self.post_names, grads)
        x, o = _leaf(tile.x, dx is not None), _leaf(o, do is not None)
        with torch.enable_grad():
            y = self._call_post({**w, **leaves}, _inner(x), _inner(o))
        dx_made, do_made = _differentiate([y], [dy], [x, o], leaves, names, grads)
        for out, made in ((dx, dx_made), (do, do_made)):
            if out is not None:
                out.zero_() if made is None else out.copy_(made)

    def pre_bwd(
        self,
        w: Weights,
        tile: Tile,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dx: Tensor | None,
        grads: WeightGradients,
        ws: Workspace,
    ) -> None:
        again = self._again or self._recorded_pre(w, tile, dx is not None, grads)
        self._again = None
        (share,) = _differentiate(list(again.made), [dq, dk, dv], [again.x], again.leaves, again.names, grads)
        if dx is not None and share is not None:
            dx += share

    def _recorded_pre(self, w: Weights, tile: Tile, need_dx: bool, grads: WeightGradients) -> _Recorded:
        leaves, names = _leaves(w, self.pre_names, grads)
        x = _leaf(tile.x, need_dx)
        with torch.enable_grad():
            made = self._call_pre({**w, **leaves}, _inner(x), tile.positions.tensor)
        return _Recorded(x, made, leaves, names)

    def _call_pre(self, w: Weights, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return functional_call(self._pre, _strip(w, "pre."), (x, positions))

    def _call_post(self, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        return functional_call(self._post, _strip(w, "post."), (x, o))


def _strip(w: Weights, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def _leaf(t: Tensor, wanted: bool) -> Tensor:
    return t.detach().requires_grad_(wanted)


def _inner(t: Tensor) -> Tensor:
    """The same tensor as an inner node, and in a forward without gradients `detach()`.

    Hooks on modules (FlopCounterMode's) hang on the nodes of their inputs that require a gradient: a view made where
    gradients are off has none, and on a leaf PyTorch refuses them under `torch.autograd.grad`.
    """
    return t.view_as(t)


def _leaves(w: Weights, names: Sequence[str], grads: WeightGradients) -> tuple[dict[str, Tensor], list[str]]:
    wanted = [n for n in names if grads.wants(n)]
    return {n: _leaf(w[n], n in wanted) for n in names}, wanted


def _differentiate(
    outputs: list[Tensor],
    upstream: list[Tensor],
    inputs: list[Tensor],
    leaves: dict[str, Tensor],
    names: list[str],
    grads: WeightGradients,
) -> list[Tensor | None]:
    """Gradients of `inputs` (None where not wanted), after adding those of the weights `names` to `grads`."""
    wanted = [t for t in inputs if t.requires_grad]
    pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    targets = wanted + [leaves[n] for n in names]
    if not pairs or not targets:
        return [None] * len(inputs)
    made = torch.autograd.grad([o for o, _ in pairs], targets, [u for _, u in pairs], allow_unused=True)
    for name, grad in zip(names, made[len(wanted) :], strict=True):
        if grad is not None:
            grads.add(name, grad)
    by_input = iter(made[: len(wanted)])
    return [next(by_input) if t.requires_grad else None for t in inputs]


def _fill(qkv: tuple[Tensor | None, ...], made: Sequence[Tensor]) -> None:
    for name, out, got in zip(("q", "k", "v"), qkv, made, strict=True):
        if out is not None:
            _check_shape(f"pre's {name}", got, out)
            out.copy_(got)


def _check_shape(what: str, got: Tensor, out: Tensor) -> None:
    if got.shape != out.shape:
        raise ValueError(
            f"{what} has shape {tuple(got.shape)}, expected {tuple(out.shape)} for a tile of {out.shape[0]} tokens"
        )
