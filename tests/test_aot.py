"""The Triton kernels compiled for GPUs that are not here: no spills, the matrix unit, shared memory that fits.

Only what matters most, to stay quick; `make aot` compiles everything that ships. In a process of its own: here the
kernels are Triton's interpreter's.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pyckpt.triton_kernels import tuning
from pyckpt.triton_kernels.aot.attention import AttentionCase
from pyckpt.triton_kernels.aot.compile import Report, exponentials_in_flight, spills_in_loops

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
FAMILIES = ("attention", "hopper", "pointwise", "loss", "fused")
FUSED_ARCHS = ("sm_80", "sm_90")  # `make aot` has all chips
UNITS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def environment() -> dict[str, str]:
    """Of a process that compiles, whatever this one has set."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYCKPT_"))}
    return {**env, "PYTHONPATH": str(ROOT)}


@functools.cache
def _compiled(arch: str) -> list[dict[str, Any]]:
    """What this file looks at, of every family: one process imports PyTorch, and forks those that compile."""
    families = [word for name in FAMILIES if name != "fused" or arch in FUSED_ARCHS for word in ("--family", name)]
    command = [sys.executable, "-m", "pyckpt.triton_kernels.aot", "--quick", "--json", "kernels.json"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, *families, "--arch", arch], cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.rstrip().endswith("kernels compiled, 0 problems")
        return json.loads((Path(folder) / "kernels.json").read_text())["kernels"]


def compiled(family: str, arch: str) -> list[dict[str, Any]]:
    return [kernel for kernel in _compiled(arch) if kernel["family"] == family]


def on(archs: Iterable[str]) -> pytest.MarkDecorator:
    """A chip's tests run in one process, where its kernels are compiled once: in 2 CPU minutes if none is cached."""
    marks = {arch: (pytest.mark.xdist_group(f"aot_{arch}"), pytest.mark.timeout(600)) for arch in archs}
    return pytest.mark.parametrize("arch", [pytest.param(arch, marks=marks[arch]) for arch in marks])


# As nvdisasm writes it: a loop over tiles, in it one that multiplies, and a wait that failed behind the end.
LOOPS = """
.L_x_0:
        /*0000*/                   LDL R8, [R1] ;
.L_x_1:
        /*0010*/              @!P2 BRA `(.L_x_7) ;
.L_x_2:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        {}
        /*0040*/               @P2 BRA `(.L_x_1) ;
        /*0050*/                   STL [R1+0x4], R2 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_7:
        /*0080*/              @!P2 BRA `(.L_x_7) ;
        /*0090*/                   BRA `(.L_x_2) ;
"""


@pytest.mark.parametrize(("inside", "found"), [("", 0), ("/*0030*/ STL [R1], R8 ;", 1), ("/*0030*/ LDG.E R8 ;", 0)])
def test_spills_in_loops(inside, found):
    """Those around the innermost loops with products do not count."""
    assert spills_in_loops(LOOPS.format(inside)) == found


OVERLAPPING = """/*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        {}
        /*0034*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        {}"""


@pytest.mark.parametrize(("before", "after", "found"), [(2, 0, 2), (0, 2, 0), (1, 1, 1)])
def test_exponentials_in_flight(before, after, found):
    """Those between the two waits, in the loop with fewest of them."""
    exponential = "/*0032*/ MUFU.EX2 R8, R8 ;\n"
    assert exponentials_in_flight(LOOPS.format(OVERLAPPING.format(exponential * before, exponential * after))) == found


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("dim", [16, 32, 64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_89", "sm_120", "gfx942"])
def test_exact_products_keep_all_bits(arch, dim, mask):
    """Three TF32 products keep 22 of float32's 24, which on a GPU is more than twice PyTorch's error."""
    for op in ("fwd", "dkdv", "dq"):
        for score in ("plain", "extra", "into"):
            assert tuning.lookup(tuning.Key(arch, op, dim, dim, "float32", mask, score)).exact in ("bf16x6", "ieee")


@pytest.mark.slow
@on(LIMITS)
def test_kernels_fit_the_chip(arch):
    kernels = compiled("attention", arch)
    assert {(k["op"], k["head_dim"], k["value_dim"]) for k in kernels} == {
        (op, *dims) for op in ("fwd", "dkdv", "dq", "delta") for dims in ((64, 64), (128, 128), (192, 128), (256, 256))
    }
    for k in kernels:
        what = f"{k['op']} at {k['head_dim']}/{k['value_dim']} on {arch}: {k}"
        assert k["shared"] <= LIMITS[arch], what
        assert k["unit"] == UNITS[arch] or k["op"] == "delta", what
        assert k["registers"] >= 24, what  # fewer, and the compiler took the work away
        if arch != "gfx942":
            assert k["spilled"] <= (0 if k["head_dim"] <= 128 else 64), what
            assert k["programs"] >= 1, what
    with_tma = arch in ("sm_90", "sm_100")  # by the rows of the table
    assert any("pointers" in k["features"] for k in kernels) == with_tma


FEATURES = """
from pyckpt.triton_kernels.aot.__main__ import cases, run

wanted = [c for c in cases(["sm_90"], families=["attention"]) if c.op == "dkdv" and c.key.head_dim == 128]
reports = list(run([c for c in wanted if c.features and c.dtype == "bfloat16"]))
assert len(reports) >= 8, wanted
assert not [(r.line(), p) for r in reports for p in r.problems()]
"""


@pytest.mark.slow
def test_products_overlap_with_every_feature():
    """In dK/dV's kernel on Hopper, where the assembler may run them one after the other."""
    done = subprocess.run([sys.executable, "-c", FEATURES], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


EIGHTS = """
from pyckpt.triton_kernels.aot.__main__ import cases, run

wanted = [c for c in cases(["sm_80"], families=["attention"]) if c.head_dim == 72]
assert len(wanted) == 4, wanted
assert not [(r.line(), r.narrow) for r in run(wanted) if r.narrow or r.spilled or list(r.problems())]
"""


@pytest.mark.slow
def test_head_dims_that_only_eight_divides_are_read_wide():
    """Two bytes at a time the forward kernel spilled 500 bytes a thread, at head dim 72."""
    done = subprocess.run([sys.executable, "-c", EIGHTS], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@on(["sm_90"])
def test_the_kernels_for_hopper_fit_the_chip(arch):
    """No product waits for one that it does not need, which the assembler decides too."""
    kernels = compiled("hopper", arch)
    expected = {("hopper_fwd", 256), *((f"hopper_{op}", dim) for op in ("fwd", "dkdv", "dq") for dim in (64, 128))}
    assert {(k["op"], k["head_dim"]) for k in kernels} == expected
    for k in kernels:
        assert k["unit"] == "wgmma" and not k["serialized"] and not k["looped"], k
        # What gradients spill is read again once a tile, outside the loops.
        allowed = {"hopper_dkdv": 160, "hopper_dq": 80}.get(k["op"], 0 if k["head_dim"] <= 128 else 64)
        assert k["spilled"] <= allowed, k
        assert k["programs"] >= 1 and k["shared"] <= LIMITS[arch], k


@pytest.mark.slow
@on(LIMITS)
def test_pointwise_kernels_fit_the_chip(arch):
    kernels = compiled("pointwise", arch)
    assert len(kernels) == 2 * 8 + 6 * 2 + 2 + 2 + 2  # norms by width and form, activations, RoPE, dropout, merging
    for k in kernels:
        assert k["shared"] <= LIMITS[arch], k
        assert k["narrow"] == 0, k
        if arch != "gfx942":
            assert k["spilled"] == 0 and k["stack"] == 0, k
            assert k["programs"] >= 1, k


@pytest.mark.slow
@on(LIMITS)
def test_the_loss_fits_the_chip(arch):
    kernels = compiled("loss", arch)
    assert len(kernels) == 3 * 2 * 3  # what is made, vocabularies, options
    for k in kernels:
        assert k["shared"] <= LIMITS[arch], k
        # The label's own logit, and its bias; the rest of a vocabulary that 16 does not divide.
        assert k["narrow"] <= 2 or k["vocab"] % 16, k
        if arch != "gfx942":
            assert k["spilled"] == 0 and k["stack"] == 0, k


@pytest.mark.slow
@on(FUSED_ARCHS)
def test_fused_products_fit_the_chip(arch):
    kernels = compiled("fused", arch)
    assert len(kernels) == 11
    for k in kernels:
        assert k["shared"] <= LIMITS[arch], k
        assert k["unit"] == UNITS[arch] or k["op"] in ("qk_finish", "qk_bwd", "statistics", "merge"), k
        assert k["narrow"] <= (4 if k["op"] == "wgrad" else 0), k  # the norm's own weights, a value a thread
        assert k["spilled"] == 0, k
        assert k["programs"] >= 1, k


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"spilled": 4}, ["4 bytes spilled, 0 allowed"]),
        ({"unit": "mma"}, ["runs on mma, not on wgmma"]),
        ({"shared": 300000}, ["300000 bytes of shared memory; sm_90 has 232448"]),
    ],
)
def test_a_spill_is_a_problem(change, expected):
    figures = {"registers": 200, "spilled": 0, "stack": 0, "shared": 1000, "unit": "wgmma", "seconds": 0.0} | change
    case = AttentionCase("sm_90", "dq", 128, 128, "bfloat16", "causal")
    assert list(Report(case, **figures).problems()) == expected
