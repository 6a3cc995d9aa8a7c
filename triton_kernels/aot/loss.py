"""The cross-entropy kernel to compile ahead of time: vocabularies and options that models have."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from .. import cross_entropy
from .compile import DTYPES, Arguments, Case, signature

VOCABS = (1024, 32000, 50257, 128256, 262144)
QUICK_VOCABS = (50257, 128256)
# (softcap, z-loss, label smoothing): Llama; Gemma 2; every option
OPTIONS = {"plain": (0.0, 0.0, 0.0), "softcap": (30.0, 0.0, 0.0), "all": (30.0, 1e-4, 0.1)}


@dataclasses.dataclass(frozen=True)
class LossCase(Case):
    """`made`: "loss" alone (no gradient wanted), "gradient" alone (a backward with lse), or "both"."""

    arch: str
    made: str
    vocab: int
    dtype: str
    options: str = "plain"

    @property
    def name(self) -> str:
        return "cross_entropy"

    @property
    def what(self) -> str:
        return f"{self.vocab:>8} {DTYPES[self.dtype]:5}{self.made} {self.options}"

    @property
    def kernel(self) -> Any:
        return cross_entropy.cross_entropy_kernel

    @property
    def num_warps(self) -> int:
        return cross_entropy.tile(self.vocab)[1]

    @property
    def tile(self) -> str:
        return f"{cross_entropy.tile(self.vocab)[0]} {self.num_warps}w"

    def arguments(self) -> Arguments:
        names = self.kernel.arg_names
        pointer = f"*{DTYPES[self.dtype]}"
        kinds = {n: "*fp32" if n.startswith("p_") else "i32" for n in names}
        kinds |= {"p_logits": pointer, "p_bias": pointer, "p_target": "*i64"}
        softcap, z_loss, smoothing = OPTIONS[self.options]
        constants: dict[str, Any] = {
            "LOSS": self.made != "gradient",
            "GRADIENT": self.made != "loss",
            "SOFTCAP": softcap,
            "Z_LOSS": z_loss,
            "SMOOTHING": smoothing,
            "PRECISION": "ieee" if self.dtype == "float32" else "tf32",
            "COLUMNS": cross_entropy.tile(self.vocab)[0],
        }
        if self.options != "all":
            constants["p_bias"] = None
        if self.made != "gradient":
            constants["p_upstream"] = None
        if self.made == "gradient":
            constants["p_loss"] = None
        return signature(names, kinds, constants, {"stride", *(["vocab"] if self.vocab % 16 == 0 else [])})


def cases(arch: str, quick: bool = False) -> Iterator[Case]:
    """Every vocabulary, dtype and option. Quick: bf16."""
    dtypes = ("bfloat16",) if quick else ("bfloat16", "float32")
    made = ("loss", "gradient", "both")
    yield from itertools.starmap(
        LossCase,
        itertools.product((arch,), made, QUICK_VOCABS if quick else VOCABS, dtypes, OPTIONS),
    )
