"""How exact attention in float32 is, by how its products are made: emulated, on a CPU.

    python bench/precision.py

A matrix unit sums its products exactly, a few at a time, and cuts the sum down to float32 where the float32 units
round it; so it is emulated, in tiles as the kernels have them. "float32": one fused multiply-add after another, as
PyTorch's float32 kernels. "tf32x3": each factor is two TF32 numbers, the product of the small ones left out.
"bf16x6": three bfloat16 numbers, three of the nine products left out. Relative error of the norm against float64,
over that of float32.
Writes bench/results/precision_cpu.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common

KINDS = ("float32", "tf32x3", "bf16x6")
SIZES = ((16, 40), (64, 200), (128, 300))
TILE = 32  # keys, or queries, of a tile: what one product sums over beside the head dim
Product = Callable[[Tensor, Tensor, int], Tensor]


def _cut(x: Tensor) -> Tensor:
    """float64 to float32, towards zero."""
    near = x.float()
    beyond = near.double().abs() > x.abs()
    return torch.where(beyond, (near.view(torch.int32) - 1).view(torch.float32), near)


def _tf32(x: Tensor) -> Tensor:
    """The nearest number of 11 bits."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _pieces(x: Tensor, kind: str) -> list[Tensor]:
    found = []
    for _ in range(2 if kind == "tf32x3" else 3):
        found.append(_tf32(x) if kind == "tf32x3" else x.bfloat16().float())
        x = x - found[-1]
    return found


def _unit(a: Tensor, b: Tensor, acc: Tensor, step: int) -> Tensor:
    for i in range(0, a.shape[-1], step):
        acc = _cut(acc.double() + a[..., i : i + step].double() @ b[..., i : i + step, :].double())
    return acc


def _dot(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """One product of tiles."""
    acc = torch.zeros(*a.shape[:-1], b.shape[-1])
    if kind == "float32":
        for i in range(a.shape[-1]):
            acc = (acc.double() + a[..., i : i + 1].double() * b[..., i : i + 1, :].double()).float()
        return acc
    x, y = _pieces(a, kind), _pieces(b, kind)
    # The smallest first, as Triton has them.
    order = ((1, 0), (0, 1), (0, 0)) if kind == "tf32x3" else ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0))
    for i, j in order:
        acc = _unit(x[i], y[j], acc, 8 if kind == "tf32x3" else 16)
    return acc


def product(kind: str) -> Product:
    """a @ b, in so many terms at once; the sums of those are added in float32."""

    def of(a: Tensor, b: Tensor, terms: int) -> Tensor:
        if a.dtype == torch.float64:
            return a @ b
        found = torch.zeros(*a.shape[:-1], b.shape[-1])
        for i in range(0, a.shape[-1], terms):
            found = found + _dot(a[..., i : i + terms], b[..., i : i + terms, :], kind)
        return found

    return of


def attention(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dot: Product) -> dict[str, Tensor]:
    """Causal, its products made by `dot`, all else in the inputs' dtype."""
    n, dim = q.shape[-2:]
    s = dot(q, k.mT, dim) * dim**-0.5
    s = s.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    p = (s - s.logsumexp(-1, keepdim=True)).exp()
    o = dot(p, v, TILE)
    ds = p * (dot(do, v.mT, dim) - (do * o).sum(-1, keepdim=True)) * dim**-0.5
    return {"o": o, "dq": dot(ds, k, TILE), "dk": dot(ds.mT, q, TILE), "dv": dot(p.mT, do, TILE)}


def measure(dim: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    errors: dict[tuple[str, str], float] = {}
    for _ in range(repeats):
        given = [torch.randn(2, 4, tokens, dim) for _ in range(4)]
        truth = attention(*(t.double() for t in given), product("float32"))
        for kind in KINDS:
            for name, found in attention(*given, product(kind)).items():
                error = (found.double() - truth[name]).norm() / truth[name].norm()
                errors[kind, name] = errors.get((kind, name), 0.0) + float(error) / repeats
    names = ("o", "dq", "dk", "dv")
    return [
        {"head_dim": dim, "tokens": tokens, "kind": kind, **{n: errors[kind, n] for n in names}}
        | {f"{n}_ratio": errors[kind, n] / errors["float32", n] for n in names}
        for kind in KINDS
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = [row for dim, tokens in SIZES for row in measure(dim, tokens, given.repeats)]
    for r in rows:
        ratios = "  ".join(f"{n} {r[n]:.1e} ({r[f'{n}_ratio']:.2f})" for n in ("o", "dq", "dk", "dv"))
        print(f"d{r['head_dim']:<4d} {r['tokens']:4d} tokens  {r['kind']:8} {ratios}")
    path = common.write("precision_cpu", {**common.stamp(), "repeats": given.repeats, "rows": rows})
    print(f"written to {path.relative_to(common.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
