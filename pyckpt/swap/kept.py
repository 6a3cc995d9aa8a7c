"""What a region that runs again in the backward keeps beside its inputs: what its attention made.

Chen et al. 2016, "Training deep nets with sublinear memory cost", keeps the inputs alone. Of what is made again then
only attention's part grows with the square of the length, and its output is no larger than the input.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import wrap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from pyckpt.swap.arguments import CallArguments, storage_of, tensors_written, writes

# Ops that give an attention's output, and what else its backward reads.
_ATTENTION = frozenset(
    (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "aten::_cudnn_attention_forward",
        "torch_attn::_varlen_attn",
        "flex_attention",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
        "pyckpt::attention_fwd",
    )
)

# The same ops of flash-attn as transformers takes from the hub, where each build has a namespace of its own.
_OF_BUILDS = frozenset(("_flash_attn_forward", "_flash_attn_varlen_forward", "fwd", "varlen_fwd"))
_RATES = ("dropout_p", "p_dropout")

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def contexts(given: CallArguments, attention: bool) -> Contexts:
    """In which a region runs first, and again: there its attention is not computed but given, if it is kept.

    What the region was given hears of the first run. For `torch.utils.checkpoint`. Its own kept values
    (`create_selective_checkpoint_contexts`) serve a single backward; these serve any number.
    """
    kept: list[_Kept] = []
    return _Keeping(kept, given, attention), _Giving(kept) if attention else contextlib.nullcontext()


def traced_contexts() -> Contexts:
    """The same for a graph of torch.compile, which knows PyTorch's own alone."""
    if not _in_graph():
        warnings.warn(
            "pyckpt.swap: torch.compile breaks out of a layer that runs again in the backward, and what the layer "
            "changes is then changed twice. Leave it uncompiled: layer.forward = torch.compiler.disable(layer.forward)",
            stacklevel=2,
        )
    return create_selective_checkpoint_contexts(_policy)


def _in_graph() -> bool:
    """torch.utils.checkpoint was called by the op that a graph has for it, not by code outside of PyTorch."""
    frame, folder = sys._getframe(1), os.path.dirname(torch.__file__)
    while frame.f_back is not None and frame.f_back.f_code.co_filename.startswith(folder):
        frame = frame.f_back
        if frame.f_code.co_filename == wrap.__file__:
            return True
    return False


class _Kept:
    """What tells an attention from another one, and what it made."""

    def __init__(self, label: Any, made: Any) -> None:
        self.label, self._made = label, made
        tensors = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]
        self._storages = {storage_of(t) for t in tensors}

    def hear(self, storage: int) -> None:
        """Something is about to be written there: code that works in place on an attention's output."""
        if storage in self._storages:
            self._made = None

    def give(self) -> Any:
        """What was made; None where it is no more what it was."""
        changed = any(t._version != version for t, version in self._versions)
        return None if changed or self._made is None else _detached(self._made)


def _is_kept(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """An attention that draws no random numbers: those have to be drawn again, or all later ones would differ."""
    if not _is_attention(op.name()):
        return False
    names = [a.name for a in op._schema.arguments] if hasattr(op, "_schema") else []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return not any(given.get(name) for name in _RATES)


@functools.cache
def _is_ordinary(op: Any) -> bool:
    """No attention, and it writes to nothing, as nearly all: a second look would take as long as a launch."""
    return not _is_attention(op.name()) and not writes(op)


@functools.cache
def _is_attention(name: str) -> bool:
    namespace, _, op = name.partition("::")
    return name in _ATTENTION or (namespace.startswith("_") and "flash_attn" in namespace and op in _OF_BUILDS)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = _is_kept(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _label(op: Any, args: tuple[Any, ...]) -> Any:
    return op, [(t.shape, t.dtype) for t in args if isinstance(t, Tensor)]


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True  # flex_attention

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else compiled functions inside would run uncompiled

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs) if _is_ordinary(func) else self._run(func, args, kwargs)

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        """What an op makes that is an attention, or writes to something."""
        raise NotImplementedError

    def _hear(self, op: Any, args: Any, kwargs: Any) -> None:
        for t in tensors_written(op, args, kwargs) if self._kept else ():
            for kept in self._kept:
                kept.hear(storage_of(t))


class _Keeping(_Mode):
    def __init__(self, kept: list[_Kept], given: CallArguments, attention: bool) -> None:
        super().__init__(kept)
        self._given, self._attention = given, attention

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            self._given.ran()

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        self._given.written(op, args, kwargs)
        self._hear(op, args, kwargs)
        made = op(*args, **kwargs)
        if self._attention and _is_kept(op, args, kwargs):
            self._kept.append(_Kept(_label(op, args), _detached(made)))
        return made


class _Giving(_Mode):
    """Gives what was kept, in order. What does not follow that order is computed."""

    _next: Iterator[_Kept]

    def __enter__(self) -> Any:
        self._next = iter(self._kept)
        return super().__enter__()

    def _run(self, op: Any, args: Any, kwargs: Any) -> Any:
        self._hear(op, args, kwargs)
        if _is_kept(op, args, kwargs):
            kept = next(self._next, None)
            made = kept.give() if kept is not None and kept.label == _label(op, args) else None
            if made is not None:
                return made
        return op(*args, **kwargs)


def _detached(made: Any) -> Any:
    """Other tensors on the same memory: autograd makes its own of what an op gives."""
    return tree_map_only(Tensor, lambda t: t.detach(), made)
