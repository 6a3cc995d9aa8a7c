"""The Gluon kernels for Hopper to compile ahead of time: every head dim, dtype, mask and order of products."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .. import tuning
from ..hopper import attention_bwd, attention_fwd, launch
from ..hopper.parts import ROWS
from ..tuning import Config, Key
from .compile import DTYPES, Arguments, Case, signature

KERNELS = {
    "hopper_fwd": attention_fwd.attention_fwd_kernel_hopper,
    "hopper_dkdv": attention_bwd.attention_bwd_kernel_dkdv_hopper,
    "hopper_dq": attention_bwd.attention_bwd_kernel_dq_hopper,
}
DIMS = {"hopper_fwd": (64, 128, 256), "hopper_dkdv": (64, 128), "hopper_dq": (64, 128)}
MASKS = ("full", "causal", "window")
_TYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class HopperCase(Case):
    """One kernel to compile."""

    arch: str
    op: str
    head_dim: int
    dtype: str
    mask: str
    features: tuple[str, ...] = ()
    tried: Config | None = None  # instead of the table's
    matrix_unit = True
    gluon = True

    @property
    def config(self) -> Config:
        score = "into" if "into" in self.features and self.op != "hopper_dkdv" else "plain"
        key = Key(self.arch, self.op, self.head_dim, self.head_dim, "half", self.mask, score, "tma")
        return self.tried or tuning.lookup(key)

    @property
    def allowed_spill(self) -> int:  # type: ignore[override]
        # What gradients spill is read again once a tile, outside the loops: those may spill nothing (`Report.looped`).
        if self.op != "hopper_fwd":
            return 160 if self.op == "hopper_dkdv" else 80
        return 0 if self.head_dim <= 128 else 64

    @property
    def overlapping(self) -> int:
        overlaps = self.op == "hopper_dq" or (self.op == "hopper_fwd" and self.config.overlap)
        return self.config.block_n * ROWS.value // (32 * launch.WARPS) if overlaps else 0

    @property
    def consumers(self) -> int:
        return (self.config.block_n if self.op == "hopper_dkdv" else self.config.block_m) // ROWS.value

    @property
    def name(self) -> str:
        return self.op

    @property
    def kernel(self) -> Any:
        return KERNELS[self.op]

    @property
    def num_warps(self) -> int:
        return launch.WARPS

    @property
    def all_warps(self) -> int:
        return launch.WARPS * (1 + self.consumers)

    @property
    def what(self) -> str:
        return f"{self.head_dim:>8} {DTYPES[self.dtype]:5}{'+'.join((self.mask, *self.features)):18}"

    @property
    def tile(self) -> str:
        c = self.config
        return f"{c.block_m}x{c.block_n} {c.num_stages}s{' over' if c.overlap else ''}"

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": dataclasses.astuple(self.config)}

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        into = "into" in self.features  # gradients in float32
        half = () if into else ("p_dq", "p_dk", "p_dv")
        types = {n: "*fp32" if n.startswith("p_") else "fp32" if n == "scale" else "i32" for n in names}
        types |= dict.fromkeys(half, f"*{DTYPES[self.dtype]}")
        types |= {n: self._descriptor(n) for n in names if n.endswith("_desc")}
        # As the launch sees them: these are of tensors of its own, whose rows are whole heads.
        aligned = {n for n in names if n.startswith("stride_") and n not in ("stride_lb", "stride_lh")}
        return signature(names, types, self._constants(), aligned)

    def _descriptor(self, name: str) -> str:
        keys, queries = self.config.block_n, self.config.block_m
        of_keys, of_queries = (ROWS.value, queries) if self.op == "hopper_dkdv" else (keys, ROWS.value)
        rows = of_keys if name[0] in "kv" else of_queries
        layout = launch.shared_layout(rows, self.head_dim, getattr(torch, self.dtype))
        return f"tensordesc<{DTYPES[self.dtype]}{[1, rows, 1, self.head_dim]},{layout!r}>"

    def _constants(self) -> dict[str, Any]:
        sinks = "sinks" in self.features
        return {
            "LEFT": self.mask == "window",
            "RIGHT": self.mask != "full",
            "SINKS": sinks,
            "OVERLAP": self.config.overlap,
            "ACCUMULATE": "into" in self.features,
            "CONSUMERS": self.consumers,
            "BLOCK_M": self.config.block_m,
            "BLOCK_N": self.config.block_n,
            "BLOCK_D": self.head_dim,
            "STAGES": self.config.num_stages,
            **({} if sinks else {"p_sinks": None}),
            **({"o_desc": None} if "into" in self.features else {"p_o": None}),
        }


def cases(arch: str, quick: bool = False) -> Iterator[HopperCase]:
    """For sm_90 alone. Quick: bf16, causal."""
    if arch != tuning.HOPPER:
        return
    dtypes, masks = (("bfloat16",), ("causal",)) if quick else (_TYPES, MASKS)
    for op, dtype, mask in itertools.product(KERNELS, dtypes, masks):
        yield from (case for dim in DIMS[op] for case in _cases(HopperCase(arch, op, dim, dtype, mask), quick))


def _cases(case: HopperCase, quick: bool) -> Iterator[HopperCase]:
    """Of one kernel, dim, dtype and mask."""
    yield case
    if quick:
        return
    if case.op == "hopper_fwd":
        yield dataclasses.replace(case, tried=dataclasses.replace(case.config, overlap=not case.config.overlap))
    if case.dtype == "bfloat16" and case.mask == "causal":
        yield dataclasses.replace(case, features=("into",))
        if case.op == "hopper_fwd":
            yield dataclasses.replace(case, features=("sinks",))
