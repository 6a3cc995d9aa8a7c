"""Model FLOPs: what the mathematics of a model asks for, however it is executed.

Two FLOPs a multiply-add, matrix products only. Causal attention counts as half of full attention, and
recomputation counts as nothing, so that a run that recomputes can't look better than one that doesn't.
"""

from __future__ import annotations

from typing import Protocol

from pyckpt.errors import positive_int
from pyckpt.spec import GATED_MLPS


class BlockShape(Protocol):
    """The fields of `pyckpt.spec.BlockSpec` that decide the FLOPs."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def mlp(self) -> str: ...
    @property
    def causal(self) -> bool: ...
    @property
    def window(self) -> tuple[int, int]: ...


def attention_pairs(length: int, *, causal: bool = True, window: tuple[int, int] = (-1, -1)) -> float:
    """Pairs (query, key) that attention over ``length`` tokens computes.

    ``length**2``, half of it when causal. A window (left, right) that is shorter than the sequence is counted
    exactly: each query sees up to ``left`` keys before its own and ``right`` after it; -1 is no limit.
    """
    left, right = window
    right = 0 if causal else right
    if left < 0 or left >= length:
        left = -1
    if right < 0 or right >= length:
        right = -1
    if left == -1 and (causal or right == -1):
        return length * length * (0.5 if causal else 1.0)
    before = length if left == -1 else left
    after = length if right == -1 else right
    return float(length + _one_side(length, before) + _one_side(length, after))


def block_flops(spec: BlockShape, length: int, batch: int = 1, *, backward: bool = True) -> float:
    """Model FLOPs of one block on ``batch`` sequences of ``length`` tokens.

    ``backward=True`` counts forward and backward (three times the forward), ``False`` the forward only. Raises
    TypeError for what has no shape of a block, ValueError for counts that are no positive ints.
    """
    _check(spec, length=length, batch=batch)
    d_q, d_kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    projections = spec.d_model * (2 * d_q + 2 * d_kv)
    mlp = spec.d_model * spec.d_ff * (3 if spec.mlp in GATED_MLPS else 2)
    pairs = attention_pairs(length, causal=spec.causal, window=spec.window)
    forward = batch * (2 * length * (projections + mlp) + 2 * 2 * pairs * d_q)
    return forward * (3 if backward else 1)


def causal_lm_flops(
    spec: BlockShape, n_layers: int, vocab_size: int, length: int, batch: int = 1, *, backward: bool = True
) -> float:
    """Model FLOPs of a causal language model: its blocks and the projection to the vocabulary at every
    position.

    The embedding is a look-up and costs none. Raises as `block_flops` does.
    """
    _check(spec, n_layers=n_layers, vocab_size=vocab_size, length=length, batch=batch)
    head = 2 * batch * length * spec.d_model * vocab_size * (3 if backward else 1)
    return n_layers * block_flops(spec, length, batch, backward=backward) + head


def _check(spec: BlockShape, **counts: int) -> None:
    if not hasattr(spec, "head_dim"):
        advice = "; give its .spec" if hasattr(spec, "spec") else ""
        raise TypeError(f"spec must be a pyckpt.spec.BlockSpec, got a {type(spec).__name__}{advice}")
    for name, count in counts.items():
        positive_int(name, count)


def _one_side(length: int, reach: int) -> int:
    """Sum over the queries of the keys seen on one side, at most ``reach`` each."""
    reach = min(reach, length - 1)
    return reach * (reach + 1) // 2 + (length - 1 - reach) * reach
