"""A standard block as two opaque ops, for torch.compile.

Traced into, a block's loop over tiles would be unrolled, and its forward and its recomputation could be fused
differently and lose their bitwise equality. As ops they are one node each, for any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.exec import node
from pyckpt.exec.plan import standard_plan
from pyckpt.exec.resident import Kept
from pyckpt.ops.registry import LIBRARY, autograd
from pyckpt.save import SaveSet, post_tensors, save_set
from pyckpt.spec import BlockSpec
from pyckpt.tokenwise.parameters import parameter_shapes

_ARGS = (
    "Tensor x, Tensor? positions, Tensor? cu_seqlens, Tensor? seeds, Tensor[] weights, str spec, str save, int tile, "
    "int tile_bytes, ScalarType dtype"
)
# With seeds, which are read on the host: a CUDA graph (`mode="reduce-overhead"`) would drop the same values for ever.
_KINDS = {"": (), "_seeded": (torch.Tag.cudagraph_unsafe,)}
for _kind, _tags in _KINDS.items():
    LIBRARY.define(f"block_fwd{_kind}({_ARGS}) -> (Tensor, Tensor[])", tags=_tags)
    LIBRARY.define(
        f"block_bwd{_kind}(Tensor dy, Tensor[] kept, {_ARGS}, bool need_dx, bool[] need_weights) -> Tensor[]",
        tags=_tags,
    )


def block(
    spec: str,
    save: str,
    tile: int | None,
    tile_bytes: int,
    dtype: torch.dtype,
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: tuple[Tensor, ...],
) -> Tensor:
    """One block, `spec` as `BlockSpec.to_string` writes it; what `node.execute` computes, with the same bits."""
    fwd = torch.ops.pyckpt.block_fwd if seeds is None else torch.ops.pyckpt.block_fwd_seeded
    return fwd(x, positions, cu_seqlens, seeds, list(weights), spec, save, tile or 0, tile_bytes, dtype)[0]


def kept_names(spec: BlockSpec, save: SaveSet) -> tuple[str, ...]:
    names: list[str] = []
    if save.qkv:
        names += ["q", "k", "v"]
    if save.attention:
        names += ["o", "lse"]
    return *names, *(t.name for t in post_tensors(spec, save))


def _run(x: Tensor, spec_text: str, save: str, tile: int, tile_bytes: int, dtype: torch.dtype) -> node.Run:
    spec = BlockSpec.from_string(spec_text)
    tokens = x.numel() // x.shape[-1]
    plan = standard_plan(spec, save_set(save), tile or None, tokens, x.dtype, dtype, x.device, tile_bytes)
    return node.Run([plan], [tuple(parameter_shapes(spec))], dtype)


def _fwd(
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: list[Tensor],
    spec: str,
    save: str,
    tile: int,
    tile_bytes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    run = _run(x, spec, save, tile, tile_bytes, dtype)
    y, kept = node.forward(run, x, positions, cu_seqlens, seeds, tuple(weights), keeping=True)
    return y, [kept[n] for n in kept_names(BlockSpec.from_string(spec), save_set(save))]


def _fwd_fake(
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: list[Tensor],
    spec: str,
    save: str,
    tile: int,
    tile_bytes: int,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    s = BlockSpec.from_string(spec)
    tokens = x.numel() // x.shape[-1]
    widths = {"q": s.d_q, "k": s.d_kv, "v": s.d_kv, "o": s.d_q}
    kept: Kept = {n: x.new_empty((tokens, width), dtype=dtype) for n, width in widths.items()}
    for t in post_tensors(s, save_set(save)):
        kept[t.name] = x.new_empty((tokens, t.width), dtype=x.dtype if t.residual else dtype)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    lead = (s.n_heads, tokens) if cu_seqlens is not None else (x.shape[0], s.n_heads, x.shape[1])
    kept["lse"] = x.new_empty(lead, dtype=stats)
    return x.new_empty(x.shape), [kept[n] for n in kept_names(s, save_set(save))]


def _bwd(
    dy: Tensor,
    kept: list[Tensor],
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: list[Tensor],
    spec: str,
    save: str,
    tile: int,
    tile_bytes: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_weights: list[bool],
) -> list[Tensor]:
    run = _run(x, spec, save, tile, tile_bytes, dtype)
    named = dict(zip(kept_names(BlockSpec.from_string(spec), save_set(save)), kept, strict=True))
    dx, grads = node.backward(
        run, x, positions, cu_seqlens, seeds, tuple(weights), named, dy, need_dx, tuple(need_weights)
    )
    return [g for g in (dx, *grads) if g is not None]


def _bwd_fake(
    dy: Tensor,
    kept: list[Tensor],
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    seeds: Tensor | None,
    weights: list[Tensor],
    spec: str,
    save: str,
    tile: int,
    tile_bytes: int,
    dtype: torch.dtype,
    need_dx: bool,
    need_weights: list[bool],
) -> list[Tensor]:
    grads = [w.new_empty(w.shape) for w, need in zip(weights, need_weights, strict=True) if need]
    return [x.new_empty(x.shape), *grads] if need_dx else grads


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, positions, cu_seqlens, seeds, weights, *ctx.options = inputs
    _, kept = output
    ctx.counts = (len(weights), len(kept))
    ctx.save_for_backward(x, positions, cu_seqlens, seeds, *weights, *kept)


def _backward(ctx, dy, _dkept):  # type: ignore[no-untyped-def]
    x, positions, cu_seqlens, seeds, *rest = ctx.saved_tensors
    n_weights, _ = ctx.counts
    weights, kept = rest[:n_weights], rest[n_weights:]
    need_dx = ctx.needs_input_grad[0]
    need_weights = [w.requires_grad for w in weights]
    given = (x, positions, cu_seqlens, seeds, weights, *ctx.options)
    bwd = torch.ops.pyckpt.block_bwd if seeds is None else torch.ops.pyckpt.block_bwd_seeded
    grads = bwd(dy, kept, *given, need_dx, need_weights)
    found = iter(grads)
    dx = next(found) if need_dx else None
    dweights = [next(found) if need else None for need in need_weights]
    return dx, None, None, None, dweights, *(None,) * len(ctx.options)


for _kind in _KINDS:
    for _name, _fn, _fake in ((f"block_fwd{_kind}", _fwd, _fwd_fake), (f"block_bwd{_kind}", _bwd, _bwd_fake)):
        LIBRARY.impl(_name, _fn, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pyckpt::{_name}", _fake, lib=LIBRARY)
    autograd(f"block_fwd{_kind}", _backward, _setup)
