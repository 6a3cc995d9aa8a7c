"""Checks of what users pass in, made before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from pyckpt.reading import read_once

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INT_DTYPES = (torch.int32, torch.int64)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise ValueError(f"{name} has layout {t.layout}, expected a dense tensor; a nested one's .values() are packed")


def check_constant(name: str, value: object, instead: str) -> None:
    """Raise ValueError for a tensor that is to have a gradient, where a number is read and none would come back."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} gets no gradient here: give {name}.detach(), or {instead}")


def check_transforms(what: str, *tensors: object) -> None:
    """No torch.func transform is active, and no tensor has a forward-mode tangent: kernels know neither."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{what} does not support torch.func transforms (vmap, grad, jvp, jacrev, ...). Call it without "
            "the transform, or use plain PyTorch for that part of the model"
        )
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{what} does not support forward-mode differentiation. Use backward(), or plain PyTorch for "
            "that part of the model"
        )


def check_activations(x: Tensor, d_model: int, packed: bool) -> None:
    """x: (B, S, d_model), or (T, d_model) with cu_seqlens."""
    check_tensor("x", x)
    if packed and x.dim() != 2:
        raise ValueError(f"with cu_seqlens, x must be packed as (T, d_model), got shape {tuple(x.shape)}")
    if not packed and x.dim() != 3:
        raise ValueError(
            f"x must be (B, S, d_model), got shape {tuple(x.shape)}; packed x (T, d_model) needs cu_seqlens"
        )
    if x.shape[-1] != d_model:
        raise ValueError(f"x has width {x.shape[-1]} in its last dim, expected d_model={d_model}")
    if x.numel() == 0:
        raise ValueError(f"x is empty: shape {tuple(x.shape)}; give at least one token")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, expected one of {names(FLOAT_DTYPES)}")


def check_matches(x: Tensor, weight: Tensor, what: str, one_dtype: bool = True) -> None:
    """x and the weights on one device and, unless autocast rules, in `one_dtype`."""
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and {what} is on {weight.device}; move one with .to(...)")
    if x.dtype != weight.dtype and one_dtype:
        raise ValueError(
            f"x has dtype {x.dtype} and {what} has {weight.dtype}; convert one with .to(...), or run under "
            "torch.autocast"
        )


def has_values(t: Tensor) -> bool:
    """Whether there are values to look at: not while torch.compile traces, on the meta device or in FakeTensorMode."""
    return not (
        torch.compiler.is_compiling() or t.is_meta or isinstance(t, FakeTensor) or active_fake_mode() is not None
    )


def has_shape(t: Tensor, *allowed: Sequence[int]) -> bool:
    """One of these. Compared dim by dim: torch.compile finds no tuple of sizes that vary in others by `in`."""
    return any(t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True)) for shape in allowed)


def check_index(name: str, value: Any) -> None:
    """An int of 64 bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}, a {type(value).__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {value}")


def check_cu_seqlens(
    cu: Tensor, tokens: int, device: torch.device, name: str = "cu_seqlens", asker: object = None
) -> None:
    """int32, (N + 1,), from 0, not descending, up to the token count.

    Reads the values, a sync on CUDA; for an `asker` once for all blocks of a pass (see `read_once`).
    """
    check_tensor(name, cu)
    if cu.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {cu.dtype}, expected int32; convert it with .to(torch.int32)")
    if cu.dim() != 1 or cu.numel() < 2:
        raise ValueError(f"{name} must be one-dimensional with at least 2 entries, got shape {tuple(cu.shape)}")
    if cu.device != device:
        raise ValueError(f"{name} is on {cu.device}, the tokens are on {device}; move it with .to(...)")
    if not has_values(cu):
        return
    if asker is None:
        _check_starts(cu.tolist(), tokens, name)
    else:
        read_once(cu, ("cu_seqlens", tokens), asker, lambda: _check_starts(cu.tolist(), tokens, name))


def _check_starts(values: list[int], tokens: int, name: str) -> None:
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(
            f"{name} must begin with 0 and end at the number of tokens, {tokens}; it goes from {values[0]} "
            f"to {values[-1]}"
        )
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(f"{name} must not descend: entry {i + 1} is {b}, after {a}")


def check_positions(positions: Tensor, x: Tensor) -> Tensor:
    """Positions as one int for each token, (T,): from (S,), (1, S), (B, S), or (T,) when packed."""
    check_tensor("positions", positions)
    if positions.dtype not in _INT_DTYPES:
        raise ValueError(f"positions have dtype {positions.dtype}, expected {names(_INT_DTYPES)}")
    if positions.device != x.device:
        raise ValueError(f"positions are on {positions.device}, x is on {x.device}; move one with .to(...)")
    lead = tuple(x.shape[:-1])
    if not has_shape(positions, lead, (lead[-1],), (1, lead[-1])):
        raise ValueError(f"positions have shape {tuple(positions.shape)}, expected {lead} or ({lead[-1]},)")
    return positions.expand(lead).reshape(-1)


def check_tile(tile: int | None) -> int | None:
    if tile is not None and (not isinstance(tile, int) or isinstance(tile, bool) or tile <= 0):
        raise ValueError(f"tile must be None or a positive int (tokens), got {tile!r}")
    return tile


def check_tile_bytes(value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"tile_bytes must be a positive int (bytes that a tile may take), got {value!r}")
    return value


def check_labels(target: Tensor, vocab: int, ignore_index: int, device: torch.device) -> None:
    """int64 labels in [0, vocab) or ignore_index. On CUDA the range is checked by a device-side assertion."""
    if target.dtype != torch.int64:
        raise ValueError(f"labels have dtype {target.dtype}, expected int64; convert them with .long()")
    if target.device != device:
        raise ValueError(f"labels are on {target.device}, x is on {device}; move one with .to(...)")
    if not has_values(target):
        return
    good = (target == ignore_index) | ((target >= 0) & (target < vocab))
    if target.is_cuda:
        torch._assert_async(good.all())
    elif not bool(good.all()):
        raise ValueError(
            f"label {int(target[~good][0])} is out of range: expected 0 to {vocab - 1}, or {ignore_index} to "
            "ignore a token"
        )


def check_tokens(tokens: Tensor, vocab: int, device: torch.device, packed: bool) -> None:
    """Token ids: int64, (B, S), or (T,) when packed, in [0, vocab)."""
    check_tensor("tokens", tokens)
    if tokens.dtype not in _INT_DTYPES:
        raise ValueError(f"tokens have dtype {tokens.dtype}, expected {names(_INT_DTYPES)}")
    rank, shape = (1, "(T,)") if packed else (2, "(B, S)")
    if tokens.dim() != rank:
        raise ValueError(
            f"tokens must be {shape}{' with cu_seqlens' if packed else ''}, got shape {tuple(tokens.shape)}"
        )
    if tokens.numel() == 0:
        raise ValueError(f"tokens are empty: shape {tuple(tokens.shape)}; give at least one token")
    if tokens.device != device:
        raise ValueError(f"tokens are on {tokens.device}, the model is on {device}; move one with .to(...)")
    if tokens.is_cuda or not has_values(tokens):
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"token {low if low < 0 else high} is out of range: expected 0 to {vocab - 1}")


def check_segments(value: object) -> None:
    """Raise ValueError unless it is None, "sqrt" or a number of blocks."""
    count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not (count or value is None or value == "sqrt"):
        raise ValueError(f"segments must be None, 'sqrt' or a positive int (blocks in a segment), got {value!r}")


def check_unbatched(what: str, grads: Iterable[Any]) -> None:
    """Raise RuntimeError where a backward is given many gradients at once, as vmap has them."""
    if torch.compiler.is_compiling():
        return
    if any(isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):
        raise RuntimeError(
            f"{what} takes one gradient at a time: backward was called with a batch of them (is_grads_batched=True, or "
            "jacobian(vectorize=True)), which its kernels do not know. Call it once for each, in a loop"
        )
