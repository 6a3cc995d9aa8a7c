"""A layer that runs twice computes what it computed before, and keeps what it would keep after one run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase  # whose kernels do not count what they write

from pyckpt.swap.arguments import CallArguments
from pyckpt.swap.around import is_wrapper
from pyckpt.swap.contents import Contents, Held, draw_from, drawing, is_generator, refill, same
from pyckpt.swap.numpy_state import numpy_state, set_numpy_state

_OF_MODULES = frozenset(nn.Module().__dict__) - {"training"}
# Of them what decides about what a call of a module runs.
_CHILDREN = "_modules"
_REGISTERED = (_CHILDREN, *(n for n in _OF_MODULES if "_hooks" in n and ("forward" in n or "backward" in n)))


class FirstRun:
    """The run whose changes stay. `state` and `parameters` are what the modules had before it.

    `given` has heard what it wrote to. `buffers` are then those that it wrote to, `kernels` what attention may use in
    it, `drawing` the generators' states before it.
    """

    def __init__(self, given: CallArguments, state: LayerState) -> None:
        self._given, self.state, self.buffers = given, state, list[Tensor]()
        self.modules = state.modules
        self.parameters = _Parameters(self.modules)
        given.when_backward_begins = self.parameters.check
        own = [*state.generators, *given.contents.generators]
        self.drawing = _Generators(own, _devices([*given.tensors, *self.parameters.tensors]))

    def __enter__(self) -> None:
        self._versions = [(b, b._version) for b in _buffers(self.modules) if not b.is_inference()]
        self.kernels = _attention_kernels()

    def __exit__(self, *error: Any) -> None:
        silent = {id(b) for m in self.modules if isinstance(m, _NormBase) for b in m.buffers()}
        self.buffers = [
            b
            for b, version in self._versions
            if b._version != version or id(b) in silent or self._given.before(b) is not None
        ]
        del self._versions
        self.parameters.ran(self._given.before)


class SecondRun:
    """A run that finds what `first` found, and whose changes are undone: of attributes, of containers in them, of
    buffers, of modules and hooks inside, and of objects that the layer was given.

    All generators give the numbers of the first run again. torch.utils.checkpoint sees to those of devices that its own
    arguments are on, and is given none.
    What `sdpa_kernel` chose around the first run is chosen again. Modules that DeepSpeed or FSDP1 keeps its books in
    are let be.
    """

    def __init__(self, first: FirstRun, given: CallArguments) -> None:
        self._first, self._given = first, given

    def __enter__(self) -> None:
        first, before = self._first, self._given.before
        if not self._given.backward_began:
            first.parameters.check()
        self._present = first.state.present(), self._given.contents.present()
        self._replaced, self._wanting = first.parameters.put(), first.parameters.want()
        self._written = [(t, t.detach().clone(), before(t)) for t in (*first.buffers, *first.parameters.written)]
        self._drawing = first.drawing.now()
        first.drawing.restore()
        first.state.put(before)
        self._given.put_contents()
        write((t, was) for t, _, was in self._written if was is not None)
        self._choice = contextlib.ExitStack()
        if _attention_kernels() != first.kernels:
            self._choice.enter_context(sdpa_kernel(first.kernels, set_priority=True))

    def __exit__(self, *error: Any) -> None:
        self._choice.close()
        self._drawing.restore()
        write((t, present) for t, present, _ in self._written)
        for module, name, parameter in self._replaced:
            module._parameters[name] = parameter
        for t, wanting in self._wanting:
            t.requires_grad_(wanting)
        state, contents = self._present
        refill(contents)
        state.put()
        self._given.backward_began = False
        del self._present, self._written, self._drawing, self._replaced, self._wanting


def write(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Unseen by autograd: what has been saved of these tensors elsewhere is again what it was when this is undone."""
    for t, value in values:
        t.data.copy_(value)


def _buffers(modules: list[nn.Module]) -> list[Tensor]:
    return [b for m in modules for b in m._buffers.values() if b is not None]


class LayerState:
    """What a layer's modules have: attributes, what is in containers that are attributes, and buffers.

    And the modules and the hooks inside. Of modules in such containers too, of which PyTorch does not know, and of
    those that the layer is `given`, but for what it is a part of.
    """

    def __init__(self, module: nn.Module, given: Iterable[nn.Module] = ()) -> None:
        self.modules = list(module.modules())
        for other in given:
            inside = list(other.modules())
            if not any(m is module for m in inside):
                self.modules += inside
        self.modules = list({id(m): m for m in self.modules}.values())
        self._of, self._contents = list[_Of](), list[Contents]()
        seen, look = set(map(id, self.modules)), self.modules
        self.generators: list[Any] = []
        self._tensors: list[Tensor] = []
        while look:
            self._of += [(m, _attributes(m), dict(m._buffers)) for m in look if not _has_books(m)]
            contents = Contents(v for _, had, _ in self._of[-len(look) :] for v in had.values() if _holds(v))
            self._contents.append(contents)
            self.generators += contents.generators
            self._tensors += contents.tensors
            look = [m for held in contents.modules for m in held.modules() if id(m) not in seen]
            look = list({id(m): m for m in look}.values())
            seen.update(map(id, look))
            self.modules += look
        self._registered = _Registered(_registered_in(module, [m for m, _, _ in self._of]))

    @property
    def watched(self) -> list[Tensor]:
        """Tensors of the layer whose values a later run has to find again, if the first one writes to them."""
        plain = [t for t in self._tensors if not t.requires_grad]
        weights = [p for m, _, _ in self._of for p in m._parameters.values() if p is not None and _is_plain(p)]
        return [*_buffers(self.modules), *plain, *weights]

    def present(self) -> _Present:
        """The same of the present."""
        return _Present(
            [(m, _attributes(m), dict(m._buffers)) for m, _, _ in self._of],
            [held for contents in self._contents for held in contents.present()],
            self._registered.now(),
        )

    def put(self, before: Callable[[Tensor], Tensor | None]) -> None:
        """All as it was; `before`: what was in a tensor that was written to since."""

        def instead(t: Tensor) -> Tensor:
            was = None if t.requires_grad else before(t)
            return t if was is None else was.clone()

        for contents in self._contents:
            contents.put(instead)
        self._registered.put()
        _put([(m, _with(attributes, instead), buffers) for m, attributes, buffers in self._of])


def _registered_in(layer: nn.Module, modules: list[nn.Module]) -> list[dict[Any, Any]]:
    """What PyTorch has modules and hooks in. Hooks on the layer itself run around its runs, and not in them."""
    inside = [m.__dict__ for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    return [had[name] for had in inside for name in _REGISTERED if name == _CHILDREN or had is not layer.__dict__]


class _Registered:
    """What is in such dicts now: of seven to a module hardly one has anything in it."""

    def __init__(self, dicts: list[dict[Any, Any]]) -> None:
        self._dicts = dicts
        self._held = [(had, dict(had)) for had in dicts if had]
        self._empty = [had for had in dicts if not had]

    def now(self) -> _Registered:
        return _Registered(self._dicts)

    def put(self) -> None:
        refill(self._held)
        if any(self._empty):
            for had in self._empty:
                had.clear()


_Of = tuple[nn.Module, dict[str, Any], dict[str, Any]]
"""A module, its attributes and its buffers."""


@dataclasses.dataclass
class _Present:
    """What modules have, and what is in containers, to be put back."""

    of: list[_Of]
    contents: Held
    registered: _Registered

    def put(self) -> None:
        refill(self.contents)
        self.registered.put()
        _put(self.of)


def _with(attributes: dict[str, Any], instead: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {n: instead(v) if type(v) is Tensor else v for n, v in attributes.items()}


def _put(state: list[_Of]) -> None:
    for module, attributes, buffers in state:
        if buffers:
            module._buffers.update(buffers)
        present = _attributes(module)
        if same(present, attributes):
            continue
        if "_is_fsdp_managed_module" in attributes:
            # FSDP1 makes views of its own weights, and takes them away, as they are to be read.
            views = {n for had in (present, attributes) for n, v in had.items() if _is_view(v)}
            present, attributes = ({n: had[n] for n in had.keys() - views} for had in (present, attributes))
        for name in present.keys() - attributes.keys():
            del module.__dict__[name]
        module.__dict__.update(attributes)


class _Parameters:
    """The parameters of a layer's modules, and how often each was written to."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._of = [
            (m, name, p) for m in modules if not _has_books(m) for name, p in m._parameters.items() if p is not None
        ]
        self._wanting = [(p, p.requires_grad) for _, _, p in self._of if p.is_leaf]
        self.written: list[Tensor] = []
        self._note()

    @property
    def tensors(self) -> list[Tensor]:
        return [p for _, _, p in self._of]

    def _note(self) -> None:
        self._versions = [(p, p._version) for _, _, p in self._of if not p.is_inference()]

    def ran(self, before: Callable[[Tensor], Tensor | None]) -> None:
        """The first run is over; what it wrote to itself (`max_norm` of an embedding, a codebook) is put right."""
        self.written = list({id(p): p for _, _, p in self._of if before(p) is not None}.values())
        self._note()

    def check(self) -> None:
        """Raise RuntimeError where one was written to since."""
        if any(p._version != version for p, version in self._versions):
            raise RuntimeError(
                "a weight of a layer that runs again in the backward has been modified by an inplace operation since "
                "the layer ran, by a step of an optimizer say: its gradients would be those of other weights"
            )

    def put(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """All where they were, and what was in their places: `torch.func.functional_call` has others for a call.

        What is sharded is the same object with the same or other memory, or other objects with the same memory.
        """
        now = [(module, name, module._parameters.get(name), then) for module, name, then in self._of]
        others = [(m, name, p, then) for m, name, p, then in now if p is not None and _differ(p, then)]
        for module, name, _, then in others:
            module._parameters[name] = then
        return [(module, name, p) for module, name, p, _ in others]

    def want(self) -> list[tuple[Tensor, bool]]:
        """Gradients where they were wanted, so that the same tensors are saved; which have wanted them otherwise since.

        Whether a parameter is given its gradient is decided when it comes.
        """
        others: list[tuple[Tensor, bool]] = [
            (p, p.requires_grad) for p, then in self._wanting if p.requires_grad != then
        ]
        for p, now in others:
            p.requires_grad_(not now)
        return others


def _has_books(module: nn.Module) -> bool:
    """DeepSpeed's or FSDP1's own are in its attributes."""
    if "deepspeed" in sys.modules and any(n.startswith("ds_") for n in module.__dict__):
        return True
    return is_wrapper(module)


def _is_view(value: Any) -> bool:
    return isinstance(value, Tensor) and value._is_view()


def _differ(a: Tensor, b: Tensor) -> bool:
    """They are plain tensors in two places, of which the second is there."""
    if a is b or not (_is_plain(a) and _is_plain(b)) or b.untyped_storage().nbytes() == 0:
        return False
    return a.data_ptr() != b.data_ptr()


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided


def _attention_kernels() -> list[SDPBackend]:
    """What `scaled_dot_product_attention` may use at present, the first choice first."""
    return _cur_sdpa_kernel_backends(with_priority=True)


class _Generators:
    """The states of Python's, NumPy's and PyTorch's global generators, some devices' too, and of some of one's own."""

    def __init__(self, own: list[Any], devices: list[torch.device]) -> None:
        self._python, self._numpy = random.getstate(), numpy_state()
        self._torch = [(d, _state_of(d)) for d in (torch.device("cpu"), *devices)]
        self._own = [(g, drawing(g)) for g in own]

    def now(self) -> _Generators:
        """The same ones, at present."""
        return _Generators([g for g, _ in self._own], [d for d, _ in self._torch[1:]])

    def restore(self) -> None:
        random.setstate(self._python)
        for device, state in self._torch:
            _set_state_of(device, state)
        set_numpy_state(self._numpy)
        for generator, state in self._own:
            draw_from(generator, state)


def _devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    """On which a layer of these may draw, but for the CPU. On a GPU that is not started there are fakes alone."""
    found = {t.device: None for t in tensors if t.device.type not in ("cpu", "meta")}
    return [d for d in found if d.type != "cuda" or torch.cuda.is_initialized()]


def _state_of(device: torch.device) -> Tensor:
    """Of PyTorch's generator of the device."""
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    return module.get_rng_state(*_which(device))


def _set_state_of(device: torch.device, state: Tensor) -> None:
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    module.set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Of the devices of its kind, where there are several."""
    return () if device.type in ("cpu", "mps") else (device,)


def _holds(value: Any) -> bool:
    return _may_hold(type(value))  # type: ignore[arg-type]  # mypy takes a value's __hash__ for the class's


@functools.lru_cache(maxsize=4096)
def _may_hold(kind: type[Any]) -> bool:
    """It is of a tensor, a container or a generator: most attributes are none, and need no second look."""
    return issubclass(kind, (Tensor, dict, list, tuple, set, frozenset, deque)) or is_generator(kind)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in module.__dict__.items() if n not in _OF_MODULES}
