"""Checks of what users pass in, made before any work starts."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from pyckpt.reading import read_once

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INT_DTYPES = (torch.int32, torch.int64)


class Range(NamedTuple):
    """The numbers that an argument may be, in words, whether one is among them, and what to do with another."""

    words: str
    holds: Callable[[float], bool]
    advice: str = ""


FINITE = Range("a finite number", lambda v: -math.inf < v < math.inf)
POSITIVE = Range("a positive finite number", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Range("a finite number >= 0", lambda v: 0 <= v < math.inf)
RATE = Range("a number in [0, 1)", lambda v: 0 <= v < 1)
SHARE = Range("in [0, 1]", lambda v: 0 <= v <= 1)
SOFTCAP = Range("None or a positive number", NOT_NEGATIVE.holds)  # 0 is none, as in configs
SCALE = Range("None or a finite number", FINITE.holds)


def number(
    name: str,
    value: Any,
    allowed: Range,
    instead: str = "a number",
    wrong_type: type[Exception] = TypeError,
) -> float:
    """A real number as a float: Python's, NumPy's, or a tensor of one. ValueError where it is not `allowed`.

    instead: what to give where a tensor is to have a gradient. While torch.compile traces nothing is known of a number,
    which may be one that varies, and nothing is checked.
    """
    tracing = torch.compiler.is_compiling()
    if tracing or type(value) is not float:
        check_constant(name, value, instead)
    if tracing:
        return float(value)
    found = value if type(value) is float else _real(value)
    if found is None:
        words = allowed.words.replace("finite ", "")
        raise wrong_type(f"{name} must be {words if wrong_type is TypeError else allowed.words}, got {_shown(value)}")
    if not allowed.holds(found):
        raise ValueError(f"{name} must be {allowed.words}, got {value!r}{allowed.advice}")
    return found


def _real(value: Any) -> float | None:
    """None for what is no real number; a bool is none, whosever it is."""
    if isinstance(value, (bool, str, bytes, complex)) or not hasattr(value, "__float__"):
        return None
    if str(getattr(value, "dtype", "")).removeprefix("torch.").startswith(("bool", "complex")):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # several numbers, or a tensor without any
        return None


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of shape {tuple(value.shape)}" if getattr(value, "shape", ()) else f"{value!r}, a {kind}"


def as_int(value: Any) -> int | None:
    """Of an int, of NumPy's, and of a tensor of one; None for anything else, a bool too."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, float):  # torch.compile can't ask one that varies what it has
        return None
    if not hasattr(value, "__index__") or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of floats
        return None


def integer(name: str, value: Any) -> int:
    """An int of 64 bits."""
    found = as_int(value)
    if found is None:
        raise TypeError(f"{name} must be an int, got {_shown(value)}")
    if not torch.compiler.is_compiling() and not -(2**63) <= found < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {value}")
    return found


def positive_int(name: str, value: Any, expected: str = "a positive int") -> int:
    """ValueError, whatever it is, for what is none."""
    found = as_int(value)
    if found is None or found <= 0:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return found


def check_bool(name: str, value: object, wrong_type: type[Exception] = TypeError) -> None:
    if not isinstance(value, bool):
        raise wrong_type(f"{name} must be True or False, got {_shown(value)}")


def check_dtype(name: str, dtype: object, optional: bool = True) -> None:
    """One of the dtypes that we compute with, or, where it is `optional`, None."""
    if optional and dtype is None:
        return
    none = "None or " if optional else ""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be {none}a torch.dtype, as torch.bfloat16, got {_shown(dtype)}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} is {dtype}, expected {none}one of {names(FLOAT_DTYPES)}")


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise ValueError(f"{name} has layout {t.layout}, expected a dense tensor; a nested one's .values() are packed")
    if t.is_nested:  # some are strided
        raise ValueError(
            f"{name} is a nested tensor, expected a dense one; of one with layout=torch.jagged the .values() are packed"
        )


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


def check_positions(positions: Tensor, x: Tensor, axes: int = 0) -> Tensor:
    """Positions as one int for each token, (T,): from (S,), (1, S), (B, S), or, when packed, (T,), (1, T).

    With `axes` both have one more dim, of as many.
    """
    check_tensor("positions", positions)
    if positions.dtype not in _INT_DTYPES:
        raise ValueError(f"positions have dtype {positions.dtype}, expected {names(_INT_DTYPES)}")
    if positions.device != x.device:
        raise ValueError(f"positions are on {positions.device}, x is on {x.device}; move one with .to(...)")
    lead, last = tuple(x.shape[:-1]), (axes,) if axes else ()
    if not has_shape(positions, (*lead, *last), (lead[-1], *last), (1, lead[-1], *last)):
        expected = f"{(*lead, *last)} or {(lead[-1], *last)}" + (f", {axes} axes of RoPE's (rope_axes)" if axes else "")
        raise ValueError(f"positions have shape {tuple(positions.shape)}, expected {expected}")
    return (positions if len(lead) == 1 else positions.expand(*lead, *last)).reshape(-1, *last)


def check_tile(tile: int | None) -> int | None:
    return None if tile is None else positive_int("tile", tile, "None or a positive int (tokens)")


def check_tile_bytes(value: int) -> int:
    return positive_int("tile_bytes", value, "a positive int (bytes that a tile may take)")


def check_labels(target: Tensor, vocab: int, ignore_index: int, device: torch.device) -> None:
    """int64 labels in [0, vocab) or ignore_index. On CUDA the range is checked by a device-side assertion."""
    check_tensor("labels", target)
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
    if not (value is None or (isinstance(value, str) and value == "sqrt")):
        positive_int("segments", value, "None, 'sqrt' or a positive int (blocks in a segment)")


def check_unbatched(what: str, grads: Iterable[Any]) -> None:
    """Raise RuntimeError where a backward is given many gradients at once, as vmap has them."""
    if torch.compiler.is_compiling():
        return
    if any(isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):
        raise RuntimeError(
            f"{what} takes one gradient at a time: backward was called with a batch of them (is_grads_batched=True, or "
            "jacobian(vectorize=True)), which its kernels do not know. Call it once for each, in a loop"
        )
