"""Tokenwise parts from any two modules, differentiated by autograd one tile at a time.

The oracle of the hand-written parts, and what runs an architecture that they do not know.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyckpt.casting import autocasts
from pyckpt.tokenwise.gradients import WeightGradients, storage_of
from pyckpt.tokenwise.interface import Tile, Weights
from pyckpt.tokenwise.workspace import Workspace

_IN_PLACE = threading.RLock()


def in_place() -> AbstractContextManager[Any]:
    """Held while a call has tensors of its own in the place of modules' parameters, and where parameters are read.

    Another thread would take those for the parameters, and put them back as such after a call of its own. And while
    generators, which all threads share, are seeded for a tile.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _IN_PLACE


class LostGradientError(RuntimeError):
    """`pre` or `post` depends on a tensor with a gradient that is none of its inputs and of the block's parameters.

    `what`: the first words of its message, up to "requires a gradient".
    """

    def __init__(self, what: str, rest: str) -> None:
        super().__init__(what, rest)
        self.what = what

    def __str__(self) -> str:
        return "".join(self.args)


class _Recorded(NamedTuple):
    """What `pre` made of x and of leaves in the place of weights; `names`: see `GenericTokenwise._leaves`."""

    x: Tensor
    made: tuple[Tensor, Tensor, Tensor]
    leaves: dict[str, Tensor]
    names: dict[str, str]


class GenericTokenwise:
    """`Tokenwise` of modules pre(x, positions) -> (q, k, v) and post(x, o) -> y, all on (t, width) tensors.

    Weight names are "pre.<name>" and "post.<name>". No parameter's own gradient hooks run inside the loop over
    tiles: the modules are called on detached stand-ins, and the sums are returned once.

    In a forward nothing of the block requires a gradient. What requires one of what a part makes, where the caller has
    gradients enabled, then comes from elsewhere (an attribute, a closure), and would get none: `LostGradientError`.
    """

    makes_delta = False
    made_once: frozenset[str] = frozenset()
    by_autograd = True
    _advice = "for that part of the model use a plain PyTorch block"
    _again: _Recorded | None = None
    _checks = False
    _shared: Mapping[str, str] = MappingProxyType({})

    def __init__(self, pre: nn.Module, post: nn.Module, precision: AbstractContextManager[Any]) -> None:
        """precision: the autocast that the model runs under; the executor turns it off around the modules."""
        self._pre, self._post, self._precision = pre, post, precision
        self._checks = torch.is_grad_enabled()
        with in_place():
            self.pre_names = tuple(f"pre.{n}" for n, _ in pre.named_parameters())
            self.post_names = tuple(f"post.{n}" for n, _ in post.named_parameters())
            self._shared = _shared(pre, post)
        self._pre_twice, self._post_twice = _in_two_places(pre), _in_two_places(post)

    def cast(self, w: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
        found = {n: t.detach() if t.requires_grad else t for n, t in w.items()}
        # A block names each of its parameters once.
        self._shared = {n: first for n, first in self._shared.items() if n not in w}
        return found | {n: found[first] for n, first in self._shared.items()}

    def pre(self, w: Weights, tile: Tile, q: Tensor | None, k: Tensor | None, v: Tensor | None, ws: Workspace) -> None:
        with torch.set_grad_enabled(self._checks), self._unwritten("pre", tile.x):
            made = self._call_pre(w, tile.x.detach(), tile.positions.tensor)
        _check_made("pre", "three tensors, q, k and v", made if isinstance(made, (tuple, list)) else [made], 3)
        self._check_gradients("pre", made)
        _fill((q, k, v), made)

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
        with torch.set_grad_enabled(self._checks), self._unwritten("post", tile.x, o):
            got = self._call_post(w, tile.x.detach(), o.detach())
        _check_made("post", "one tensor, y", [got], 1)
        self._check_gradients("post", [got])
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
        leaves, names = self._leaves(w, self.post_names, grads)
        x, o = _leaf(tile.x, dx is not None), _leaf(o, do is not None)
        with torch.enable_grad():
            y = self._call_post_again({**w, **leaves}, _inner(x), _inner(o))
        dx_made, do_made = self._differentiate([y], [dy], [x, o], leaves, names, grads)
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
        (share,) = self._differentiate(list(again.made), [dq, dk, dv], [again.x], again.leaves, again.names, grads)
        if dx is not None and share is not None:
            dx += share

    def _recorded_pre(self, w: Weights, tile: Tile, need_dx: bool, grads: WeightGradients) -> _Recorded:
        leaves, names = self._leaves(w, self.pre_names, grads)
        x = _leaf(tile.x, need_dx)
        with torch.enable_grad():
            made = self._call_pre({**w, **leaves}, _inner(x), tile.positions.tensor)
        return _Recorded(x, made, leaves, names)

    def _leaves(
        self, w: Weights, names: Sequence[str], grads: WeightGradients
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Leaves in the place of these weights; of those that want a gradient the names under which it is summed."""
        sums = {n: self._shared.get(n, n) for n in names}
        wanted = {n: of for n, of in sums.items() if grads.wants(of)}
        return {n: _leaf(w[n], n in wanted) for n in names}, wanted

    def _differentiate(
        self,
        outputs: list[Tensor],
        upstream: list[Tensor],
        inputs: list[Tensor],
        leaves: dict[str, Tensor],
        names: dict[str, str],
        grads: WeightGradients,
    ) -> list[Tensor | None]:
        """Gradients of `inputs` (None where not wanted), after adding those of the weights to `grads`."""
        wanted = [t for t in inputs if t.requires_grad]
        pairs = [(o, u.to(o.dtype)) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
        targets = wanted + [leaves[n] for n in names]
        if not pairs or not targets:
            for name in names.values():
                grads.add_nothing(name)
            return [None] * len(inputs)
        found = torch.autograd.grad([o for o, _ in pairs], targets, [u for _, u in pairs], allow_unused=True)
        made: list[Tensor | None] = [*found]
        # Autograd may give one tensor for several weights (of W + D), an expanded one, or what came from upstream.
        # The last first, so that a copy of one stands beside what is left of them alone.
        shared, users = set(self._shared.values()), _users((*made, *upstream)) if grads.single else {}
        for name in reversed(names.values()):
            grad = made.pop()
            if grad is None:
                grads.add_nothing(name)
            else:
                alone = grad.is_contiguous() and users.get(storage_of(grad)) == 1
                grads.add(name, grad, owned=alone and name not in shared)
        by_input = iter(made)
        return [next(by_input) if t.requires_grad else None for t in inputs]

    @contextlib.contextmanager
    def _unwritten(self, part: str, *tensors: Tensor) -> Iterator[None]:
        """Raise RuntimeError where what runs inside wrote to these, which a backward reads again."""
        before = [(t, t._version) for t in tensors if self._checks and not t.is_inference()]
        yield
        if any(t._version != version for t, version in before):
            raise RuntimeError(
                f"{part} writes in place to what it is given (x, or attention's output), and the backward reads that "
                "again: use x = x + ..., not x += ..., or write to a copy"
            )

    def _check_gradients(self, part: str, made: Sequence[Tensor]) -> None:
        found = next((t for t in made if t.requires_grad), None)
        if found is None:
            return
        module = getattr(self, f"_{part}", None)
        name = None if module is None else _attribute(module, part)
        raise LostGradientError(
            f"{name or f'a tensor {_shape_of(found)}'} that {part} reads requires a gradient",
            f", which would be lost: it is neither an input of {part} nor a parameter of the block. Make it a "
            "parameter, or what holds it a submodule (a tensor made for each call can stand in for a parameter: "
            "torch.func.functional_call(block, {name: tensor}, (x,))); detach() it, if it is to have no gradient; or "
            f"{self._advice}",
        )

    def _call_pre(self, w: Weights, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self._precision, in_place(), _put_back(self._pre_twice):
            return functional_call(self._pre, strip(w, "pre."), (x, positions))

    def _call_post(self, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        with self._precision, in_place(), _put_back(self._post_twice):
            return functional_call(self._post, strip(w, "post."), (x, o))

    def _call_post_again(self, w: Weights, x: Tensor, o: Tensor) -> Tensor:
        """For its gradients; nobody reads the output."""
        return self._call_post(w, x, o)


def _in_two_places(part: nn.Module) -> list[nn.Module]:
    """Modules with parameters that are children of several, or of one by two names."""
    places = collections.Counter(m for _, m in part.named_modules(remove_duplicate=False))
    return [m for m, count in places.items() if count > 1 and m._parameters]


@contextlib.contextmanager
def _put_back(modules: list[nn.Module]) -> Iterator[None]:
    """Into modules in two places, which `functional_call` leaves with what it had put in by their first name."""
    had = [(m, dict(m._parameters)) for m in modules]
    try:
        yield
    finally:
        for m, parameters in had:
            m._parameters.update(parameters)


def precision(device: torch.device, x_dtype: torch.dtype, dtype: torch.dtype) -> torch.autocast:
    """The autocast under which products of x are in `dtype`: that which is on now, if it concerns x."""
    on = dtype != x_dtype or autocasts(device.type, x_dtype)
    return torch.autocast(device.type, dtype, on, cache_enabled=False)


def strip(w: Weights, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def _leaf(t: Tensor, wanted: bool) -> Tensor:
    # What needs no leaf goes in as it is: quantized weights of a class of their own have more about them than values.
    return t.detach().requires_grad_(wanted) if wanted or t.requires_grad else t


def _inner(t: Tensor) -> Tensor:
    """The same tensor as an inner node, and in a forward without gradients `detach()`.

    Hooks on modules (FlopCounterMode's) hang on the nodes of their inputs that require a gradient: a view made where
    gradients are off has none, and on a leaf PyTorch refuses them under `torch.autograd.grad`.
    """
    return t.view_as(t)


def _shared(pre: nn.Module, post: nn.Module) -> dict[str, str]:
    """Names of parameters of `post` that are also in `pre`, with their names there."""
    first = list(pre.named_parameters())
    found = ((f"post.{n}", f"pre.{m}") for n, p in post.named_parameters() for m, q in first if p is q)
    return dict(found)


def _users(tensors: Sequence[Tensor | None]) -> Mapping[int, int]:
    """How many of them lie in each memory."""
    return collections.Counter(storage_of(t) for t in tensors if t is not None)


def _attribute(module: nn.Module, part: str) -> str | None:
    """The name of an attribute inside the module that is a tensor with a gradient and no parameter."""
    for path, inner in module.named_modules(prefix=part):
        for name, value in inner.__dict__.items():
            if isinstance(value, Tensor) and value.requires_grad:
                return f"{path}.{name}"
    return None


def _shape_of(made: Tensor) -> str:
    """Of a leaf that this tensor depends on."""
    todo, seen = [made.grad_fn], set()
    while todo:
        fn = todo.pop()
        if fn is None or fn in seen:
            continue
        seen.add(fn)
        if isinstance(leaf := getattr(fn, "variable", None), Tensor):
            return f"of shape {tuple(leaf.shape)}"
        todo += [f for f, _ in fn.next_functions]
    return "in a graph"


def _fill(qkv: tuple[Tensor | None, ...], made: Sequence[Tensor]) -> None:
    for name, out, got in zip(("q", "k", "v"), qkv, made, strict=True):
        if out is not None:
            _check_shape(f"pre's {name}", got, out)
            out.copy_(got)


def _check_made(part: str, expected: str, made: Sequence[Any], count: int) -> None:
    if len(made) != count or not all(isinstance(t, Tensor) for t in made):
        given = ", ".join(type(t).__name__ for t in made)
        raise TypeError(f"{part} gave {given or 'nothing'}, expected {expected}")


def _check_shape(what: str, got: Tensor, out: Tensor) -> None:
    if got.is_meta and not out.is_meta:  # to copy it would do nothing, and say nothing
        raise RuntimeError(f"{what} is on the meta device: it depends on a parameter that the block does not know")
    if got.shape != out.shape:
        raise ValueError(
            f"{what} has shape {tuple(got.shape)}, expected {tuple(out.shape)} for a tile of {out.shape[0]} tokens"
        )
