"""Modules that tensor parallelism has dealt out to processes, PyTorch's way or transformers': in which way each is.

It is told by what they put around a module's call, and by what that has in its closure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.exec.gathering import gathers, hooks_of, others
from pyckpt.swap.around import is_harmless, is_parallel, is_parallel_forward, may_be_called_again
from pyckpt.swap.modules import UnsupportedError
from pyckpt.tokenwise.tensor_parallel import TensorParallel
from pyckpt.vocab_parallel import Words, is_dealt_out

# --- a layer's modules -----------------------------------------------------------------------------------------------

COLUMNS, ROWS, SUMMED = "columns", "rows", "summed"


@dataclasses.dataclass(frozen=True)
class Style:
    """How a module is dealt out, and over which mesh.

    COLUMNS: a linear layer's outputs are, and each process reads all of x. ROWS: its inputs are, and each process gives
    the sum. SUMMED: a norm that all have alike, of which each runs its own heads, and the gradients are summed.
    """

    kind: str
    mesh: Any


@dataclasses.dataclass(frozen=True)
class Dealt:
    """How modules of a layer are dealt out, by path, and to which processes."""

    processes: TensorParallel
    styles: tuple[tuple[str, Style], ...]

    def knows(self, path: str, module: nn.Module) -> bool:
        """The module at this path is dealt out as it was."""
        return any(path == known and style_of(module) == style for known, style in self.styles)


def dealt_out(layer: nn.Module, kinds: Mapping[str, str]) -> Dealt | None:
    """How the layer is dealt out, if it is; kinds: those that a block's modules are of then, by path.

    Raises `UnsupportedError` where they are of others.
    """
    modules = {path: layer.get_submodule(path) for path in kinds}
    if not any(is_parallel(m) for m in modules.values()):
        return None
    found = {path: style for path, m in modules.items() if (style := style_of(m)) is not None}
    odd = next((p for p, kind in kinds.items() if kind != SUMMED and (p not in found or found[p].kind != kind)), None)
    if odd is not None:
        raise UnsupportedError(f"it is dealt out to processes (tensor parallelism), and {odd} not by its {kinds[odd]}")
    meshes = [style.mesh for style in found.values()]
    if meshes[0].ndim != 1 or any(mesh != meshes[0] for mesh in meshes):
        raise UnsupportedError("its modules are dealt out to several groups of processes (tensor parallelism)")
    return Dealt(TensorParallel.of(meshes[0]), tuple(found.items()))


def style_of(module: nn.Module) -> Style | None:
    """How the module is dealt out, where it is in a way that is known, and nothing else is around its call."""
    from torch.distributed.tensor import Replicate, Shard

    said = _said(module)
    if said is None:
        return None
    if said.how == "ReplicatedWithGradAllReduce":
        return Style(SUMMED, said.mesh)
    ends = (Replicate(), Shard(-1))
    kinds = {("ColwiseParallel", *ends): COLUMNS, ("RowwiseParallel", *ends[::-1]): ROWS}
    kind = kinds.get((said.how, said.reads, said.gives))
    return Style(kind, said.mesh) if kind is not None and said.local else None


@dataclasses.dataclass(frozen=True)
class _Said:
    """What was said of a module when it was dealt out: by which class, of PyTorch or transformers, and its options."""

    how: str
    reads: Any = None
    gives: Any = None
    local: bool = True
    mesh: Any = None


def _said(module: nn.Module) -> _Said | None:
    hooks = [h for h in others(hooks_of(module)) if not is_harmless(h)]
    if gathers(module) or getattr(module, "_hf_quantized_needs_local_tp", False):
        return None
    if is_parallel_forward(module):
        return None if hooks else _said_to_transformers(module)
    return None if "forward" in module.__dict__ else _said_to_pytorch(hooks)


def _said_to_pytorch(hooks: list[Any]) -> _Said | None:
    """By the two hooks of `distribute_module`, each of which has a function, with layouts, and the mesh."""
    held = [_closure(h) for h in hooks]
    if len(held) != 2:
        return None
    functions = [next((h[n] for n in ("input_fn", "output_fn") if n in h), None) for h in held]
    named = {getattr(getattr(f, "func", None), "__qualname__", ""): getattr(f, "args", ()) for f in functions}
    for how in ("ColwiseParallel", "RowwiseParallel"):
        reads, gives = (named.get(f"{how}._prepare_{what}_fn") for what in ("input", "output"))
        if reads and gives and len(reads[0]) == len(gives[0]) == 1:
            return _Said(how, reads[0][0], gives[0][0], gives[1] is True, held[0].get("device_mesh"))
    return None


def _said_to_transformers(module: nn.Module) -> _Said | None:
    style = _style(module)
    if style is not None:
        how, mesh = style
        reads, gives = (getattr(how, f"{end}_layouts", None) for end in ("input", "output"))
        by = getattr(how, "shard_dim", None)
        name = type(how).__name__ if by is None else f"{type(how).__name__} {by}"
        return _Said(name, reads, gives, getattr(how, "use_local_output", None) is True, mesh)
    summing = _closure(module.__dict__["forward"]).get("_all_reduce_grad")
    mesh = _closure(summing).get("mesh")
    return None if mesh is None else _Said("ReplicatedWithGradAllReduce", mesh=mesh)


def _closure(function: Any) -> dict[str, Any]:
    """What a function has in its closure, by name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {n: cell.cell_contents for n, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False)}


def own_part(t: Any, processes: TensorParallel) -> Tensor:
    """This process's part of a parameter, differentiable; all of what is not dealt out."""
    if is_dealt_out(t):
        part: Tensor = t.to_local()
        return part
    shared: Tensor = _Shared.apply(t, processes.size) if _sums_itself(t) else t
    return shared


def _sums_itself(t: Any) -> bool:
    """transformers sums its gradient over the processes, from a first call of its norm on."""
    hooks = (t._post_accumulate_grad_hooks or {}).values()
    return any(str(getattr(h, "__module__", "")).startswith("transformers.distributed.") for h in hooks)


class _Shared(torch.autograd.Function):
    """A parameter of which each process has the whole gradient, and is to give its share."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.processes, None


# --- embeddings ------------------------------------------------------------------------------------------------------


def words_of(module: nn.Module) -> Words | None:
    """Which words this process has, of an embedding or output embeddings that are given all tokens.

    None where none are dealt out, or in another way.
    """
    from torch.distributed.tensor import Replicate, Shard

    said = _said(module)
    weight: Any = getattr(module, "weight", None)
    if said is None or not is_dealt_out(weight):
        return None
    if isinstance(module, nn.Embedding):
        looked_up = said.reads == said.gives == Replicate() and said.how == "RowwiseParallel"
        usual = said.local and (looked_up or said.how == "EmbeddingParallel 0")
    else:
        usual = said.how == "ColwiseParallel" and said.reads == Replicate()
    # Where FSDP2 deals the same words out over another dim as well, that is gone when it has gathered the weight.
    alone = weight.device_mesh.ndim == 1
    if not usual or (alone and (weight.placements != (Shard(0),) or weight.device_mesh != said.mesh)):
        return None
    return Words.of(said.mesh, weight.shape[0])


def shards_words(linear: Any) -> bool:
    """It is `is_parallel`, each process has some of its rows, and what it does to its input can be had by itself."""
    alone = may_be_called_again(linear) and not gathers(linear)
    if not (is_parallel(linear) and alone and is_dealt_out(linear.weight)):
        return False
    from torch.distributed.tensor import Shard

    by_rows = Shard(0) in linear.weight.placements and Shard(1) not in linear.weight.placements
    return by_rows and (not is_parallel_forward(linear) or _style(linear) is not None)


def given(linear: Any, x: Tensor) -> Tensor:
    """What its product takes of x, a DTensor as a rule: all tokens, where they are dealt out to processes too."""
    for hook in linear._forward_pre_hooks.values():
        made = hook(linear, (x,))
        x = x if made is None else made[0] if isinstance(made, tuple) else made
    style = _style(linear)
    if style is not None:
        how, mesh = style
        (x, *_), _ = how.transform_inputs_pre_forward(linear, (x,), {}, mesh)
    return x


def _style(linear: nn.Module) -> tuple[Any, Any] | None:
    """transformers' way of dealing it out, and to which processes, which its forward has in its closure."""
    held = _closure(linear.__dict__.get("forward")) if is_parallel_forward(linear) else {}
    if not ({"self", "mesh"} <= held.keys() and hasattr(held["self"], "transform_inputs_pre_forward")):
        return None
    return held["self"], held["mesh"]
