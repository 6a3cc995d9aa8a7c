"""How fast a fused product has to be to pay on an H100, by arithmetic, beside what the compiler made of it.

    python bench/fused_static.py    # compiles for sm_90, needs no GPU; writes bench/results/fused_static.json

For Llama-8B's widths in bf16, a token at a time. A fused kernel saves the passes over memory that stand around the
library's product, and runs the product itself at its own rate: it pays where that rate, as a share of the library's,
is above products / (products + passes). Both rates are assumed, and printed.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common

D_MODEL, D_Q, D_KV, D_FF = 4096, 4096, 1024, 14336
LIBRARY_TFLOPS, BANDWIDTH_TBS = 650, 3.0
_BF16 = 2


@dataclasses.dataclass(frozen=True)
class Op:
    """Weights that its products read, and values a token whose passes over memory it saves."""

    name: str
    weights: int
    saved_values: int
    saves: str

    @property
    def break_even(self) -> float:
        products = 2 * self.weights / (LIBRARY_TFLOPS * 1e12)
        passes = self.saved_values * _BF16 / (BANDWIDTH_TBS * 1e12)
        return products / (products + passes)


OPS = (
    Op(
        "qkv",
        D_MODEL * (D_Q + 2 * D_KV),
        D_MODEL + 2 * (D_Q + D_KV),
        "norm(x) written; q and k read and written by RoPE",
    ),
    Op("residual", D_Q * D_MODEL, D_MODEL, "mid read for its statistics"),
    Op("mlp, forward", 2 * D_MODEL * D_FF, D_MODEL + 3 * D_FF, "norm(x) written; gate, up read, activation written"),
    Op(
        "mlp, backward",
        3 * D_MODEL * D_FF,
        D_MODEL + 6 * D_FF,
        "norm(x) written; gate, up and their gradients' factor written and read",
    ),
    Op("delta", D_Q * D_MODEL, 2 * D_Q, "do and o read"),
    Op("dgrad of q, k, v", D_MODEL * (D_Q + 2 * D_KV), 4 * D_MODEL, "their sum read and written twice"),
    Op("dgrad of gate, up", 2 * D_MODEL * D_FF, 2 * D_MODEL, "their sum read and written once"),
    Op(
        "dx of q, k, v in an epilogue",
        D_MODEL * (D_Q + 2 * D_KV),
        2 * D_MODEL - 2 * D_KV,
        "not built: dh written and read, less v and dv read",
    ),
    Op("dx of gate, up in an epilogue", 2 * D_MODEL * D_FF, 2 * D_MODEL, "not built: dh written and read"),
)


def kernels() -> list[dict[str, Any]]:
    """The compiler's report of the kernels for sm_90, bf16, in their usual forms."""
    from pyckpt.triton_kernels.aot import compile as aot
    from pyckpt.triton_kernels.aot import fused

    found = []
    for report in aot.run(list(fused.cases("sm_90", quick=True))):
        figures = {f: getattr(report, f) for f in ("registers", "spilled", "shared", "unit", "programs")}
        found.append({**report.case.record(), "tile": report.case.tile, **figures})
    return found


def main() -> None:
    ops = [{**dataclasses.asdict(op), "break_even": op.break_even} for op in OPS]
    assumed = {"library_tflops": LIBRARY_TFLOPS, "bandwidth_tbs": BANDWIDTH_TBS}
    path = common.write("fused_static", {**common.stamp(), "assumed": assumed, "ops": ops, "kernels": kernels()})
    for op in OPS:
        print(f"{op.name:30} pays from {op.break_even:.0%} of the library's rate: {op.saves}")
    print(f"written to {path.relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
