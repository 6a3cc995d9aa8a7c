"""What a layer that runs twice is given: the second time too, where the first run, or anything since, writes to it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyckpt.swap.contents import Contents
from pyckpt.tokenwise.gradients import storage_of


class CallArguments:
    """The arguments of a layer's call, for a run now and others later.

    Lists and dicts are then new ones with what was in them before the first run, which may have changed them; other
    containers, and objects of one's own, hold it while a later run lasts. Of a tensor that the first run writes to
    (`h += ...` of what it was given) a copy is made just before, and of those to `watch`, the layer's, too: `written`
    has to hear of every op of that run.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._first: tuple[tuple[Any, ...], dict[str, Any]] | None = args, kwargs
        self._leaves, self._spec = tree_flatten((args, kwargs), is_leaf=_is_leaf)
        self.contents = Contents((v for v in self._leaves if not isinstance(v, Tensor)), objects=True)
        given = [*(v for v in self._leaves if isinstance(v, Tensor)), *self.contents.tensors]
        # What becomes of a tensor that is written to may require a gradient though it did not.
        self._tensors = {id(t): (t, t.requires_grad) for t in given}
        self._by_storage: dict[int, list[Tensor]] = {}
        self.watch(t for t, _ in self._tensors.values())
        self._copies: dict[int, Tensor] = {}
        self.backward_began = False
        self.when_backward_begins: Callable[[], None] | None = None
        self._versions = [(t, t._version) for t, _ in self._tensors.values() if not t.is_inference()]

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Those of which a copy is made before they are written to."""
        for t in tensors:
            shared = self._by_storage.setdefault(storage_of(t), [])
            if not any(t is other for other in shared):
                shared.append(t)

    @property
    def tensors(self) -> list[Tensor]:
        """All that are given."""
        return [t for t, _ in self._tensors.values()]

    @property
    def wants_gradients(self) -> bool:
        """Something that is given requires one."""
        return any(requires for _, requires in self._tensors.values())

    @property
    def is_read_once(self) -> bool:
        """An iterator is given: what it gave the first time it would not give again."""
        return any(isinstance(leaf, Iterator) for leaf in (*self._leaves, *self.contents.others))

    def made(self, output: Any) -> None:
        """The first run has made this. When a backward comes to it, what is to be as it was is looked at.

        Later in the same backward a weight may have got its gradient, and have been changed by a step of an optimizer
        in a hook: nothing that depends on it is still to come.
        """
        this = weakref.ref(self)  # an output that somebody holds after its backward holds no arguments
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                t.register_hook(functools.partial(_begin, this))

    def written(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op of the first run is about to run."""
        for t in tensors_written(op, args, kwargs):
            self._copy(self._by_storage.get(storage_of(t), ()))

    def _copy(self, tensors: Sequence[Tensor]) -> None:
        if len(tensors) > 1 and any(id(t) in self._tensors for t in tensors):
            raise RuntimeError(
                "a layer that runs again in the backward writes in place to an argument whose memory is another one's "
                "too; hand it a copy of one of them"
            )
        for t in tensors:
            if id(t) not in self._copies:
                self._copies[id(t)] = t.detach().clone()

    def ran(self) -> None:
        """The first run is over. Raises RuntimeError where it wrote to something unheard."""
        if self._first is not None:
            self._versions = [(t, version) for t, version in self._versions if id(t) not in self._copies]
            self._check("that is no op of PyTorch's; let it return what it makes")
            self._first = None

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For a run. Raises RuntimeError where something was written to since the first."""
        if self._first is not None:
            return self._first
        self._check("since it ran; write to a copy")
        leaves = [self._again(leaf) if id(leaf) in self._copies else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def before(self, other: Tensor) -> Tensor | None:
        """What was in a tensor of the layer before the first run wrote to it; None where it did not, or unheard."""
        return self._copies.get(id(other))

    def put_contents(self) -> None:
        """Containers and objects hold what they did before the first run."""
        self.contents.put(lambda t: self._again(t) if id(t) in self._copies else t)

    def _check(self, how: str) -> None:
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError(
                "an argument of a layer that runs again in the backward, with other values then, has been modified by "
                f"an inplace operation {how}"
            )

    def _again(self, t: Tensor) -> Tensor:
        """A new tensor as t was, to be written to; it is no leaf, which may not be."""
        copy = self._copies[id(t)]
        return copy.requires_grad_(True).clone() if self._tensors[id(t)][1] else copy.clone()


def _begin(arguments: weakref.ref[CallArguments], grad: Tensor) -> None:
    """A backward has come to what a layer made of these."""
    given = arguments()
    if given is None:
        return
    if given.when_backward_begins is not None:
        given.when_backward_begins()
    given.backward_began = True


def _is_leaf(value: Any) -> bool:
    """Not a list, dict or tuple: what else holds tensors is not made anew (see `Contents`)."""
    return type(value) not in (list, dict) and not isinstance(value, tuple)


def tensors_written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Those that an op of these arguments writes to."""
    for place, name in _places_written(op):
        for t in tree_leaves(kwargs[name] if name in kwargs else args[place : place + 1]):
            if isinstance(t, Tensor):
                yield t


def writes(op: Any) -> bool:
    """It writes to some of its arguments."""
    return bool(_places_written(op))


@functools.cache
def _places_written(op: Any) -> tuple[tuple[int, str], ...]:
    """(place, name) of the arguments that the op writes to."""
    schema = getattr(op, "_schema", None)  # higher order ops have none
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    )
