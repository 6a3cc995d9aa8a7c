"""The fused products to compile ahead of time: every op, dtype and form, with the tiles that the table has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..fused import choice, dgrad, linear, mlp, qk_finish_bwd, qkv, statistics, wgrad
from ..fused.tiles import GROUP
from .compile import DTYPES, Arguments, Case, signature

KERNELS = {
    "qkv": qkv.qkv_fwd_kernel_heads,
    "qk_finish": qkv.qk_finish_kernel_heads,
    "qk_bwd": qk_finish_bwd.qk_finish_bwd_kernel_heads,
    "mlp_fwd": mlp.mlp_fwd_kernel_hidden,
    "mlp_bwd": mlp.mlp_bwd_kernel_hidden,
    "residual": linear.residual_kernel_tile,
    "delta": linear.delta_kernel_heads,
    "wgrad": wgrad.wgrad_kernel_tile,
    "dgrad": dgrad.dgrad_kernel_tile,
    "statistics": statistics.statistics_kernel_rows,
    "merge": statistics.statistics_kernel_merge,
}
_POINTWISE = ("qk_finish", "qk_bwd", "statistics", "merge")
# Which op of the table a kernel takes its tile from.
_OPS = {
    "mlp_fwd": "mlp",
    "mlp_bwd": "mlp",
    "qk_finish": "qkv",
    "qk_bwd": "qkv",
    "statistics": "residual",
    "merge": "residual",
}
_FLOAT32 = {"p_mean", "p_rstd", "p_shares", "p_delta", "p_cos", "p_sin", "p_dw"}
# Pointers that a form leaves out, by the features that bring them.
_OPTIONAL = {
    "layernorm": ("p_mean", "p_norm_bias"),
    "bias": ("p_bq", "p_bk", "p_bv", "p_gate_b", "p_up_b", "p_bias"),
    "qk_norm": ("p_q_norm", "p_k_norm"),
    "raw": ("p_raw_q", "p_raw_k"),
    "kept": ("p_gate", "p_up"),
    "third": ("p_d2", "p_w2"),
    "statistics": ("p_shares",),
}
FUNCTIONS = {"swiglu": "silu", "geglu_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}


@dataclasses.dataclass(frozen=True)
class FusedCase(Case):
    """`shape` as in `choice.Key`; kind is the MLP's, for its kernels; head_dim is for those that go by heads."""

    arch: str
    op: str
    dtype: str
    features: tuple[str, ...] = ()
    kind: str = "swiglu"
    head_dim: int = 128
    shape: str = "wide"
    fp_fusion = False

    @property
    def name(self) -> str:
        return self.op

    @property
    def what(self) -> str:
        kind = self.kind if self.op.startswith("mlp") else str(self.head_dim) if self.op in _BY_HEAD else ""
        return f"{'':>3} {DTYPES[self.dtype]:5}{' '.join((kind, *self.features))}"[:33]

    @property
    def kernel(self) -> Any:
        return KERNELS[self.op]

    @property
    def config(self) -> choice.Config:
        kind = "float32" if self.dtype == "float32" else "half"
        return choice.config(choice.Key(self.arch, _OPS.get(self.op, self.op), kind, self.shape))

    @property
    def num_warps(self) -> int:
        return 4 if self.op in _POINTWISE else self.config.num_warps

    @property
    def num_stages(self) -> int:
        return 1 if self.op in _POINTWISE else self.config.num_stages

    @property
    def matrix_unit(self) -> bool:  # type: ignore[override]
        return self.op not in _POINTWISE and self.dtype != "float32"

    @property
    def tile(self) -> str:
        if self.op in _POINTWISE:
            return f"{self.num_warps}w"
        c = self.config
        return f"{c.block_m}x{c.block_n}x{c.block_k} {c.num_warps}w{c.num_stages}"

    @property
    def resident(self) -> int:
        size = 4 if self.dtype == "float32" else 2
        return qk_finish_bwd.resident(size, self.head_dim) if self.op == "qk_bwd" else 0

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        pointer = f"*{DTYPES[self.dtype]}"
        types = {n: ("*fp32" if n in _FLOAT32 else pointer) if n.startswith("p_") else "i32" for n in names}
        if self.op == "wgrad":
            types["p_out"] = "*fp32"  # the accumulator
        constants = self._constants()
        for feature, pointers in _OPTIONAL.items():
            if feature not in self.features:
                constants |= dict.fromkeys(pointers)
        if self.op.startswith("mlp") and self.kind in ("gelu", "relu2"):
            constants |= dict.fromkeys(("p_gate_w", "p_gate_b", "p_dgate", "p_gate"))
        divisible = {n for n in names if n.startswith(("stride", "d_out")) or n in ("width", "d_ff")}
        return signature(names, types, constants, divisible)

    def _constants(self) -> dict[str, Any]:
        c = self.config
        found: dict[str, Any] = {
            "FUNCTION": FUNCTIONS[self.kind],
            "CENTERED": "layernorm" in self.features,
            "RAGGED": "ragged" in self.features,
            "ADD": True,
            "PRECISION": c.exact if self.dtype == "float32" else "tf32",
            "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n,
            "BLOCK_K": c.block_k,
            "GROUP": GROUP,
            "EPS": 1e-5,
            "COLUMNS": statistics.COLUMNS,
        }
        if self.op in ("qkv", "qk_finish"):
            found |= qkv.Finish(self.head_dim, interleaved="interleaved" in self.features).constants(c.block_n)
            found["BLOCK_M"] = c.rows(2 * found["HALF"]) if self.op == "qkv" else qkv.FINISH_ROWS
        elif self.op == "qk_bwd":
            found |= qkv.Finish(self.head_dim, interleaved="interleaved" in self.features).pairing()
            found |= {"HEADS": qk_finish_bwd.HEADS, "BLOCK_M": qk_finish_bwd.tokens_of(found["HALF"])}
            if "partial" in self.features:
                found["ROTATED"] = self.head_dim // 2
        elif self.op == "delta":
            found |= {"HEAD_DIM": self.head_dim, "DIM": self.head_dim, "HEADS": max(1, c.block_n // self.head_dim)}
            found["BLOCK_M"] = c.rows(self.head_dim)
        elif self.op in _POINTWISE:
            found |= {"ROWS": statistics.ROWS if self.op == "statistics" else statistics.MERGED}
        if self.op in ("residual", "statistics"):
            found |= {"LEVELS": statistics.LEVELS}
        return found


_BY_HEAD = ("qkv", "qk_finish", "qk_bwd", "delta")


def cases(arch: str, quick: bool = False) -> Iterator[Case]:
    """Every kernel in its usual forms; not quick: every dtype, activation, head dim and feature."""
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        for op in KERNELS:
            for features in _forms(op, quick):
                kinds = ("swiglu",) if quick or not op.startswith("mlp") else tuple(FUNCTIONS)
                dims = (128,) if quick or op not in _BY_HEAD else (64, 128, 256)
                for kind in kinds:
                    for dim in dims:
                        yield FusedCase(arch, op, dtype, features, kind, dim)


def _forms(op: str, quick: bool) -> tuple[tuple[str, ...], ...]:
    """Features that are compiled together."""
    usual: dict[str, tuple[tuple[str, ...], ...]] = {
        "qkv": (("qk_norm", "raw"),),
        "qk_finish": (("qk_norm",),),
        "residual": (("statistics",),),
        "merge": (("statistics",),),
        "dgrad": (("third",),),
    }
    rest: dict[str, tuple[tuple[str, ...], ...]] = {
        "qkv": ((), ("interleaved", "bias"), ("layernorm", "bias", "ragged")),
        "qk_finish": (("qk_norm", "interleaved"),),
        "qk_bwd": (("interleaved",), ("partial",)),
        "mlp_fwd": (("kept",), ("layernorm", "bias", "ragged")),
        "mlp_bwd": (("kept",), ("layernorm", "bias", "ragged")),
        "residual": ((), ("statistics", "layernorm", "bias", "ragged")),
        "delta": (("ragged",),),
        "wgrad": (("layernorm", "ragged"),),
        "dgrad": ((), ("third", "ragged")),
        "statistics": (("layernorm",),),
        "merge": (("statistics", "layernorm"),),
    }
    return usual.get(op, ((),)) + (() if quick else rest.get(op, ()))
