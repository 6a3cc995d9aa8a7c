"""Dropout of the residual branches, by Philox on absolute positions (see `philox`)."""

from __future__ import annotations

from torch import Tensor

from pyckpt.ops import philox
from pyckpt.ops.chunks import acc_dtype, row_chunks
from pyckpt.ops.registry import define, implement
from pyckpt.ops.triton_backend import kernels, rounds_badly


def _fake(x: Tensor, residual: Tensor | None, out: Tensor, rate: float, seed: int, first: int) -> None:
    return None


@define("dropout_(Tensor x, Tensor? residual, Tensor(a!) out, float rate, SymInt seed, SymInt first) -> ()", fake=_fake)
def dropout_(x: Tensor, residual: Tensor | None, out: Tensor, rate: float, seed: int, first: int) -> None:
    """out (t, n) = residual + dropout(x), in the accumulation dtype until it is written. out may be x.

    What is dropped depends on (seed, row, column) alone; x's rows have the absolute numbers `first` and up.
    """
    factor, acc = 1.0 / (1.0 - rate), acc_dtype(x.dtype)
    for sl in row_chunks(x):
        start = first + sl.start
        keep = philox.kept_rows(rate, seed, (start, start + x[sl].shape[0]), x.shape[1], x.device)
        y = (x[sl].to(acc) * factor).masked_fill_(~keep, 0.0)
        out[sl] = y if residual is None else y.add_(residual[sl])


@implement("dropout_", "triton")
def dropout_triton_(x: Tensor, residual: Tensor | None, out: Tensor, rate: float, seed: int, first: int) -> None:
    threshold, factor = philox.threshold(rate), 1.0 / (1.0 - rate)
    a, o = (t.float() if rounds_badly(t) else t for t in (x, out))
    b = residual.float() if residual is not None and rounds_badly(residual) else residual
    kernels("dropout").dropout(a, b, o, threshold, factor, seed, first)
    if o is not out:
        out.copy_(o)
