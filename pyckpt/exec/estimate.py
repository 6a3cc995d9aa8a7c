"""What a streamed run will take, by arithmetic, before it starts: bytes, FLOPs, copies, time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from pyckpt.attend.context import ContextParallel, processes_of
from pyckpt.attend.dense import Layout
from pyckpt.exec.places import store_plan
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.schedule import Advance
from pyckpt.exec.stack import Stack
from pyckpt.measure.flops import attention_pairs
from pyckpt.measure.units import format_bytes
from pyckpt.ops.chunks import acc_dtype
from pyckpt.store import Store
from pyckpt.tokenwise.parameters import ATTENTION, MLP


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step, forward and backward, of a model on a sequence; of one process where several share it.

    store_bytes: what the store takes, of its `kind`. device_bytes: on the device, above weights and their gradients:
    the ring of tiles where the store copies them, one tile's scratch, one block's float32 gradient sums and those of
    embedding and head, and the store itself where it is there. flops: executed, with all that is made again. bytes_in,
    bytes_out: copied to and from the device, at most.
    """

    kind: str
    store_bytes: int
    device_bytes: int
    flops: float
    bytes_in: int
    bytes_out: int

    def seconds(self, flops_per_second: float, bytes_per_second: float = float("inf")) -> float:
        """Time of the step where copies, each way at this rate, run beside compute."""
        return max(self.flops / flops_per_second, max(self.bytes_in, self.bytes_out) / bytes_per_second)

    def __str__(self) -> str:
        stored = f"{format_bytes(self.store_bytes)} in the {self.kind} store"
        return f"{format_bytes(self.device_bytes)} on the device, {stored}"


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one block on a process's tokens: numbers that its gradients take in a backward, and FLOPs.

    products: of its weights, forward; weight_gradients: of those trained; repeated: what of `products` a backward makes
    again, and how much less where the save set is kept, `spared`; attention: its two products, forward, which are made
    again too where it `repeats_attention` for all that is kept.
    """

    gradients: int
    products: float
    weight_gradients: float
    repeated: float
    spared: float
    attention: float
    repeats_attention: bool

    @property
    def forward(self) -> float:
        return self.products + self.attention

    def backward(self, kept: bool) -> float:
        """Where the save set was kept, or nothing."""
        # Attention's backward has 5 products where its forward has 2.
        flops = self.products + self.weight_gradients + 2.5 * self.attention + self.repeated
        return flops - self.spared * kept + self.attention * (self.repeats_attention or not kept)


def work_of(
    plan: BlockPlan,
    weights: Mapping[str, Tensor],
    layout: Layout,
    experts_per_token: int = 1,
    context: ContextParallel | None = None,
) -> Work:
    """By arithmetic. Of weights of three dims (experts, rows, columns) each token meets `experts_per_token`.

    layout: of all tokens, which the processes of `context` share evenly.
    """
    share = 1.0 / processes_of(context)
    attend, per_token = plan.attend, {n: _products(w, experts_per_token) for n, w in weights.items()}
    again = {n: f for n, f in per_token.items() if n not in plan.tokenwise.made_once}
    kept = {t.name for t in plan.post_tensors} | ({"k", "v"} if plan.save.qkv else set())
    repeated, spared = sum(again.values()), sum(again.get(f"{_MADE_BY[n]}.weight", 0.0) for n in kept)
    if plan.keeps_raw_qk:  # a norm's backward reads them as they were before it
        repeated += sum(again.get(f"{ATTENTION}.{n}_proj.weight", 0.0) for n in ("q", "k"))
    trained = {n: w for n, w in weights.items() if w.requires_grad}
    left, right = attend.window
    pairs = attention_pairs(layout.seq, causal=right == 0, window=(left, right))
    return Work(
        gradients=sum(w.numel() for w in trained.values()) * (2 if plan.tokenwise.by_autograd else 1),
        products=share * layout.tokens * sum(per_token.values()),
        weight_gradients=share * layout.tokens * sum(per_token[n] for n in trained),
        repeated=share * layout.tokens * repeated,
        spared=share * layout.tokens * spared,
        attention=share * 2.0 * layout.batch * pairs * (attend.d_q + attend.d_o),
        repeats_attention=not plan.save.attention,
    )


# The products whose results are kept under these names.
_MADE_BY = {name: f"{ATTENTION}.{linear}" for name, linear in (("k", "k_proj"), ("v", "v_proj"), ("mid", "o_proj"))}
_MADE_BY |= {name: f"{MLP}.{name}_proj" for name in ("gate", "up", "down")}


def _products(weight: Tensor, experts_per_token: int) -> float:
    """FLOPs of a token's product with it."""
    if weight.dim() == 2:
        return 2.0 * weight.numel()
    return 2.0 * weight.numel() / weight.shape[0] * experts_per_token if weight.dim() == 3 else 0.0


def estimate(
    stack: Stack, store: Store, works: Sequence[Work], end_weights: int, vocab: int, head_products: int = 3
) -> Estimate:
    """works: of each block. end_weights: trained numbers of embedding and head; 0, as `vocab`, for blocks alone.

    head_products: how many products of all tokens with the head there are, its forward's and its gradients'.
    """
    plan = store_plan(stack)
    device = store.device_bytes(plan, stack.device)
    device += _scratch(stack) + (max(w.gradients for w in works) + end_weights) * acc_dtype(stack.dtype).itemsize
    device += min(plan.tile * vocab, _LOGITS.get(stack.device.type, _LOGITS["cuda"])) * 3 * 4
    ahead = [s for s in stack.schedule if isinstance(s, Advance)]
    walked_back = [s.block for s in stack.schedule if not isinstance(s, Advance)]
    kept = {s.block for s in ahead if s.keep}
    flops = 2.0 * head_products * stack.tokens * stack.d_model * vocab
    flops += sum(works[s.block].forward for s in ahead) + sum(works[b].backward(b in kept) for b in walked_back)
    bytes_in, bytes_out = _copies(stack, len(ahead), len(walked_back)) if store.copies(stack.device) else (0, 0)
    return Estimate(store.kind, plan.store_bytes, device, flops, bytes_in, bytes_out)


_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


def _scratch(stack: Stack) -> int:
    """One tile's scratch in the backward of attention, which is the most, and of the tokenwise parts."""
    acc, most = acc_dtype(stack.dtype).itemsize, 0
    for p in stack.plans:
        own = (p.d_q + 2 * p.d_o) * stack.dtype.itemsize + (p.d_q + p.d_o) * acc
        own += stack.d_model * stack.x_dtype.itemsize
        keys = sum(stack.key_widths(p))
        shares = (2 * p.d_q + 2 * p.d_o + 2 * keys) * acc  # a pair's own, before they are added
        if stack.context is not None:  # on the way from process to process: what leaves and what comes
            shares += 2 * (p.d_q + 2 * p.d_o + keys) * stack.dtype.itemsize + 2 * keys * acc
        most = max(most, stack.tile * (own + shares) + min(p.tile, stack.tile) * p.token_bytes)
    return most


def _copies(stack: Stack, forwards: int, backwards: int) -> tuple[int, int]:
    """Bytes in and out. A key tile is fetched for each query tile that sees it, its sums both ways."""
    plan, acc = stack.plans[0], acc_dtype(stack.dtype).itemsize
    tiled, keys = stack.tiled(plan), sum(stack.key_widths(plan))
    tokens, tile = stack.tokens, stack.tile
    pairs = sum(len(tiled.keys_of(i)) for i in range(stack.n_tiles)) * tile
    x, kv = stack.d_model * stack.x_dtype.itemsize, keys * stack.dtype.itemsize
    sums, o = keys * acc, plan.d_o * stack.dtype.itemsize + plan.attend.n_heads * acc
    into = forwards * (tokens * x + pairs * kv) + backwards * (tokens * (3 * x + o) + pairs * (kv + sums))
    out = forwards * tokens * (x + kv + o) + backwards * (tokens * (kv + x) + pairs * sums)
    return into, out
