"""Launchers of the attention kernels: check, allocate, choose the tiles, launch.

Layouts: q (B, Sq, H, D), k (B, Sk, Hkv, D), v (B, Sk, Hkv, Dv), o like q with Dv; lse and delta (B, H, Sq)
float32. Packed, with cu_seqlens (N + 1,) int32: (T, H, D) and (H, T). Any strides with a unit last dim.

Nothing is allocated but the outputs, delta, copies of inputs whose last dim is strided, and, to add to old sums of dK
and dV, what is to be added.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .attention_bwd import attention_bwd_kernel_delta, attention_bwd_kernel_dkdv, attention_bwd_kernel_dq
from .attention_fwd import attention_fwd_kernel_tile
from .attention_tile import EIGHTS
from .rows import exact_float32, on
from .sizes import cdiv, even_part, next_power_of_2
from .tuning import Config, Key

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
HOPPER_DIMS, HOPPER_BACKWARD_DIMS = (64, 128, 256), (64, 128)  # of the kernels of `hopper`


@dataclasses.dataclass(frozen=True)
class Options:
    """What turns q and k into probabilities; see `pyckpt.attention`.

    `window` is (left, right), -1 for no limit. `start` is the position of the first query on the keys' axis
    less that of the first key, and that of the first key (for dropout); None aligns both ends (bottom-right),
    or with `top_left` both starts. `first_sequence` is the number of a dense batch's first sequence (for dropout).
    """

    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float = 1.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout: float = 0.0
    seed: int | None = None
    q_start: int | None = None
    k_start: int = 0
    first_sequence: int = 0
    top_left: bool = False

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def diagonal(self, sq: int, sk: int) -> int:
        """Where the first query of a dense batch stands on the keys' axis."""
        if self.q_start is not None:
            return self.q_start - self.k_start
        return 0 if self.top_left else sk - sq

    @property
    def keys_cu(self) -> Tensor | None:
        return self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k

    @property
    def keep_factor(self) -> float:
        return 1.0 / (1.0 - self.dropout)

    @property
    def threshold(self) -> int:
        return min(round(self.dropout * 2**31), 2**31 - 1)


# --- launchers ----------------------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    into: tuple[Tensor, Tensor] | None = None,
    configs: Mapping[str, Config] | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse). `into` is a running (o, lse) to merge with, in place; `configs` overrides the table, by op."""
    check(q, k, v, options)
    q, k, v = (_unit(t) for t in (q, k, v))
    problem = _Problem.of(q, k, v, options, into is not None, () if into is None else into[:1])
    if into is None:
        o, lse = q.new_empty((*q.shape[:-1], v.shape[-1])), problem.statistics(q)
    else:
        o, lse = into
        _check_running(o, lse, q, v)
        if options.sinks is not None:
            raise ValueError("a running o and lse take no sinks: let lse begin as the sinks instead of -inf")
    if q.shape[-2] == 0 or problem.rows == 0:
        return o, lse
    plain = options.scale > 0 and not options.softcap and options.alibi_slopes is None
    copied = problem.copied(q, k, v)
    hopper = plain and problem.serves_hopper(copied, HOPPER_DIMS)

    def run(config: Config) -> None:
        tiles = problem.tiles(problem.sq, config.block_m)
        if tiles == 0:
            return
        if config.specialize and hopper:
            section = problem.section(problem.sk, problem.groups, tiles)
            launch = problem.hopper(config, tiles, problem.rows, section, options)
            launch.forward((q, k, v, o), lse, options.sinks, accumulate=into is not None)
            return
        tma = config.tma and copied
        attention_fwd_kernel_tile[(problem.programs(config, tiles * problem.rows),)](
            q,
            *(_described((k, v), config.block_n) if tma else (k, v)),
            o,
            lse,
            options.sinks,
            options.alibi_slopes,
            options.cu_seqlens_q,
            options.keys_cu,
            *_strides(q),
            *_strides(k),
            *_strides(v),
            *_strides(o),
            *_stat_strides(lse),
            _slope_stride(options.alibi_slopes),
            problem.heads,
            problem.groups,
            problem.n_sequences,
            problem.rows,
            tiles,
            problem.section(problem.sk, problem.groups, tiles),
            **problem.shared,
            SINKS=options.sinks is not None,
            ACCUMULATE=into is not None,
            PERSISTENT=config.persistent > 0,
            PLAIN_SCALE=plain,
            TMA=tma,
            SPECIALIZE=config.specialize and tma,
            **problem.meta(config),
        )

    op = "hopper_fwd" if hopper and tuning.wants_hopper() else "fwd"
    _launch(problem.key(op, copied), problem.device, run, repeatable=into is None, configs=configs)
    return o, lse


def delta(do: Tensor, o: Tensor, dlse: Tensor | None = None) -> Tensor:
    """rowsum(do * o) - dlse, float32 (B, H, Sq), packed (H, T)."""
    do, o = _unit(do), _unit(o)
    n, heads, dim = o.shape[-3:]
    shape = (heads, n) if o.dim() == 3 else (o.shape[0], heads, n)
    out = torch.empty(shape, dtype=torch.float32, device=o.device)
    if out.numel() == 0:
        return out
    block = max(16, next_power_of_2(dim))
    rows = tuning.delta_rows(block)
    tiles = cdiv(n, rows)
    with on(o.device):
        attention_bwd_kernel_delta[(tiles * (out.numel() // n),)](
            do,
            o,
            dlse,
            out,
            *_strides(do),
            *_strides(o),
            *_stat_strides(out),
            *(
                (0, 0, 0)
                if dlse is None
                else (0 if dlse.dim() == 2 else dlse.stride(0), dlse.stride(-1), dlse.stride(-2))
            ),
            heads,
            tiles,
            n,
            dim,
            DLSE=dlse is not None,
            BLOCK_M=rows,
            BLOCK_DV=block,
            RAGGED_DV=_ragged(dim, block, (do, o)),
            num_warps=4,
        )
    return out


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    options: Options,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    configs: Mapping[str, Config] | None = None,
    only: tuple[str, ...] = ("dkdv", "dq"),
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from lse and delta. `into` are float32 gradients to add to, in place.

    `configs` overrides the table, by op. `only` runs one of the two kernels, to time it.
    """
    check(q, k, v, options)
    do, q, k, v = (_unit(t) for t in (do, q, k, v))
    lse, delta = lse.contiguous(), delta.contiguous()
    problem = _Problem.of(q, k, v, options, into is not None, (do, *(into or ())[:1]))
    if into is None:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    else:
        _check_gradients(into, (q, k, v))
        # Adding to old sums in the kernel would cost dK/dV the registers that its fastest tiles have not; this is a
        # hundredth of its time.
        dq, dk, dv = into[0], *(torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
    if q.shape[-2] == 0 or problem.rows == 0:
        return into or (dq.zero_(), dk.zero_(), dv.zero_())
    strides = [s for t in (q, k, v, do) for s in _strides(t)]
    tables = (options.alibi_slopes, options.cu_seqlens_q, options.keys_cu)
    sizes = problem.heads, problem.groups, problem.n_sequences
    last = (*_stat_strides(lse), _slope_stride(options.alibi_slopes), *sizes)

    queries_copied, keys_copied = problem.copied(q, do), problem.copied(k, v)
    hopper = problem.serves_hopper(queries_copied and keys_copied, HOPPER_BACKWARD_DIMS)

    def run_dkdv(config: Config) -> None:
        rows = problem.rows // problem.groups
        tiles = problem.tiles(problem.sk, config.block_n)
        if tiles == 0:
            return
        section = problem.section(problem.sq * problem.groups, 1, tiles)
        if config.specialize and hopper:
            problem.hopper(config, tiles, rows, section, options).dkdv((q, k, v, do), lse, delta, dk, dv)
            return
        tma = config.tma and queries_copied
        p_q, p_do = _described((q, do), config.block_m) if tma else (q, do)
        for dk_too, dv_too in ((False, True), (True, False)) if config.split else ((True, True),):
            attention_bwd_kernel_dkdv[(tiles * rows,)](
                p_q,
                k,
                v,
                p_do,
                lse,
                delta,
                dk,
                dv,
                *tables,
                *strides,
                *_strides(dk),
                *_strides(dv),
                *last,
                rows,
                tiles,
                section,
                **problem.shared,
                TMA=tma,
                DK=dk_too,
                DV=dv_too,
                **problem.meta(config),
            )

    def run_dq(config: Config) -> None:
        tiles = problem.tiles(problem.sq, config.block_m)
        if tiles == 0:
            return
        section = problem.section(problem.sk, problem.groups, tiles)
        if config.specialize and hopper:
            launch = problem.hopper(config, tiles, problem.rows, section, options)
            launch.dq((q, k, v, do), lse, delta, dq, accumulate=into is not None)
            return
        tma = config.tma and keys_copied
        attention_bwd_kernel_dq[(tiles * problem.rows,)](
            q,
            *(_described((k, v), config.block_n) if tma else (k, v)),
            do,
            lse,
            delta,
            dq,
            *tables,
            *strides,
            *_strides(dq),
            *last,
            problem.rows,
            tiles,
            section,
            **problem.shared,
            ACCUMULATE=into is not None,
            TMA=tma,
            **problem.meta(config),
        )

    asked = "hopper_" if hopper and tuning.wants_hopper() else ""
    if "dkdv" in only:
        key = problem.key(f"{asked}dkdv", queries_copied)
        _launch(key, problem.device, run_dkdv, repeatable=True, configs=configs)
        if into is not None:
            torch._foreach_add_(list(into[1:]), [dk, dv])
    if "dq" in only:
        key = problem.key(f"{asked}dq", keys_copied)
        _launch(key, problem.device, run_dq, repeatable=into is None, configs=configs)
    return into or (dq, dk, dv)


# --- what the launches of one call have in common -----------------------------------------------------------


_GEOMETRY = ("sq", "sk", "diagonal", "left", "right")
_MORE_REGISTERS = ("SOFTCAP", "ALIBI", "DROPOUT", "RAGGED_D", "RAGGED_DV")


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes of one call, and the arguments that all its kernels take by name."""

    arch: str
    dtype: torch.dtype
    device: torch.device
    rows: int  # (batch, query head) pairs; packed tokens are one batch
    heads: int
    groups: int
    sequences: int  # packed sequences; 0 for a dense batch
    n_sequences: int  # what kernels are told: the same, or of a dense batch the first one's number
    sq: int
    sk: int
    row_bytes: int  # of one token's key and value of one head
    mask: str
    score: str
    shared: dict[str, Any]

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, options: Options, accumulate: bool, others: tuple[Tensor, ...] = ()
    ) -> _Problem:
        """`others` of the user's own (B, S, H, D) that a kernel reads or writes."""
        sq, heads, head_dim = q.shape[-3:]
        sk, kv_heads, value_dim = v.shape[-3:]
        offset = options.diagonal(sq, sk)
        left, right = _limits(options.window, sq, sk, offset, options.packed)
        sequences = 0 if options.cu_seqlens_q is None else options.cu_seqlens_q.numel() - 1
        shared = {
            "sq": sq,
            "sk": sk,
            # Packed, each sequence has its own, and this tells how they are aligned.
            "diagonal": int(not options.top_left) if options.packed else offset,
            "k_start": options.k_start,
            "left": max(left, 0),
            "right": max(right, 0),
            "head_dim": head_dim,
            "value_dim": value_dim,
            "scale": options.scale,
            "softcap": options.softcap,
            "keep_factor": options.keep_factor,
            "threshold": options.threshold,
            "seed": options.seed or 0,
            "PACKED": options.packed,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "SOFTCAP": options.softcap != 0.0,
            "ALIBI": options.alibi_slopes is not None,
            "DROPOUT": options.dropout > 0.0,
            **blocks(head_dim, value_dim, (q, k, v, *others)),
        }
        return _Problem(
            arch=tuning.architecture(q.device),
            dtype=q.dtype,
            device=q.device,
            rows=heads * (1 if options.packed else q.shape[0]),
            heads=heads,
            groups=heads // kv_heads,
            sequences=sequences,
            n_sequences=sequences or options.first_sequence,
            sq=sq,
            sk=sk,
            row_bytes=(head_dim + value_dim) * q.element_size(),
            mask="window" if left >= 0 else "causal" if right >= 0 else "full",
            score="extra" if any(shared[f] for f in _MORE_REGISTERS) else "into" if accumulate else "plain",
            shared=shared,
        )

    def statistics(self, q: Tensor) -> Tensor:
        shape = (self.heads, self.sq) if q.dim() == 3 else (q.shape[0], self.heads, self.sq)
        return q.new_empty(shape, dtype=torch.float32)

    def tiles(self, n: int, block: int) -> int:
        """Tiles of one row's axis; packed, the slots that `find_sequence` counts."""
        return n // block + self.sequences if self.sequences else cdiv(n, block)

    def programs(self, config: Config, tiles: int) -> int:
        """Programs to launch for so many tiles."""
        return min(tiles, config.persistent * tuning.multiprocessors(self.device)) if config.persistent else tiles

    def section(self, n: int, heads: int, tiles: int) -> int:
        """Rows whose n tokens of two tensors fill at most half the L2 cache, in multiples of the heads that share them.

        All sections are about as long, and of at least some two tiles for each multiprocessor, `tiles` being a row's: a
        last one of fewer can't keep the GPU busy while its first, the longest, is computed (`bench/schedule.py`).
        """
        fit = tuning.l2_bytes(self.device) // 2 // max(1, n * self.row_bytes)
        busy = cdiv(2 * tuning.multiprocessors(self.device), max(1, heads * tiles))
        return heads * even_part(self.rows // self.groups, max(fit, busy))  # kernels multiply it by tiles, in 32 bits

    def copied(self, *tensors: Tensor) -> bool:
        """Whether the copy engine may bring these (B, S, H, D): it wants multiples of 16 bytes, and no empty dim."""
        return (
            not self.sequences
            and all(t.numel() and t.data_ptr() % 16 == 0 for t in tensors)
            and all(s > 0 and s * t.element_size() % 16 == 0 for t in tensors for s in t.stride()[:-1])
        )

    def serves_hopper(self, copied: bool, dims: tuple[int, ...]) -> bool:
        """Whether the kernels of `hopper` take this call."""
        head_dim, value_dim = self.shared["head_dim"], self.shared["value_dim"]
        half = self.dtype != torch.float32
        usual = half and self.score != "extra" and head_dim == value_dim and head_dim in dims
        return self.arch == tuning.HOPPER and usual and copied

    def hopper(self, config: Config, tiles: int, rows: int, section: int, options: Options) -> Any:
        """A launch of one of them. Imported where it is used: Gluon is of no use elsewhere."""
        from .hopper.launch import Launch

        numbers = (self.heads, self.groups, rows, tiles, section, *(self.shared[n] for n in _GEOMETRY))
        sides = (self.shared["LEFT"], self.shared["RIGHT"])
        return Launch(config, self.programs(config, tiles * rows), numbers, *sides, options.scale)

    def meta(self, config: Config) -> dict[str, Any]:
        """What a configuration decides."""
        exact = self.dtype == torch.float32 and exact_float32()
        return {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            # Half precision ignores it. Else TF32 only where the user allows it for matrix products.
            "PRECISION": config.exact if exact else "tf32",
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,  # Triton's default is going to change
        }

    def key(self, op: str, copied: bool) -> Key:
        dtype = "float32" if self.dtype == torch.float32 else "half"
        score = "plain" if op.endswith("dkdv") and self.score == "into" else self.score
        loads = "tma" if copied else "pointers"
        return Key(self.arch, op, self.shared["BLOCK_D"], self.shared["BLOCK_DV"], dtype, self.mask, score, loads)


def blocks(head_dim: int, value_dim: int, rows: tuple[Tensor, ...]) -> dict[str, Any]:
    """The padded dims and whether they are padded: a kernel's tile has a power of two of columns, at least 16."""
    d, dv = (max(16, next_power_of_2(n)) for n in (head_dim, value_dim))
    ragged = (_ragged(head_dim, d, rows), _ragged(value_dim, dv, rows))
    return {"BLOCK_D": d, "BLOCK_DV": dv, "RAGGED_D": ragged[0], "RAGGED_DV": ragged[1]}


def _ragged(dim: int, padded: int, rows: tuple[Tensor, ...]) -> int:
    """Whether a tile has columns too many; `EIGHTS` where these rows are aligned and Triton could not see it."""
    return EIGHTS.value if dim % 16 == 8 and all(map(_starts_at_16, rows)) else dim != padded


def _starts_at_16(t: Tensor) -> bool:
    """Whether each row of each head is at a multiple of 16 bytes."""
    return t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])


def _limits(window: tuple[int, int], sq: int, sk: int, offset: int, packed: bool) -> tuple[int, int]:
    """The window with -1 for a side that hides nothing, and the others small enough for int32 arithmetic."""
    left, right = window
    if packed:
        last = max(sq, sk)
        return (-1 if left >= last else left), (-1 if right >= last else right)
    left = -1 if left >= offset + sq - 1 else left
    right = -1 if right >= sk - 1 - offset else right
    return left, right


def _launch(
    key: Key,
    device: torch.device,
    run: Callable[[Config], None],
    *,
    repeatable: bool,
    configs: Mapping[str, Config] | None,
) -> None:
    given = configs.get(key.op) if configs else None
    with on(device):
        run(given or tuning.configured(key, run, repeatable))


def _unit(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _described(tensors: tuple[Tensor, ...], rows: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors of (B, S, H, D) for tiles of `rows` tokens of one head, the head dim padded."""
    return tuple(
        TensorDescriptor(t, list(t.shape), list(t.stride()), [1, rows, 1, max(16, next_power_of_2(t.shape[-1]))])
        for t in tensors
    )


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of the batch (0 if packed), the sequence and the head."""
    return (0, t.stride(0), t.stride(1)) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


def _stat_strides(t: Tensor) -> tuple[int, int]:
    """Of the batch (0 if packed) and the head; the sequence's is 1."""
    return (0, t.stride(0)) if t.dim() == 2 else (t.stride(0), t.stride(1))


def _slope_stride(slopes: Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


# --- checks, before anything is launched --------------------------------------------------------------------


def unsupported(dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernels cannot take this dtype and these head dims, or None."""
    if dtype not in DTYPES:
        return f"dtype {dtype}: the Triton attention kernels take float16, bfloat16 and float32"
    for name, n in (("head dim", head_dim), ("value head dim", value_dim)):
        if not 1 <= n <= MAX_HEAD_DIM:
            return f"{name} {n}: the Triton attention kernels take 1 to {MAX_HEAD_DIM}"
    return None


def check(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Raise ValueError for what the kernels cannot take."""
    rank = 3 if options.packed else 4
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != rank:
            raise ValueError(f"{name} must have {rank} dims{' (packed)' if rank == 3 else ''}, got {tuple(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{name} is {t.dtype} on {t.device}; expected q's {q.dtype} on {q.device}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or (rank == 4 and q.shape[0] != k.shape[0]):
        raise ValueError(f"q, k, v do not fit together: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[-2]} heads, which is no multiple of the {k.shape[-2]} key/value heads")
    if reason := unsupported(q.dtype, q.shape[-1], v.shape[-1]):
        raise ValueError(reason)
    if q.device.type != "cuda" and not tuning.interpreted():
        raise ValueError(f"q is on {q.device}; Triton kernels run on CUDA, or on the CPU under TRITON_INTERPRET=1")
    _check_options(q, k, options)


def _check_options(q: Tensor, k: Tensor, options: Options) -> None:
    heads = q.shape[-2]
    if min(options.window) < -1:
        raise ValueError(f"window sides must be -1 (no limit) or more, got {options.window}")
    if not (math.isfinite(options.scale) and 0 <= options.softcap < math.inf):
        raise ValueError(
            f"scale and softcap must be finite and softcap not negative, got {options.scale}, {options.softcap}"
        )
    if not 0.0 <= options.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {options.dropout}")
    if options.dropout and options.seed is None:
        raise ValueError("dropout needs a seed: an int, the same in the forward and the backward")
    if options.packed and options.q_start is not None:
        raise ValueError("q_start is for dense tiles; packed sequences are aligned by their lengths")
    if options.sinks is not None and tuple(options.sinks.shape) != (heads,):
        raise ValueError(f"sinks must be ({heads},), one for each query head, got {tuple(options.sinks.shape)}")
    batch = q.shape[0] if options.cu_seqlens_q is None else options.cu_seqlens_q.numel() - 1
    slopes = options.alibi_slopes
    if slopes is not None and tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"alibi_slopes must be ({heads},) or ({batch}, {heads}), got {tuple(slopes.shape)}")
    for name, t in (("sinks", options.sinks), ("alibi_slopes", slopes)):
        if t is not None and (t.device != q.device or t.stride(-1) != 1):
            raise ValueError(f"{name} must be contiguous on {q.device}, got strides {t.stride()} on {t.device}")
    for name, cu in (("cu_seqlens_q", options.cu_seqlens_q), ("cu_seqlens_k", options.keys_cu)):
        if cu is not None and (cu.dtype != torch.int32 or cu.dim() != 1 or cu.device != q.device or cu.stride(0) != 1):
            raise ValueError(f"{name} must be contiguous int32 (N + 1,) on {q.device}, got {cu.dtype} on {cu.device}")
    if max(q.shape[-3], k.shape[-3]) >= 2**30:
        raise ValueError(f"sequences of {max(q.shape[-3], k.shape[-3])} tokens; the kernels count to {2**30 - 1}")


def _check_running(o: Tensor, lse: Tensor, q: Tensor, v: Tensor) -> None:
    shape = (*q.shape[:-1], v.shape[-1])
    statistics = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    if tuple(o.shape) != shape or o.stride(-1) != 1 or o.dtype != torch.float32:
        raise ValueError(
            f"the running o must be float32 {shape} with a unit last stride, got {o.dtype} {tuple(o.shape)}"
        )
    if tuple(lse.shape) != statistics or lse.dtype != torch.float32 or lse.stride(-1) != 1:
        raise ValueError(
            f"the running lse must be float32 {statistics} with a unit last stride, got {lse.dtype} {tuple(lse.shape)}"
        )


def _check_gradients(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    for name, g, t in zip(("dq", "dk", "dv"), grads, inputs, strict=True):
        if g.shape != t.shape or g.stride(-1) != 1 or g.dtype != torch.float32:
            raise ValueError(
                f"{name} to add to must be float32 {tuple(t.shape)}, its last stride 1, got {g.dtype} {tuple(g.shape)}"
            )
