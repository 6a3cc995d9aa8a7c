"""Replacing the forward of one module, and undoing it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from pyckpt.block import CheckpointedBlock
from pyckpt.stream import Parts


class Replaced:
    """A forward put in the place of a module's own. It is held by the module itself, as its attribute `forward`.

    The module's class, its parameters and its hooks stay. A forward that had been put there before is the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = (module,)
        self._before = module.__dict__.get("forward")
        # Of the class: a forward that was put there before need not have names. The first is self.
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        self._warned: set[str] = set()

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
        return inspect.signature(self._original)

    @property
    def _original(self) -> Any:
        # Looked up late: FSDP2 changes a module's class.
        return self._before or type(self.module).forward.__get__(self.module)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computed before the swap."""
        return self._original(*args, **kwargs)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def asks(self, given: dict[str, Any], name: str) -> bool:
        """Whether an output is asked for: by the call's argument of this name or, without it, by the model's config."""
        asked = given.get(name)
        return bool(getattr(self.module.config, name, False) if asked is None else asked)

    def warn(self, text: str) -> None:
        """Warn once about each matter."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"pyckpt.swap: {text}", stacklevel=4)

    def install(self) -> None:
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        if self._before is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._before

    def in_place(self) -> bool:
        return self.module.__dict__.get("forward") is self


def replaced_in(model: nn.Module) -> Iterator[tuple[str, Replaced]]:
    """What `swap` put in the place of forwards, by the modules' names, also where something else calls it since."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        while forward is not None and not isinstance(forward, Replaced):
            forward = getattr(forward, "__wrapped__", None)
        if forward is not None:
            yield name, forward
