"""The Gluon kernels for Hopper, emulated: their results, whatever the order of events, and that hazards are found.

On a Hopper GPU the same launches run there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gluon_emulator
import pytest
import torch
from gluon_emulator import HazardError, Launcher
from torch import Tensor

from pyckpt.triton_kernels import attention, tuning
from pyckpt.triton_kernels.attention import Options
from pyckpt.triton_kernels.hopper import launch
from pyckpt.triton_kernels.tuning import Config

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if HOPPER else "cpu"
# wgmma's smallest; the emulator takes any.
DIM = 64 if HOPPER else 16
KERNELS = {
    "fwd": ("attention_fwd", "attention_fwd_kernel_hopper"),
    "dkdv": ("attention_bwd", "attention_bwd_kernel_dkdv_hopper"),
    "dq": ("attention_bwd", "attention_bwd_kernel_dq_hopper"),
}
emulated = pytest.mark.skipif(HOPPER, reason="what only the emulator shows")


def config(
    consumers: int = 2, block_n: int = 64 if HOPPER else 32, stages: int = 2, overlap: bool = True, programs: int = 1
) -> Config:
    """`programs` of a multiprocessor; 0: one for each tile."""
    return Config(64 * consumers, block_n, 4, stages, tma=True, persistent=programs, specialize=True, overlap=overlap)


@pytest.fixture(autouse=True)
def chip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launcher]:
    """The kernels' launchers by name; without the chip those of the emulator, on a chip of three multiprocessors."""
    monkeypatch.delenv("PYCKPT_ATTENTION", raising=False)  # tests name kernels by their tiles
    if HOPPER:
        return {}
    monkeypatch.setattr(tuning, "architecture", lambda device: tuning.HOPPER)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 3)
    for name in ("HOPPER_DIMS", "HOPPER_BACKWARD_DIMS"):
        monkeypatch.setattr(attention, name, (DIM,))
    launchers = {}
    for op, (module, name) in KERNELS.items():
        launchers[op] = Launcher(getattr(gluon_emulator.emulated(module), name))
        monkeypatch.setattr(launch, name, launchers[op])
    return launchers


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, **how: Any) -> tuple[Tensor, Tensor]:
    """o and lse, with the tiles that `config` makes of `how`."""
    return attention.forward(q, k, v, options, configs={"fwd": config(**how)})


def truth(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o and lse in float64."""
    groups = q.shape[2] // k.shape[2]
    k, v = (t.double().repeat_interleave(groups, 2) for t in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k) * options.scale
    position = torch.arange(q.shape[1], device=q.device)[:, None] + options.diagonal(q.shape[1], k.shape[1])
    key = torch.arange(k.shape[1], device=q.device)[None]
    left, right = options.window
    if left >= 0:
        s = s.masked_fill(key < position - left, -math.inf)
    if right >= 0:
        s = s.masked_fill(key > position + right, -math.inf)
    lse = s.logsumexp(-1)
    if options.sinks is not None:
        lse = torch.logaddexp(lse, options.sinks.double()[None, :, None])
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def inputs(sq: int, sk: int, heads: int = 2, kv_heads: int = 1, batch: int = 2) -> list[Tensor]:
    shapes = ((sq, heads), (sk, kv_heads), (sk, kv_heads))
    return [torch.randn(batch, n, h, DIM, device=DEVICE).bfloat16() for n, h in shapes]


def assert_right(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], v: Tensor) -> None:
    (o, lse), (o_true, lse_true) = found, expected
    # p and o are rounded to bfloat16, each by at most 2**-9 of what weighs values together; a quarter for all else.
    assert float((o.double() - o_true).abs().max()) <= 1.25 * 2.0**-8 * float(v.abs().max())
    seen = lse_true != -math.inf
    assert torch.equal(lse != -math.inf, seen)
    # Scores of up to 40 are sums in float32 that the matrix unit cuts, not rounds: some units of the last place.
    error = (lse.double() - lse_true)[seen].abs() / lse_true[seen].abs().clamp_min(1.0)
    assert float(error.max() if seen.any() else 0.0) <= 4 * 2.0**-23


CASES = {
    "full": ((150, 130), Options()),
    "causal": ((200, 200), Options(window=(-1, 0), scale=0.25)),
    "one": ((1, 1), Options(window=(-1, 0))),
    "even": ((128, 64), Options()),
    "more keys": ((70, 200), Options(window=(-1, 0))),
    "more queries": ((300, 70), Options(window=(-1, 0))),
    "one key": ((130, 1), Options()),
    "window": ((200, 200), Options(window=(40, 0))),
    "window both ways": ((150, 170), Options(window=(33, 65))),
    "narrow window": ((140, 140), Options(window=(0, 0))),
    "ahead": ((140, 100), Options(window=(-1, 20))),
    "from a position": ((90, 120), Options(window=(-1, 0), q_start=17)),
}


# A line of the kernel, and what breaks it.
HAZARDS = {
    "queries overwritten while o leaves": ("            tma_store_wait(0)\n", ""),
    "no fence": ("fence_async_shared()\n                tma_store(", "tma_store("),
    "keys overwritten": ("                mbarrier.wait(k_free.index(stage), free)\n", ""),
    "values overwritten": ("                mbarrier.wait(v_free.index(stage), free)\n", ""),
    "queries overwritten": ("                mbarrier.wait(q_free.index(c), (tiles & 1) ^ 1)\n", ""),
    "values not released": ("            mbarrier.arrive(v_free.index((count + t - 1) % STAGES), count=1)\n", ""),
    "keys released while read": (
        "            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))\n",
        "            mbarrier.arrive(k_free.index((count + t) % STAGES), count=1)\n"
        "            s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))\n",
    ),
    "scores not waited for": ("num_outstanding=1, deps=(s,)", "num_outstanding=2, deps=(s,)"),
    "values used too early": ("            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))\n"
                              "            mbarrier.arrive(v_free.index((count + t - 1)",
                              "            mbarrier.arrive(v_free.index((count + t - 1)"),
}  # fmt: skip


BACKWARD_HAZARDS = {
    "keys and values overwritten": ("                mbarrier.wait(kv_free.index(c), (tiles & 1) ^ 1)\n", ""),
    "queries and dO overwritten": ("                mbarrier.wait(q_free.index(c), (tiles & 1) ^ 1)\n", ""),
    "a ring of queries overwritten": (
        "        mbarrier.wait(free.index(stage), (((count + t) // STAGES) & 1) ^ 1)\n        mbarrier.expect(q",
        "        mbarrier.expect(q",
    ),
    "lse not waited for": (
        "q_ready = barriers(STAGES, 2)  # the bytes, and lse and delta",
        "q_ready = barriers(STAGES, 1)",
    ),
    "lse announced too early": (
        "        lse_smem.index(stage).store(_in_base_2(lse))\n",
        "        mbarrier.arrive(q_ready.index(stage), count=1)\n"
        "        mbarrier.wait(q_ready.index(stage), ((count + t) // STAGES) & 1)\n"
        "        lse_smem.index(stage).store(_in_base_2(lse))\n",
    ),
    "dO not waited for": ("        mbarrier.wait(do_ready.index(stage), phase)\n", ""),
    "values not waited for": ("        mbarrier.wait(v_ready.index(stage), phase)\n", ""),
    "dP not waited for": ("        dp = warpgroup_mma_wait(num_outstanding=1, deps=(dp,))\n", ""),
    "keys released while read": (
        "        dq = warpgroup_mma_wait(num_outstanding=0, deps=(dq,))\n        mbarrier.arrive(free.index(stage), "
        "count=1)\n",
        "        mbarrier.arrive(free.index(stage), count=1)\n        dq = warpgroup_mma_wait(num_outstanding=0, "
        "deps=(dq,))\n",
    ),
}


class TestForward:
    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("case", CASES)
    def test_every_mask(self, case: str, overlap: bool) -> None:
        (sq, sk), options = CASES[case]
        q, k, v = inputs(sq, sk)
        assert_right(attend(q, k, v, options, overlap=overlap), truth(q, k, v, options), v)

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("stages", [1, 2, 3])
    @pytest.mark.parametrize("consumers", [2, 3])
    def test_rings_and_warpgroups(self, consumers: int, stages: int, overlap: bool) -> None:
        q, k, v = inputs(260, 260)
        options = Options(window=(-1, 0), sinks=torch.randn(2, device=DEVICE), scale=0.25)
        how = {"consumers": consumers, "stages": stages, "overlap": overlap, "block_n": 64}
        for programs in (0, 1):
            assert_right(attend(q, k, v, options, **how, programs=programs), truth(q, k, v, options), v)

    @pytest.mark.parametrize("overlap", [False, True])
    def test_merging_into_what_is_there(self, overlap: bool) -> None:
        """Two tiles of keys, one after the other, are all of them: as the streamed executor has them."""
        q, k, v = inputs(150, 260)
        options = Options(window=(-1, 0), scale=0.25)
        o = torch.zeros(q.shape, device=DEVICE)
        lse = torch.full((2, 2, 152), -math.inf, device=DEVICE)[..., :150]
        for a, b in ((0, 100), (100, 260)):
            part = dataclasses.replace(options, q_start=110, k_start=a)
            configs = {"fwd": config(overlap=overlap)}
            attention.forward(q, k[:, a:b], v[:, a:b], part, into=(o, lse), configs=configs)
        assert_right((o, lse), truth(q, k, v, options), v)

    def test_strides(self) -> None:
        """Views of one tensor of all three, and of a batch's part."""
        qkv = torch.randn(3, 150, 8, DIM, device=DEVICE).bfloat16()[1:]
        q, k, v = qkv.split((4, 2, 2), dim=2)
        options = Options(window=(-1, 0), scale=0.25)
        assert_right(attend(q, k, v, options), truth(q, k, v, options), v)

    @emulated
    @pytest.mark.parametrize("overlap", [False, True])
    def test_every_order_of_events_gives_the_same_bits(self, chip: dict[str, Launcher], overlap: bool) -> None:
        q, k, v = inputs(150, 150, batch=1)
        options = Options(window=(-1, 0))
        first = attend(q, k, v, options, overlap=overlap)
        for seed in range(1, 40):
            chip["fwd"].seed = seed
            again = attend(q, k, v, options, overlap=overlap, programs=seed % 2)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_twenty_runs_give_the_same_bits(self, dim: int, overlap: bool) -> None:
        q, k, v = (torch.randn(2, 3000, h, dim, device=DEVICE).bfloat16() for h in (8, 2, 2))
        options = Options(window=(-1, 0), scale=dim**-0.5)
        how = {"block_n": 64 if dim == 256 else 128, "overlap": overlap}
        first = attend(q, k, v, options, **how)
        assert_right(first, truth(q, k, v, options), v)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, attend(q, k, v, options, **how), strict=True))

    def test_where_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PYCKPT_ATTENTION=hopper: for what it takes, and the other kernel for all else."""
        calls: list[str] = []
        right = launch.Launch.forward
        monkeypatch.setattr(launch.Launch, "forward", lambda *a, **b: calls.append("hopper") or right(*a, **b))
        q, k, v = inputs(90, 90)
        options = Options(window=(-1, 0), scale=0.25)
        attention.forward(q, k, v, options)
        assert not calls
        monkeypatch.setenv("PYCKPT_ATTENTION", "hopper")
        if not HOPPER:  # the table has rows for the dims that the chip has, and tiles that a test cannot fill
            monkeypatch.setattr(
                tuning, "lookup", lambda key: config() if key.op == "hopper_fwd" else Config(32, 32, 4, 1)
            )
        assert_right(attention.forward(q, k, v, options), truth(q, k, v, options), v)
        assert calls == ["hopper"]
        for not_taken in (
            Options(window=(-1, 0), softcap=3.0),
            Options(dropout=0.5, seed=3),
            Options(alibi_slopes=torch.ones(2, device=DEVICE)),
            Options(scale=-1.0),
        ):
            attention.forward(q, k, v, not_taken)
        attention.forward(q.float(), k.float(), v.float(), options)
        strided = torch.randn(2, 90, 2, DIM + 1, device=DEVICE).bfloat16()[..., :DIM]
        attention.forward(strided, k, v, options)
        assert calls == ["hopper"]

    @emulated
    @pytest.mark.parametrize("hazard", HAZARDS)
    def test_hazards_are_found(self, hazard: str, chip: dict[str, Launcher], monkeypatch: pytest.MonkeyPatch) -> None:
        """Each is one line of the kernel away. Some order of events shows it."""
        monkeypatch.setattr(tuning, "multiprocessors", lambda device: 2)
        changed = gluon_emulator.emulated("attention_fwd", HAZARDS[hazard])
        chip["fwd"].kernel = changed.attention_fwd_kernel_hopper
        q, k, v = inputs(400, 400, batch=1)
        options = Options(window=(-1, 0), scale=0.25)
        expected = truth(q, k, v, options)
        with pytest.raises((HazardError, AssertionError, AttributeError, TypeError)):
            for seed in range(60):
                chip["fwd"].seed = seed
                assert_right(attend(q, k, v, options), expected, v)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, options: Options, into: bool = False, **how: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """(dq, dk, dv) by the kernels, added to ones where `into` sums, and in float64 from the same lse and delta."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    o, lse = truth(*leaves, options)
    expected = list(torch.autograd.grad(o, leaves, do.double()))
    sums = tuple(torch.ones(t.shape, device=t.device) for t in (q, k, v)) if into else None
    delta = (o.detach() * do.double()).sum(-1).transpose(1, 2).float().contiguous()
    configs = {"dkdv": config(**how), "dq": config(**how)}
    if how.get("block_n") is None:  # tiles of keys are the warpgroups' here, and those of queries are gone through
        configs["dkdv"] = Config(64 if HOPPER else 32, 64 * how.get("consumers", 2), 4, how.get("stages", 2), tma=True,
                                 persistent=how.get("programs", 1), specialize=True)  # fmt: skip
    found = attention.backward(do, q, k, v, lse.detach().float(), delta, options, into=sums, configs=configs)
    return [t - 1.0 if into else t for t in found], [t.detach() for t in expected]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, got, want in zip(("dq", "dk", "dv"), found, expected, strict=True):
        error = torch.linalg.vector_norm(got.double() - want) / torch.linalg.vector_norm(want).clamp_min(1e-30)
        # P, dS and the result are rounded to bfloat16: each by up to 2**-9, in norm by less than 2**-9 for all three.
        assert float(error) <= 2.0**-8 or float(want.abs().max()) < 1e-12, f"{name}: {float(error):.2e}"


class TestBackward:
    @pytest.mark.parametrize("into", [False, True])
    @pytest.mark.parametrize("case", CASES)
    def test_every_mask(self, case: str, into: bool) -> None:
        (sq, sk), options = CASES[case]
        options = dataclasses.replace(options, scale=0.25)
        q, k, v = inputs(sq, sk, heads=4, kv_heads=2)
        do = torch.randn_like(q)
        assert_near(*gradients(q, k, v, do, options, into))

    @pytest.mark.parametrize("stages", [1, 2, 3])
    def test_rings(self, stages: int) -> None:
        q, k, v = inputs(260, 260)
        do = torch.randn_like(q)
        options = Options(window=(-1, 0), scale=0.25)
        for programs in (0, 1):
            assert_near(*gradients(q, k, v, do, options, stages=stages, programs=programs))

    def test_what_sees_nothing(self) -> None:
        """Queries without a key, and keys without a query: gradients 0, and no NaN from lse = -inf."""
        q, k, v = inputs(150, 40)
        do = torch.randn_like(q)
        for options in (Options(window=(-1, 0)), Options(window=(3, 0), q_start=0), Options(window=(3, 0), q_start=60)):
            (dq, dk, dv), _ = gradients(q, k, v, do, dataclasses.replace(options, scale=0.25))
            position = torch.arange(150, device=DEVICE)[:, None] + options.diagonal(150, 40)
            key = torch.arange(40, device=DEVICE)[None]
            sees = (key <= position) & ((key >= position - options.window[0]) | (options.window[0] < 0))
            for got, seen in ((dq, sees.any(1)), (dk, sees.any(0)), (dv, sees.any(0))):
                assert bool(got.isfinite().all()) and not bool(got[:, ~seen].any())
            assert not bool(sees.any(1).all())

    @emulated
    def test_every_order_of_events_gives_the_same_bits(self, chip: dict[str, Launcher]) -> None:
        q, k, v = inputs(150, 150, batch=1)
        do = torch.randn_like(q)
        first, _ = gradients(q, k, v, do, Options(window=(-1, 0), scale=0.25))
        for seed in range(1, 30):
            for op in ("dkdv", "dq"):
                chip[op].seed = seed
            again, _ = gradients(q, k, v, do, Options(window=(-1, 0), scale=0.25), programs=seed % 2)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (500, 0)], ids=str)
    def test_twenty_runs_give_the_same_bits(self, dim: int, window: tuple[int, int], monkeypatch) -> None:
        """With the table's tiles."""
        monkeypatch.setenv("PYCKPT_ATTENTION", "hopper")
        q, k, v, do = (torch.randn(2, 2500, h, dim, device=DEVICE).bfloat16() for h in (8, 2, 2, 8))
        options = Options(window=window, scale=dim**-0.5)
        leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
        o, lse = truth(*leaves, options)
        expected = list(torch.autograd.grad(o, leaves, do.double()))
        delta = (o.detach() * do.double()).sum(-1).transpose(1, 2).float().contiguous()
        first = attention.backward(do, q, k, v, lse.detach().float(), delta, options)
        assert_near(list(first), expected)
        for _ in range(20):
            again = attention.backward(do, q, k, v, lse.detach().float(), delta, options)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @emulated
    @pytest.mark.parametrize("hazard", BACKWARD_HAZARDS)
    def test_hazards_are_found(self, hazard: str, chip: dict[str, Launcher], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning, "multiprocessors", lambda device: 2)
        changed = gluon_emulator.emulated("attention_bwd", BACKWARD_HAZARDS[hazard])
        for op in ("dkdv", "dq"):
            chip[op].kernel = getattr(changed, KERNELS[op][1])
        q, k, v = inputs(400, 400, batch=1)
        do = torch.randn_like(q)
        with pytest.raises((HazardError, AssertionError, AttributeError, TypeError)):
            for seed in range(60):
                for op in ("dkdv", "dq"):
                    chip[op].seed = seed
                assert_near(*gradients(q, k, v, do, Options(window=(-1, 0), scale=0.25)))
