"""How PyTorch's tensor parallelism lays out what goes into a module and what comes out, told by the hooks it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from pyckpt.exec.gathering import hooks_of


@dataclasses.dataclass(frozen=True)
class Layouts:
    """What was said of a module when it was dealt out: by a style of this name, and its options.

    reads, gives: the placements of input and output. local: the output is a process's part by itself, no DTensor.
    """

    style: str
    reads: Any = None
    gives: Any = None
    local: bool = True
    mesh: Any = None

    @property
    def by_columns(self) -> bool:
        """A linear layer's outputs are dealt out, and each process reads all of x, as is the default."""
        return self._are("ColwiseParallel", *_ends())

    @property
    def by_rows(self) -> bool:
        """Its inputs are, and each process gives the sum."""
        return self._are("RowwiseParallel", *_ends()[::-1])

    def _are(self, style: str, reads: Any, gives: Any) -> bool:
        return self.local and (self.style, self.reads, self.gives) == (style, reads, gives)


def _ends() -> tuple[Any, Any]:
    from torch.distributed.tensor import Replicate, Shard

    return Replicate(), Shard(-1)


def deals_out(hook: Any) -> bool:
    """It brings together the inputs or outputs of a module that PyTorch's `parallelize_module` has dealt out."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor.")


def layouts_of(hooks: Sequence[Any]) -> Layouts | None:
    """By a module's hooks: two of `distribute_module`, each of which has a function, with layouts, and the mesh.

    None where they are others, or say that their module is dealt out in another style than by columns or rows.
    """
    held = [closure(h) for h in hooks]
    if len(held) != 2:
        return None
    functions = [next((h[n] for n in ("input_fn", "output_fn") if n in h), None) for h in held]
    named = {getattr(getattr(f, "func", None), "__qualname__", ""): getattr(f, "args", ()) for f in functions}
    for style in ("ColwiseParallel", "RowwiseParallel"):
        reads, gives = (named.get(f"{style}._prepare_{what}_fn") for what in ("input", "output"))
        if reads and gives and len(reads[0]) == len(gives[0]) == 1:
            return Layouts(style, reads[0][0], gives[0][0], gives[1] is True, held[0].get("device_mesh"))
    return None


def closure(function: Any) -> dict[str, Any]:
    """What a function has in its closure, by name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {n: cell.cell_contents for n, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False)}


def check_whole_tokens(name: str, module: nn.Module) -> None:
    """Raise ValueError where an embedding, a norm or a linear layer that is read, not called, was to deal tokens out.

    What such a module's hooks would do about it nobody does: all processes are taken to have all tokens.
    """
    hooks = [h for h in hooks_of(module) if deals_out(h)]
    if not hooks:
        return
    said = layouts_of(hooks)
    usual = said is not None and (said.by_columns or said.by_rows)
    looks_up = isinstance(module, nn.Embedding) and said is not None and said.local and said.gives == _ends()[0]
    if not (usual or looks_up):
        raise ValueError(
            f"{name} was dealt out by parallelize_module with layouts of its own, {said or 'SequenceParallel say'}: "
            "blocks of pyckpt take and give all tokens in each process. Leave out input_layouts and output_layouts of "
            "the linear layers, SequenceParallel and PrepareModuleInput; an embedding gives Replicate()"
        )
