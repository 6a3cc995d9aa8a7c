"""What a streamed run will take, by arithmetic, before it starts: bytes, FLOPs, copies, time."""

from __future__ import annotations

import dataclasses

from pyckpt.attend.tiled import TiledAttend
from pyckpt.exec.schedule import Advance
from pyckpt.exec.streamed import Stack, store_plan
from pyckpt.measure.units import format_bytes
from pyckpt.ops.chunks import acc_dtype
from pyckpt.store import Store


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step, forward and backward, of a model on a sequence.

    store_bytes: what the store takes, of its `kind`. device_bytes: on the device, above weights and their gradients:
    the ring of tiles, one tile's scratch, one block's float32 gradient sums and those of embedding and head, and the
    store itself where it is there. flops: executed, with all that is made again. bytes_in, bytes_out: copied to and
    from the device, at most.
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


def estimate(
    stack: Stack,
    store: Store,
    block_weights: int,
    end_weights: int,
    vocab: int,
    block_flops: tuple[float, float, float],
) -> Estimate:
    """block_weights, end_weights: the number of one block's weights, and of embedding and head (0 for a stack).

    block_flops: of one block forward, the part of it that its backward repeats, and attention's own share of it.
    """
    plan = store_plan(stack)
    away = stack.device.type == "cuda" if store.kind == "host" else store.kind == "file"
    device = plan.buffer_bytes if away else plan.store_bytes
    device += _scratch(stack) + (block_weights + end_weights) * acc_dtype(stack.dtype).itemsize
    device += min(plan.tile * vocab, _LOGITS.get(stack.device.type, _LOGITS["cuda"])) * 3 * 4
    forward, repeated, attention = block_flops
    head = 6.0 * stack.layout.tokens * stack.d_model * vocab
    steps = list(stack.schedule)
    again = [s for s in stack.schedule.backward if isinstance(s, Advance)]
    walked_back = [s.block for s in steps if not isinstance(s, Advance)]
    remade = sum(not stack.plans[b].save.attention for b in walked_back)
    # Attention's backward has 5 products where its forward has 2.
    back = 2 * (forward - attention) + 2.5 * attention + repeated
    flops = forward * (len(stack.plans) + len(again)) + back * len(walked_back) + attention * remade + head
    bytes_in, bytes_out = _copies(stack, len(stack.plans) + len(again), len(walked_back)) if away else (0, 0)
    return Estimate(store.kind, plan.store_bytes, device, flops, bytes_in, bytes_out)


_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}


def _scratch(stack: Stack) -> int:
    """One tile's scratch in the backward of attention, which is the most, and of the tokenwise parts."""
    acc, most = acc_dtype(stack.dtype).itemsize, 0
    for p in stack.plans:
        own = p.d_q * (3 * stack.dtype.itemsize + 2 * acc) + stack.d_model * stack.x_dtype.itemsize
        shares = (4 * p.d_q + 4 * p.d_kv) * acc  # a pair's own dq, dk, dv, o before they are added
        most = max(most, stack.tile * (own + shares) + min(p.tile, stack.tile) * p.token_bytes)
    return most


def _copies(stack: Stack, forwards: int, backwards: int) -> tuple[int, int]:
    """Bytes in and out. A key tile is fetched for each query tile that sees it, its sums both ways."""
    plan, acc = stack.plans[0], acc_dtype(stack.dtype).itemsize
    tiled = TiledAttend(plan.attend, stack.layout, stack.tile)
    tokens, tile = stack.layout.tokens, stack.tile
    pairs = sum(len(tiled.keys_of(i)) for i in range(stack.n_tiles)) * tile
    x, kv = stack.d_model * stack.x_dtype.itemsize, 2 * plan.d_kv * stack.dtype.itemsize
    sums, o = 2 * plan.d_kv * acc, plan.d_q * stack.dtype.itemsize + plan.attend.n_heads * acc
    into = forwards * (tokens * x + pairs * kv) + backwards * (tokens * (3 * x + o) + pairs * (kv + sums))
    out = forwards * tokens * (x + kv + o) + backwards * (tokens * (kv + x) + pairs * sums)
    return into, out
