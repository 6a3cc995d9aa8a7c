"""The resident executor: one block's forward and backward, everything on the device.

Tokenwise parts run tile by tile; q, k, v and their gradients exist whole, for one block at a time. What lives from
forward to backward is x and the save set. Memory of a backward at its peak, above x, dy, dx and the save set, is the
larger of two: do, q, k, v, dq, dk, dv, that is 3 d_q + 4 d_kv values for each token, while attention's gradients are
made; or do, the scratch of a tile and the float32 gradients of the MLP's weights before that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.exec.positions import positions_of
from pyckpt.exec.tiling import count, tiles
from pyckpt.ops import philox
from pyckpt.ops.chunks import acc_dtype
from pyckpt.save import KeptTensor, SaveSet
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.interface import Tile, Tokenwise, Weights
from pyckpt.tokenwise.tensor_parallel import TensorParallel
from pyckpt.tokenwise.workspace import Workspace

Kept = dict[str, Tensor]
Cast = Callable[[], dict[str, Tensor]]
"""Makes a block's weights as its products take them, for as long as it runs."""
NOTHING = SaveSet("nothing")
POST_NAMES = ("mid", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How to run one block. `pre_names` are the weights whose gradient comes through q, k, v.

    `post_tensors` are what `post` keeps with this save set; `token_bytes` what a token takes inside a tile;
    `processes` those that have the weights together.
    """

    tokenwise: Tokenwise
    attend: DenseAttend
    save: SaveSet
    tile: int
    pre_names: frozenset[str]
    post_tensors: tuple[KeptTensor, ...] = ()
    keeps_raw_qk: bool = False
    token_bytes: int = 0
    processes: TensorParallel | None = None

    def sinks(self, w: Weights) -> Tensor | None:
        """The weight that holds attention's sinks, where there are any."""
        return None if self.attend.sinks is None else w[self.attend.sinks]

    @property
    def d_q(self) -> int:
        return self.attend.d_q

    @property
    def d_kv(self) -> int:
        return self.attend.d_k

    @property
    def d_v(self) -> int:
        return self.attend.d_v

    @property
    def d_o(self) -> int:
        return self.attend.d_o


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A block's inputs, flat: x (T, d_model), positions (T,), and the dtype of products and attention.

    `seed` is that of the block's dropout, None to drop nothing.
    positions None counts tokens from the start of each sequence, tile by tile, so that nothing is kept for it.
    """

    x: Tensor
    positions: Tensor | None
    layout: Layout
    dtype: torch.dtype
    seed: int | None = None

    def empty(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.x.shape[0], width, dtype=dtype or self.dtype, device=self.x.device)

    def by_head(self, heads: int) -> Tensor:
        """An uninitialised number for each head and token, (heads, T), in the accumulation dtype."""
        return torch.empty(heads, self.x.shape[0], dtype=acc_dtype(self.dtype), device=self.x.device)

    def tile(self, sl: slice, kept: Kept, names: Collection[str]) -> Tile:
        views = {n: kept[n][sl] for n in names if n in kept}
        positions = positions_of(self.layout, self.positions, sl, self.x.device)
        # Row after row, as what waits elsewhere comes back: products of another layout have other last bits.
        return Tile(self.x[sl].contiguous(), positions, views, sl.start, self.seed)

    @property
    def attention_seed(self) -> int | None:
        return None if self.seed is None else philox.derive(self.seed, 0)

    def of_block(self, x: Tensor, seed: int | None) -> Inputs:
        """The inputs of another block of the same run."""
        return dataclasses.replace(self, x=x, seed=seed)


def block_forward(plan: BlockPlan, w: Weights, inp: Inputs, keeping: bool) -> tuple[Tensor, Kept]:
    """y (T, d_model) and, if `keeping`, the tensors of the save set (without x)."""
    keep = plan.save if keeping else NOTHING
    ws = Workspace(inp.x.device)
    kept: Kept = {}
    if keep.qkv and plan.keeps_raw_qk:
        kept["q"], kept["k"] = inp.empty(plan.d_q), inp.empty(plan.d_kv)
    q, k, v = _project(plan, w, inp, kept, ws)
    o, lse = plan.attend.forward(inp.layout, q, k, v, inp.attention_seed, plan.sinks(w))
    if keep.qkv:
        kept = {"q": q, "k": k, "v": v} | kept
    del q, k, v
    if keep.attention:
        kept["o"], kept["lse"] = o, lse
    if keeping:
        kept |= {t.name: inp.empty(t.width, inp.x.dtype if t.residual else inp.dtype) for t in plan.post_tensors}
    y = torch.empty_like(inp.x, memory_format=torch.contiguous_format)
    for sl in tiles(inp.layout.tokens, plan.tile):
        plan.tokenwise.post(w, inp.tile(sl, kept, POST_NAMES), o[sl], y[sl], ws)
    return y, kept


def block_backward(
    plan: BlockPlan, w: dict[str, Tensor], inp: Inputs, kept: Kept, dy: Tensor, wanted: Collection[str], need_dx: bool
) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    """dx (T, d_model), None unless `need_dx`, and the gradients of the weights in `wanted`.

    Weights that are of no use any more are taken out of `w`: they may have been cast for this call.
    """
    ws = Workspace(inp.x.device)
    grads = WeightGradients(wanted, count(inp.layout.tokens, plan.tile))
    need_pre = need_dx or any(n in plan.pre_names for n in wanted)
    later = {*plan.pre_names, plan.attend.sinks}
    o, lse, qkv = _attention_outputs(plan, w, inp, kept, ws)
    dx = torch.empty_like(inp.x, memory_format=torch.contiguous_format) if need_dx else None
    do = inp.empty(plan.d_o) if need_pre else None
    delta = inp.by_head(plan.attend.n_heads) if need_pre and plan.tokenwise.makes_delta else None
    for sl in tiles(inp.layout.tokens, plan.tile):
        tile = inp.tile(sl, kept, POST_NAMES)
        tile.delta = None if delta is None else delta[:, sl]
        plan.tokenwise.post_bwd(w, tile, o[sl], dy[sl].contiguous(), _rows(dx, sl), _rows(do, sl), grads, ws)
    # What this took makes room for attention's gradients: its scratch, and half of its weights' sums where these go out
    # in half precision. In Llama-8B's block, at 32K tokens in bf16, they were 1.0 of the 2.2 GiB of the peak.
    ws.clear()
    made = {n: grads.result(n, w[n]) for n in wanted if n not in later}
    for n in w.keys() - later:
        del w[n]
    if do is not None:
        q, k, v = qkv or _attention_inputs(plan, w, inp, kept, need_dx, grads, ws)
        del qkv
        sinks = plan.sinks(w)
        dq, dk, dv = plan.attend.backward(inp.layout, do, q, k, v, o, lse, inp.attention_seed, delta, sinks)
        if sinks is not None and plan.attend.sinks in wanted:
            grads.add(str(plan.attend.sinks), plan.attend.sinks_backward(inp.layout, do, o, lse, sinks))
        del do, q, k, v, o, delta
        for sl in tiles(inp.layout.tokens, plan.tile):
            tile = inp.tile(sl, kept, ("q", "k") if plan.keeps_raw_qk else ())
            plan.tokenwise.pre_bwd(w, tile, dq[sl], dk[sl], dv[sl], _rows(dx, sl), grads, ws)
    return dx, made | {n: grads.result(n, w[n]) for n in wanted if n in later}


def _rows(t: Tensor | None, sl: slice) -> Tensor | None:
    return None if t is None else t[sl]


def _project(plan: BlockPlan, w: Weights, inp: Inputs, kept: Kept, ws: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inp.empty(plan.d_q), inp.empty(plan.d_kv), inp.empty(plan.d_v)
    for sl in tiles(inp.layout.tokens, plan.tile):
        plan.tokenwise.pre(w, inp.tile(sl, kept, ("q", "k")), q[sl], k[sl], v[sl], ws)
    return q, k, v


def _attention_outputs(
    plan: BlockPlan, w: Weights, inp: Inputs, kept: Kept, ws: Workspace
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """o and lse, kept or made again; with the q, k, v they were made from in the second case."""
    if "o" in kept:
        return kept["o"], kept["lse"], None
    qkv = _project(plan, w, inp, {}, ws)
    return *plan.attend.forward(inp.layout, *qkv, inp.attention_seed, plan.sinks(w)), qkv


def _attention_inputs(
    plan: BlockPlan, w: Weights, inp: Inputs, kept: Kept, need_dx: bool, grads: WeightGradients, ws: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as attention reads them, kept or made again."""
    if "v" not in kept and count(inp.layout.tokens, plan.tile) == 1:
        q, k, v = inp.empty(plan.d_q), inp.empty(plan.d_kv), inp.empty(plan.d_v)
        tile = inp.tile(slice(0, inp.layout.tokens), {}, ())
        plan.tokenwise.pre_again(w, tile, q, k, v, need_dx, grads, ws)
        return q, k, v
    if "v" not in kept:
        return _project(plan, w, inp, {}, ws)
    if not plan.keeps_raw_qk:
        return kept["q"], kept["k"], kept["v"]
    q, k = inp.empty(plan.d_q), inp.empty(plan.d_kv)
    for sl in tiles(inp.layout.tokens, plan.tile):
        plan.tokenwise.finish_kept(w, inp.tile(sl, kept, ("q", "k")), q[sl], k[sl])
    return q, k, kept["v"]


# --- runs of blocks ----------------------------------------------------------------------------------------------


def run_forward(
    plans: list[BlockPlan], weights: Sequence[Cast], inp: Inputs, seeds: Sequence[int | None], keeping: bool
) -> tuple[Tensor, Kept]:
    """The output of consecutive blocks. A single block keeps its save set; a run of several keeps its input alone."""
    if len(plans) == 1:
        return block_forward(plans[0], weights[0](), inp.of_block(inp.x, seeds[0]), keeping)
    x = inp.x
    for plan, cast, seed in zip(plans, weights, seeds, strict=True):
        x = block_forward(plan, cast(), inp.of_block(x, seed), keeping=False)[0]
    return x, {}


def run_backward(
    plans: list[BlockPlan],
    weights: Sequence[Cast],
    inp: Inputs,
    seeds: Sequence[int | None],
    kept: Kept,
    dy: Tensor,
    wanted: Sequence[Collection[str]],
    need_dx: bool,
) -> tuple[Tensor | None, list[dict[str, Tensor | None]]]:
    """Gradients of `run_forward`: makes the inner inputs again, then walks back through the blocks."""
    stages = list(_replay(plans, weights, inp, seeds, kept))
    results: list[dict[str, Tensor | None]] = []
    first = next((i for i, names in enumerate(wanted) if names), len(plans) - 1)
    dx: Tensor | None = dy
    for i in reversed(range(len(plans))):
        if dx is None:
            results.append({})
            continue
        stage_inp, stage_kept = stages.pop()
        dx, grads = block_backward(plans[i], weights[i](), stage_inp, stage_kept, dx, wanted[i], need_dx or i > first)
        results.append(grads)
    return dx if need_dx else None, results[::-1]


def _replay(
    plans: list[BlockPlan], weights: Sequence[Cast], inp: Inputs, seeds: Sequence[int | None], kept: Kept
) -> Iterator[tuple[Inputs, Kept]]:
    x = inp.x
    for plan, cast, seed in zip(plans[:-1], weights[:-1], seeds[:-1], strict=True):
        stage = inp.of_block(x, seed)
        x, stage_kept = block_forward(plan, cast(), stage, keeping=True)
        yield stage, stage_kept
    yield inp.of_block(x, seeds[-1]), kept
