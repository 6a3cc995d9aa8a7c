"""Replacing the forward of one module, and undoing it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from pyckpt.block import CheckpointedBlock
from pyckpt.stream import FINDERS, Parts
from pyckpt.swap.around import in_a_checkpoint
from pyckpt.swap.modules import is_patched
from pyckpt.swap.shadow import arguments_of, takes_more, unsharded_class

_PLACE = "_pyckpt_forward"  # the attribute by which `unbound` finds a module's
_REPLICATE = "_replicate_for_data_parallel"  # the method by which torch.nn.DataParallel copies a module


@functools.cache
def unbound(kind: type) -> Callable[..., Any]:
    """The forward in the place of this class's, as a function of the module and its arguments.

    It looks in the module which is its own: in a copy of the module it is the copy's.
    """

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(module, _PLACE)(*args, **kwargs)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    forward.unbound = forward  # type: ignore[attr-defined]
    return forward


def _is_unbound(forward: Any) -> bool:
    """It is of `unbound`, or a method made of one. What wraps one has its attributes too."""
    function = getattr(forward, "__func__", forward)
    return getattr(function, "unbound", None) is function


def _no_replicas() -> None:
    """In the place of a module's `_replicate_for_data_parallel`: a replica would call the forward of the module."""
    raise RuntimeError(
        "a swapped model does not run under torch.nn.DataParallel, whose replicas would use the first one's weights. "
        "Start one process for each GPU (torchrun, accelerate launch), which is faster too, or show the process one "
        "GPU (CUDA_VISIBLE_DEVICES=0): Trainer takes DataParallel where it sees more"
    )


class Replaced:
    """A forward put in the place of a module's own. It is held by the module itself, as its attribute `forward`.

    The module's class, its parameters and its hooks stay. A forward that had been put there before is the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = (module,)
        self._before = module.__dict__.get("forward")
        # Of the class: a forward that was put there before need not have names.
        arguments = arguments_of(module)
        self.names = tuple(p.name for p in arguments)
        self.by_place = tuple(p.name for p in arguments if p.kind is not inspect.Parameter.KEYWORD_ONLY)
        # A further keyword may have the name of one of these.
        self._by_place_alone = {p.name for p in arguments if p.kind is inspect.Parameter.POSITIONAL_ONLY}
        self._takes_more = self._before is not None or takes_more(module)
        self._was_patched = is_patched(module)
        self._warned: set[str] = set()
        self.runs_once = False  # a first run has shown that the forward cannot run again

    @property
    def module(self) -> nn.Module:
        return self._module[0]

    @property
    def ways(self) -> tuple[CheckpointedBlock, ...]:
        """The blocks of which one runs in a call of the module; none where it runs none of its own."""
        return ()

    @property
    def keeps_inputs_alone(self) -> bool:
        """Blocks run together, and keep nothing but some inputs."""
        return False

    def streamed_parts(self) -> Parts | None:
        """What a streamed run of the module has in it; None where it is none, or not one run."""
        return None

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original: Trainer and generate() look at it."""
        return inspect.signature(self._before or MethodType(type(self.module).forward, self.module))

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a bound method has it: tools that wrap a forward make methods of that, which copies of a model copy."""
        return unbound(type(self.module))  # type: ignore[arg-type]  # mypy takes a Module's __hash__ for the class's

    @property
    def __code__(self) -> Any:
        """That of the class's forward, as a bound method has it: torch.export looks at it."""
        return type(self.module).forward.__code__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computed before the swap."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        # Looked up late: FSDP2 changes a module's class. Called as a function: PyTorch 2.11 compiles no __get__.
        return type(self.module).forward(self.module, *args, **kwargs)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name. Raises TypeError, as the original would, where a place has none."""
        named = dict(zip(self.by_place, args, strict=False))
        twice = next((n for n in named if n in kwargs and n not in self._by_place_alone), None)
        if twice is not None:
            raise TypeError(f"{self._called} got multiple values for argument {twice!r}")
        if len(args) > len(self.by_place) and not self._takes_more:
            most = len(self.by_place)
            raise TypeError(f"{self._called} takes {most} positional arguments at most, but {len(args)} were given")
        return named | kwargs

    @property
    def _called(self) -> str:
        return f"{unsharded_class(self.module).__name__}.forward()"

    @property
    def patched(self) -> str | None:
        """That the forward of the module's class is another one since."""
        return None if self._was_patched else is_patched(self.module)

    def asks(self, given: dict[str, Any], name: str) -> bool:
        """Whether an output is asked for: by the call's argument of this name or, without it, by the model's config."""
        asked = given.get(name)
        return bool(getattr(self.module.config, name, False) if asked is None else asked)

    def warn(self, text: str) -> None:
        """Warn once about each matter."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"pyckpt.swap: {text}", stacklevel=4)

    def warn_of_a_checkpoint(self) -> None:
        """Where all that a layer does in a backward is done once more around it."""
        if in_a_checkpoint():
            self.warn(
                f"a swapped {unsharded_class(self.module).__name__} is in a torch.utils.checkpoint (PyTorch's "
                "checkpoint_wrapper, FSDP's activation_checkpointing): it recomputes already, and runs once more than "
                "it has to. Take the checkpoint away"
            )

    def install(self) -> None:
        self.module.__dict__.update({"forward": self, _PLACE: self, _REPLICATE: _no_replicas})

    def remove(self) -> None:
        attributes = self.module.__dict__
        for name in ("forward", _PLACE, _REPLICATE):
            del attributes[name]
        if self._before is not None:
            attributes["forward"] = self._before

    @property
    def installed(self) -> bool:
        """It has not been removed, whatever else calls it since."""
        return _PLACE in self.module.__dict__

    def in_place(self) -> bool:
        forward = self.module.__dict__.get("forward")
        return forward is self or _is_unbound(forward)


def replaced_in(model: nn.Module) -> Iterator[tuple[str, Replaced]]:
    """What `swap` put in the place of forwards, by the modules' names, also where something else calls it since."""
    for name, module in model.named_modules():
        found = module.__dict__.get(_PLACE)
        if isinstance(found, Replaced):
            yield name, found


def _parts_in(model: nn.Module) -> Parts | None:
    """What is streamed of a swapped model: of its loss, which comes before its layers, or of those alone."""
    found = (replaced.streamed_parts() for _, replaced in replaced_in(model))
    return next((parts for parts in found if parts is not None), None)


FINDERS.append(_parts_in)
