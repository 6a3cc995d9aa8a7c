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
from pyckpt.exec.layouts import Layouts, closure, layouts_of
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
    if odd is not None and not may_be_called_again(modules[odd]):
        raise UnsupportedError(f"{odd} has forward hooks, which a swapped layer would not run")
    if odd is not None:
        raise UnsupportedError(f"it is dealt out to processes (tensor parallelism), and {odd} not by its {kinds[odd]}")
    meshes = [style.mesh for style in found.values()]
    if meshes[0].ndim != 1 or any(mesh != meshes[0] for mesh in meshes):
        raise UnsupportedError("its modules are dealt out to several groups of processes (tensor parallelism)")
    # Without a word about QK-norm its gradient is, in each process, of that one's heads.
    processes = TensorParallel.of(meshes[0], any(style.kind == SUMMED for style in found.values()))
    return Dealt(processes, tuple(found.items()))


def style_of(module: nn.Module) -> Style | None:
    """How the module is dealt out, where it is in a way that is known, and nothing else is around its call."""
    from torch.distributed.tensor import Shard

    said = _said(module)
    if said is None:
        return None
    if said.style == "ReplicatedWithGradAllReduce":
        return Style(SUMMED, said.mesh)
    kind, dim = (COLUMNS, 0) if said.by_columns else (ROWS, 1) if said.by_rows else (None, 0)
    # Somebody may have laid its weight out anew since, which its hooks would see, and a block would not. FSDP2 deals
    # out rows, too.
    placements = getattr(getattr(module, "weight", None), "placements", ())
    usual = Shard(dim) in placements and Shard(1 - dim) not in placements[-1:]
    return Style(kind, said.mesh) if kind is not None and usual else None


def _said(module: nn.Module) -> Layouts | None:
    hooks = [h for h in others(hooks_of(module)) if not is_harmless(h)]
    if gathers(module) or getattr(module, "_hf_quantized_needs_local_tp", False):
        return None
    if is_parallel_forward(module):
        return None if hooks else _said_to_transformers(module)
    return None if "forward" in module.__dict__ else layouts_of(hooks)


def _said_to_transformers(module: nn.Module) -> Layouts | None:
    style = _style(module)
    if style is not None:
        how, mesh = style
        reads, gives = (getattr(how, f"{end}_layouts", None) for end in ("input", "output"))
        by = getattr(how, "shard_dim", None)
        name = type(how).__name__ if by is None else f"{type(how).__name__} {by}"
        return Layouts(name, reads, gives, getattr(how, "use_local_output", None) is True, mesh)
    mesh = closure(closure(module.__dict__["forward"]).get("_all_reduce_grad")).get("mesh")
    return None if mesh is None else Layouts("ReplicatedWithGradAllReduce", mesh=mesh)


def summed_part(t: Any, processes: TensorParallel) -> Tensor:
    """A parameter of a SUMMED norm, of which each process makes the whole gradient."""
    shared: Tensor = _Shared.apply(t, processes.size)
    return shared


def _sums_itself(t: Any) -> bool:
    """transformers sums its gradient over the processes: from its norm's first own call on, whenever that is."""
    hooks = (t._post_accumulate_grad_hooks or {}).values()
    return any(str(getattr(h, "__module__", "")).startswith("transformers.distributed.") for h in hooks)


class _Shared(torch.autograd.Function):
    """A parameter of which each process has the whole gradient, and gives its share where shares are summed then."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, processes: int) -> Tensor:
        ctx.parameter, ctx.processes = t, processes
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.processes if _sums_itself(ctx.parameter) else grads[0], None


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
        looked_up = said.reads == said.gives == Replicate() and said.style == "RowwiseParallel"
        usual = said.local and (looked_up or said.style == "EmbeddingParallel 0")
    else:
        usual = said.style == "ColwiseParallel" and said.reads == Replicate()
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
    held = closure(linear.__dict__.get("forward")) if is_parallel_forward(linear) else {}
    if not ({"self", "mesh"} <= held.keys() and hasattr(held["self"], "transform_inputs_pre_forward")):
        return None
    return held["self"], held["mesh"]
