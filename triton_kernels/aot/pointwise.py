"""The row-wise and pointwise kernels (norms to merging) to compile ahead of time: widths, dtypes, forms of models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from .. import activation, attention_merge, dropout, norm, norm_bwd, rope
from ..rows import warps
from .compile import DTYPES, Arguments, Case, signature

# Head dims of QK-norm, widths of models, the widest a program holds at once, and some that it does not.
WIDTHS = (64, 128, 1024, 4096, 5120, 8192, 12288, 16384, 32768)
HEAD_DIMS = (64, 80, 128, 256)
# (φ, gated): SwiGLU, GeGLU and its tanh form, GELU and its tanh form, ReLU²
MLPS = (("silu", True), ("gelu", True), ("gelu_tanh", True), ("gelu", False), ("gelu_tanh", False), ("relu2", False))
QUICK_WIDTHS = (128, 4096)
_STATISTICS = ("p_mean", "p_rstd", "p_dw", "p_db")


def _types(names: list[str], dtype: str) -> dict[str, str]:
    """Pointers to the dtype, and ints."""
    return {n: f"*{DTYPES[dtype]}" if n.startswith("p_") else "i32" for n in names}


@dataclasses.dataclass(frozen=True)
class NormCase(Case):
    """`centered`: LayerNorm with a bias, else RMSNorm. `residual`: x + residual (forward), add to dx (backward)."""

    arch: str
    backward: bool
    width: int
    dtype: str
    centered: bool = False
    residual: bool = False

    @property
    def name(self) -> str:
        return f"{'layer' if self.centered else 'rms'}_{'bwd' if self.backward else 'fwd'}"

    @property
    def what(self) -> str:
        return f"{self.width:>8} {DTYPES[self.dtype]:5}{'residual' if self.residual else ''}"

    @property
    def kernel(self) -> Any:
        return norm_bwd.norm_bwd_kernel_rows if self.backward else norm.norm_fwd_kernel_rows

    @property
    def _plan(self) -> dict[str, Any]:
        size = 4 if self.dtype == "float32" else 2
        if self.backward:
            return norm_bwd.plan_of(self.width, size, self.centered, self.residual, self.arch).constants()
        names = ("ROWS", "COLUMNS", "WIDE")
        plan = dict(zip(names, norm.tile(self.width, norm.FORWARD_COLUMNS), strict=True))
        return plan | {"num_warps": warps(plan["ROWS"] * plan["COLUMNS"])}

    @property
    def num_warps(self) -> int:
        return self._plan["num_warps"]

    @property
    def resident(self) -> int:
        return norm_bwd.WARPS // self.num_warps if self.backward else 0

    @property
    def tile(self) -> str:
        return f"{self._plan['ROWS']}x{self._plan['COLUMNS']} {self.num_warps}w"

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        kinds = _types(names, self.dtype)
        kinds |= dict.fromkeys(_STATISTICS, "*fp32")
        constants: dict[str, Any] = {"EPS": 1e-5, "CENTERED": self.centered, "ADD": self.residual, **self._plan}
        if not self.centered:
            constants |= {"p_b": None, "p_mean": None, "p_db": None}
        if not self.residual:
            constants |= {"p_res": None, "p_sum": None}
        return signature(names, kinds, constants, {n for n in names if n.startswith("stride") or n == "width"})


@dataclasses.dataclass(frozen=True)
class ActivationCase(Case):
    arch: str
    backward: bool
    function: str
    gated: bool
    dtype: str

    @property
    def name(self) -> str:
        return "act_bwd" if self.backward else "act_fwd"

    @property
    def what(self) -> str:
        return f"{'':>8} {DTYPES[self.dtype]:5}{self.function}{' gated' if self.gated else ''}"

    @property
    def kernel(self) -> Any:
        return activation.glu_bwd_kernel if self.backward else activation.glu_fwd_kernel

    @property
    def num_warps(self) -> int:
        return activation.WARPS

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        kinds = _types(names, self.dtype)
        constants: dict[str, Any] = {"FUNCTION": self.function, "BLOCK": activation.BLOCK}
        if not self.gated:
            constants |= {"p_up": None, "p_dup": None}
        return signature(names, kinds, constants, {n for n in names if n.startswith("stride") or n == "width"})


@dataclasses.dataclass(frozen=True)
class RopeCase(Case):
    arch: str
    head_dim: int
    dtype: str
    interleaved: bool = False
    tail: int = 0
    together: bool = False  # q and k in one launch

    @property
    def name(self) -> str:
        return "rope"

    @property
    def what(self) -> str:
        forms = {"interleaved": self.interleaved, f"tail {self.tail}": self.tail, "q and k": self.together}
        form = "+".join(form for form, there in forms.items() if there)
        return f"{self.head_dim:>8} {DTYPES[self.dtype]:5}{form}"

    @property
    def kernel(self) -> Any:
        return rope.rope_kernel

    @property
    def num_warps(self) -> int:
        return rope.WARPS

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        kinds = _types(names, self.dtype)
        kinds |= {"p_cos": "*fp32", "p_sin": "*fp32"}
        half = (self.head_dim - self.tail) // 2
        count, columns = rope.tile(half)
        constants = {
            "INVERSE": True,
            "INTERLEAVED": self.interleaved,
            "COPY_TAIL": self.tail > 0,
            "TOKENS": count,
            "HEADS": rope.HEADS,
            "COLUMNS": columns,
            "TAIL": max(1, self.tail),
            **({} if self.together else {"p_k": None}),
        }
        divisible = {n for n in names if n.startswith("stride")} | ({"half"} if half % 16 == 0 else set())
        return signature(names, kinds, constants, divisible)


@dataclasses.dataclass(frozen=True)
class DropoutCase(Case):
    arch: str
    dtype: str
    residual: bool

    @property
    def name(self) -> str:
        return "dropout"

    @property
    def what(self) -> str:
        return f"{'':>8} {DTYPES[self.dtype]:5}{'residual' if self.residual else ''}"

    @property
    def kernel(self) -> Any:
        return dropout.dropout_kernel

    @property
    def num_warps(self) -> int:
        return dropout.WARPS

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        kinds = _types(names, self.dtype) | {"first": "i64", "seed": "i64"}
        constants: dict[str, Any] = {"KEEP_FACTOR": 1.0 / 0.9, "BLOCK": dropout.BLOCK}
        if not self.residual:
            constants["p_res"] = None
        return signature(names, kinds, constants, {n for n in names if n.startswith("stride") or n == "width"})


@dataclasses.dataclass(frozen=True)
class MergeCase(Case):
    """`wide`: into a running sum in float32."""

    arch: str
    head_dim: int
    dtype: str
    wide: bool

    @property
    def name(self) -> str:
        return "merge"

    @property
    def what(self) -> str:
        return f"{self.head_dim:>8} {DTYPES[self.dtype]:5}{'into fp32' if self.wide else ''}"

    @property
    def kernel(self) -> Any:
        return attention_merge.attention_merge_kernel

    @property
    def num_warps(self) -> int:
        return attention_merge.WARPS

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        kinds = _types(names, self.dtype) | {"p_lse": "*fp32", "p_part_lse": "*fp32"}
        if self.wide:
            kinds["p_o"] = "*fp32"
        count, columns = attention_merge.tile(self.head_dim)
        divisible = {n for n in names if n.startswith(("stride_o", "stride_p"))} | {"dim"}
        return signature(names, kinds, {"TOKENS": count, "COLUMNS": columns}, divisible)


def cases(arch: str, quick: bool = False) -> Iterator[Case]:
    """Every width, dtype and form. Quick: bf16, the usual widths."""
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float32")  # float16 is loaded and rounded as bfloat16 is
    both = (False, True)
    for width, dtype in itertools.product(QUICK_WIDTHS if quick else WIDTHS, dtypes):
        for backward, centered, residual in itertools.product(both, both, both):
            yield NormCase(arch, backward, width, dtype, centered, residual)
    for (function, gated), dtype, backward in itertools.product(MLPS, dtypes, both):
        yield ActivationCase(arch, backward, function, gated, dtype)
    for head_dim, dtype, interleaved in itertools.product((128,) if quick else HEAD_DIMS, dtypes, both):
        yield RopeCase(arch, head_dim, dtype, interleaved)
    for dtype, residual in itertools.product(dtypes, both):
        yield DropoutCase(arch, dtype, residual)
    for head_dim, dtype in itertools.product((128,) if quick else HEAD_DIMS, dtypes):
        for wide in both if dtype != "float32" else (False,):
            yield MergeCase(arch, head_dim, dtype, wide)
    if not quick:
        yield RopeCase(arch, 128, "bfloat16", tail=64)
        yield RopeCase(arch, 128, "bfloat16", together=True)
