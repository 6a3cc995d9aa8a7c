"""The attention kernels to compile ahead of time: every dim, dtype, mask and feature, as the table has them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import triton

from .. import attention_bwd, attention_fwd, tuning
from ..attention_tile import EIGHTS
from ..tuning import Config, Key
from .compile import DTYPES, Arguments, Case, signature

KERNELS = {
    "fwd": attention_fwd.attention_fwd_kernel_tile,
    "dkdv": attention_bwd.attention_bwd_kernel_dkdv,
    "dq": attention_bwd.attention_bwd_kernel_dq,
    "delta": attention_bwd.attention_bwd_kernel_delta,
}
DIMS = ((16, 16), (32, 32), (64, 64), (128, 128), (192, 128), (256, 256))
QUICK_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
MASKS = ("full", "causal", "window")
FEATURES = ("packed", "softcap", "alibi", "dropout", "sinks", "accumulate", "ragged")
_FEATURE_DIMS = (128, 128)
_EIGHTS_DIMS = (72, 72)  # which 8 divides, but 16 does not: Triton has to be told how rows lie in memory

_FLOATS = ("scale", "softcap", "keep_factor")
_FLOAT32 = ("p_lse", "p_delta", "p_dlse", "p_sinks", "p_slopes")


@dataclasses.dataclass(frozen=True)
class AttentionCase(Case):
    """One kernel to compile. Dims are those of the user, not the padded ones."""

    arch: str
    op: str
    head_dim: int
    value_dim: int
    dtype: str
    mask: str
    features: tuple[str, ...] = ()
    tried: Config | None = None  # instead of the table's

    @property
    def name(self) -> str:
        return self.op

    @property
    def kernel(self) -> Any:
        return KERNELS[self.op]

    @property
    def num_warps(self) -> int:
        return self.config.num_warps

    @property
    def num_stages(self) -> int:
        return self.config.num_stages

    @property
    def allowed_spill(self) -> int:  # type: ignore[override]
        return 0 if max(self.head_dim, self.value_dim) <= 128 else 64

    @property
    def matrix_unit(self) -> bool:  # type: ignore[override]
        return self.op != "delta" and self.dtype != "float32"

    @property
    def key(self) -> Key:
        padded = [max(16, triton.next_power_of_2(n)) for n in (self.head_dim, self.value_dim)]
        kind = "float32" if self.dtype == "float32" else "half"
        padding = padded != [self.head_dim, self.value_dim]
        extra = padding or not {"softcap", "alibi", "dropout", "ragged"}.isdisjoint(self.features)
        into = "accumulate" in self.features and self.op != "dkdv"
        score = "extra" if extra else "into" if into else "plain"
        loads = "tma" if {"packed", "pointers"}.isdisjoint(self.features) else "pointers"
        return Key(self.arch, self.op, *padded, kind, self.mask, score, loads)

    @property
    def config(self) -> Config:
        if self.op == "delta":
            return Config(tuning.delta_rows(self.key.value_dim), 0)
        return self.tried or tuning.lookup(self.key)

    @property
    def what(self) -> str:
        dims = str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        return f"{dims:>8} {DTYPES[self.dtype]:5}{'+'.join((self.mask, *self.features)):18}"

    @property
    def tile(self) -> str:
        c = self.config
        return "" if self.op == "delta" else f"{c.block_m}x{c.block_n} {c.num_warps}w {c.num_stages}s"

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": dataclasses.astuple(self.config)}

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        constants = _constants(self)
        types = {name: _type(name, self) for name in names}
        if constants["TMA"]:
            types |= {name: _descriptor(name, self) for name in _STREAMED[self.op]}
        divisible = {n for n in names if n.startswith("stride") or n in ("head_dim", "value_dim")}
        if self.head_dim % 16 or self.value_dim % 16:
            divisible = {n for n in divisible if n.startswith("stride") and not n.endswith("h")}
        return signature(names, types, constants, divisible)


def cases(arch: str, quick: bool = False) -> Iterator[AttentionCase]:
    """Every kernel, dim, dtype and mask; then every feature, at one dim. Quick: the usual dims, bf16, causal."""
    dims, dtypes, masks = (QUICK_DIMS, ("bfloat16",), ("causal",)) if quick else (DIMS, tuple(DTYPES), MASKS)
    for dim, dtype in itertools.product(dims, dtypes):
        for op, mask in itertools.product(("fwd", "dkdv", "dq"), masks):
            case = AttentionCase(arch, op, *dim, dtype, mask)
            parts = ("dk", "dv") if case.config.split else ()
            yield from (dataclasses.replace(case, features=(part,)) for part in parts) if parts else (case,)
            if case.config.tma:  # what tensors get that the copy engine cannot read
                yield dataclasses.replace(case, features=("pointers",))
        yield AttentionCase(arch, "delta", *dim, dtype, "full")
    if quick:
        return
    for op, feature in itertools.product(("fwd", "dkdv", "dq"), FEATURES):
        if feature != "sinks" or op == "fwd":
            yield AttentionCase(arch, op, *_FEATURE_DIMS, "bfloat16", "causal", (feature,))
    for op in KERNELS:
        yield AttentionCase(arch, op, *_EIGHTS_DIMS, "bfloat16", "full" if op == "delta" else "causal")


# What the loop of each kernel goes through, a tile at a time.
_STREAMED = {"fwd": ("p_k", "p_v"), "dkdv": ("p_q", "p_do"), "dq": ("p_k", "p_v"), "delta": ()}


def _descriptor(name: str, case: AttentionCase) -> str:
    rows = case.config.block_m if case.op == "dkdv" else case.config.block_n
    columns = case.key.head_dim if name in ("p_q", "p_k") else case.key.value_dim
    return f"tensordesc<{DTYPES[case.dtype]}[1, {rows}, 1, {columns}]>"


def _type(name: str, case: AttentionCase) -> str:
    if name.startswith("p_cu"):
        return "*i32"
    if name in _FLOAT32 or (name in ("p_dk", "p_dv", "p_dq", "p_o") and "accumulate" in case.features):
        return "*fp32"
    if name.startswith("p_"):
        return f"*{DTYPES[case.dtype]}"
    return "fp32" if name in _FLOATS else "i64" if name == "seed" else "i32"


def _constants(case: AttentionCase) -> dict[str, Any]:
    has = {f: f in case.features for f in (*FEATURES, "pointers", "dk", "dv")}
    config, key = case.config, case.key
    tma = config.tma and not (has["packed"] or has["pointers"])
    constants: dict[str, Any] = {
        "PACKED": has["packed"],
        "LEFT": case.mask == "window",
        "RIGHT": case.mask != "full",
        "SOFTCAP": has["softcap"],
        "ALIBI": has["alibi"],
        "DROPOUT": has["dropout"],
        "SINKS": has["sinks"],
        "ACCUMULATE": has["accumulate"],
        "DLSE": False,
        "PERSISTENT": config.persistent > 0,
        "SPECIALIZE": config.specialize and tma,
        "DK": not (config.split and has["dv"]),
        "DV": not (config.split and has["dk"]),
        "PLAIN_SCALE": not (has["softcap"] or has["alibi"]),
        "PRECISION": config.exact if case.dtype == "float32" else "tf32",
        "TMA": tma,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": key.head_dim,
        "BLOCK_DV": key.value_dim,
        "RAGGED_D": has["ragged"] or _ragged(case.head_dim, key.head_dim),
        "RAGGED_DV": has["ragged"] or _ragged(case.value_dim, key.value_dim),
    }
    absent = {"p_sinks": "sinks", "p_slopes": "alibi", "p_cu_q": "packed", "p_cu_k": "packed"}
    constants |= {name: None for name, feature in absent.items() if not has[feature]}
    return constants | {"p_dlse": None}


def _ragged(dim: int, padded: int) -> int:
    return EIGHTS.value if dim % 16 == 8 else dim != padded
