"""The Gluon kernels for Hopper to compile ahead of time: every head dim, dtype, mask and order of products."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from triton.experimental.gluon import language as gl

from .. import tuning
from ..hopper import attention_fwd, launch
from ..tuning import Config, Key
from .compile import DTYPES, Arguments, Case, signature

KERNELS = {"hopper_fwd": attention_fwd.attention_fwd_kernel_hopper}
DIMS = (64, 128, 256)
MASKS = ("full", "causal", "window")
_TYPES = {"bfloat16": gl.bfloat16, "float16": gl.float16}


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
        key = Key(self.arch, self.op, self.head_dim, self.head_dim, "half", self.mask, "plain", "tma")
        return self.tried or tuning.lookup(key)

    @property
    def allowed_spill(self) -> int:  # type: ignore[override]
        return 0 if self.head_dim <= 128 else 64

    @property
    def consumers(self) -> int:
        return self.config.block_m // attention_fwd.ROWS.value

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
        types = {n: "*fp32" if n.startswith("p_") else "fp32" if n == "scale" else "i32" for n in names}
        types |= {n: self._descriptor(n) for n in names if n.endswith("_desc")}
        return signature(names, types, self._constants(), set())

    def _descriptor(self, name: str) -> str:
        rows = self.config.block_n if name[0] in "kv" else attention_fwd.ROWS.value
        block = [1, rows, 1, self.head_dim]
        layout = gl.NVMMASharedLayout.get_default_for(block, _TYPES[self.dtype])
        return f"tensordesc<{DTYPES[self.dtype]}{block},{layout!r}>"

    def _constants(self) -> dict[str, Any]:
        sinks = "sinks" in self.features
        return {
            "LEFT": self.mask == "window",
            "RIGHT": self.mask != "full",
            "SINKS": sinks,
            "OVERLAP": self.config.overlap,
            "CONSUMERS": self.consumers,
            "BLOCK_N": self.config.block_n,
            "BLOCK_D": self.head_dim,
            "BLOCK_DV": self.head_dim,
            "STAGES": self.config.num_stages,
            **({} if sinks else {"p_sinks": None}),
        }


def cases(arch: str, quick: bool = False) -> Iterator[HopperCase]:
    """For sm_90 alone. Quick: bf16, causal."""
    if arch != tuning.HOPPER:
        return
    dtypes, masks = (("bfloat16",), ("causal",)) if quick else (tuple(_TYPES), MASKS)
    for op, dim, dtype, mask in itertools.product(KERNELS, DIMS, dtypes, masks):
        case = HopperCase(arch, op, dim, dtype, mask)
        yield case
        if quick:
            continue
        yield dataclasses.replace(case, tried=dataclasses.replace(case.config, overlap=not case.config.overlap))
        if dtype == "bfloat16" and mask == "causal" and op == "hopper_fwd":
            yield dataclasses.replace(case, features=("sinks",))
