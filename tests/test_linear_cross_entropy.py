"""Linear cross entropy against its reference and PyTorch's, and what it must not hold in memory."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LOW_DTYPES, a_few, assert_close_to_truth, assert_exact, check_exact, step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.ops import linear_cross_entropy as op
from pyckpt.ops import reference, triton_backend, vocab_blocks

# "again": with recompute=True.
_REDUCTIONS = ["mean", "sum", "none", "mean again", "sum again"]
REDUCTIONS = pytest.mark.parametrize("reduction", _REDUCTIONS)
FEW_REDUCTIONS = pytest.mark.parametrize("reduction", a_few(_REDUCTIONS, always=(0, 3)))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "z_loss": {"z_loss": 0.1},
    "label_smoothing": {"label_smoothing": 0.2},
    "all": {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2},
}
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def set_chunks(monkeypatch: pytest.MonkeyPatch, elements: int, tokens: int, words: int = 6) -> None:
    monkeypatch.setattr(op, "_CHUNK_ELEMENTS", dict.fromkeys(op._CHUNK_ELEMENTS, elements))
    monkeypatch.setattr(op, "_MIN_CHUNK_TOKENS", tokens)
    monkeypatch.setattr(vocab_blocks, "_MIN_WORDS", words)
    monkeypatch.setattr(vocab_blocks, "_TILE", 2)


@pytest.fixture(params=a_few(["one-chunk", "many-chunks", "triton"], always=(0, 1)))
def chunking(request, monkeypatch) -> None:
    """How many chunks there are, and with "triton" our kernel, on chunks and on parts of the vocabulary."""
    if request.param != "one-chunk":
        set_chunks(monkeypatch, 100, 3)
    if request.param == "triton":
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
        monkeypatch.setattr(triton_backend.kernels("cross_entropy"), "COLUMNS", 8)
        set_chunks(monkeypatch, 100, 30)


@pytest.fixture(params=a_few(["one-chunk", "some-chunks", "triton"], always=(1, 2)))
def some_chunks(request, monkeypatch) -> str:
    """For precision: float32 sums over hundreds of tiny chunks would round more often than PyTorch's sums do."""
    if request.param != "one-chunk":
        # The interpreter takes a row of a block of words at a time.
        set_chunks(monkeypatch, 1, 100, words=64 if request.param == "triton" else 6)
    if request.param == "triton":
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    return request.param


def make(
    tokens: int, width: int, vocab: int, bias: bool = False, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    inputs = {"x": torch.randn(tokens, width), "weight": torch.randn(vocab, width) / width**0.5}
    if bias:
        inputs["bias"] = torch.randn(vocab)
    return {n: t.double().to(dtype) for n, t in inputs.items()}


def labels(tokens: int, vocab: int, ignored: float = 0.2, ignore_index: int = -100) -> Tensor:
    target = torch.randint(0, vocab, (tokens,))
    return target.masked_fill(torch.rand(tokens) < ignored, ignore_index)


def ours(target: Tensor, reduction: str = "mean", **options: Any) -> Any:
    options |= {"reduction": plain(reduction), "recompute": reduction.endswith("again")}
    return lambda x, weight, bias=None: pyckpt.linear_cross_entropy(x, weight, target, bias=bias, **options)


def truth(target: Tensor, reduction: str = "mean", **options: Any) -> Any:
    options["reduction"] = plain(reduction)
    return lambda x, weight, bias=None: reference.linear_cross_entropy(x, weight, target, bias=bias, **options)


def plain(reduction: str) -> str:
    """What PyTorch calls it."""
    return reduction.split()[0]


class TestExact:
    @REDUCTIONS
    @ALL_OPTIONS
    @pytest.mark.parametrize("bias", [False, True])
    def test_options(self, bias, options, reduction, chunking):
        target = labels(41, 13)
        target[0] = 3  # at least one
        options = {**options, "reduction": reduction}
        check_exact(ours(target, **options), truth(target, **options), make(41, 7, 13, bias))

    @REDUCTIONS
    @pytest.mark.parametrize(
        ("tokens", "width", "vocab"), [(1, 1, 1), (239, 1, 2), (799, 3, 5), (113, 203, 31), (3, 4, 999), (63, 8, 65)]
    )
    def test_shapes(self, tokens, width, vocab, reduction, chunking):
        target = labels(tokens, vocab, ignored=0.0)
        options = {"reduction": reduction}
        check_exact(ours(target, **options), truth(target, **options), make(tokens, width, vocab, True))

    @REDUCTIONS
    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 4])
    def test_ignored_labels(self, ignore_index, reduction, chunking):
        target = labels(40, 9, 0.5, ignore_index)
        target[0] = 3
        options = {"reduction": reduction, "ignore_index": ignore_index, "z_loss": 0.1, "label_smoothing": 0.1}
        inputs = make(40, 5, 9)
        check_exact(ours(target, **options), truth(target, **options), inputs)
        got, _ = step(ours(target, **options), inputs)
        assert (got["dx"][target == ignore_index] == 0).all()

    def test_what_ignored_tokens_hold_does_not_reach_the_loss(self, chunking):
        """A padding token may hold anything."""
        target, inputs = labels(40, 9), make(40, 5, 9)
        target[:2], target[2] = -100, 1
        clean = [ours(target, reduction=r)(**inputs) for r in _REDUCTIONS]
        inputs["x"][0], inputs["x"][1] = float("inf"), float("nan")
        for reduction, want in zip(_REDUCTIONS, clean, strict=True):
            assert_exact(ours(target, reduction=reduction)(**inputs), want)
            dx = step(ours(target, reduction=reduction), inputs)[0]["dx"]
            assert (dx[target == -100] == 0).all()
            assert dx.isfinite().all()

    def test_all_labels_ignored(self, chunking):
        """As in PyTorch: a mean over nothing is NaN, a sum is 0, and neither has a gradient."""
        target, inputs = torch.full((7,), -100), make(7, 5, 9)
        nan = float("nan")
        for reduction, value in (("mean", nan), ("sum", 0.0), ("mean again", nan), ("sum again", 0.0)):
            got, _ = step(ours(target, reduction=reduction), inputs, [torch.tensor(1.0)])
            assert_exact(torch.nan_to_num(got["out 0"], 7.0), torch.tensor(7.0 if value != value else value).double())
            assert (got["dx"] == 0).all()
            assert (got["dweight"] == 0).all()

    @REDUCTIONS
    def test_leading_dims_and_layouts(self, reduction, chunking):
        target = labels(24, 9, 0.1).view(2, 3, 4)
        target[0, 0, 0] = 1
        base = torch.randn(2, 3, 5, 4, dtype=torch.float64)
        weight = torch.randn(5, 18, dtype=torch.float64).t()[::2]
        for x, labelled in (
            (base.transpose(2, 3), target),
            (base[:, :, :, :1].mT.expand(2, 3, 4, 5), target),
            (base.permute(3, 1, 0, 2), target.permute(2, 1, 0)),
        ):
            flat = truth(labelled.reshape(-1), reduction=reduction)

            def want(x: Tensor, weight: Tensor, flat: Any = flat, shape: Any = labelled.shape) -> Tensor:
                loss = flat(x.reshape(-1, 5), weight)
                return loss.view(shape) if reduction == "none" else loss

            check_exact(ours(labelled, reduction=reduction), want, {"x": x, "weight": weight})

    @REDUCTIONS
    def test_the_upstream_gradient_scales(self, reduction):
        target, inputs = labels(20, 9, 0.0), make(20, 5, 9, True)
        for dout in (torch.tensor(-3.25).double(), torch.tensor(0.0).double()):
            dout = dout.expand(20) if reduction == "none" else dout
            got, _ = step(ours(target, reduction=reduction), inputs, [dout])
            want, _ = step(truth(target, reduction=reduction), inputs, [dout])
            for n in want:
                assert_exact(got[n], want[n], n)

    @REDUCTIONS
    @pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
    def test_token_weights(self, options, reduction, chunking):
        target, weights = labels(41, 13), torch.rand(41).double()
        target[0], weights[1], weights[target == -100] = 3, 0.0, float("nan")
        options = {**options, "reduction": reduction, "token_weight": weights}
        check_exact(ours(target, **options), truth(target, **options), make(41, 7, 13, True))

    @REDUCTIONS
    def test_class_weights(self, reduction, chunking):
        target, weights, more = labels(41, 13), torch.rand(13).double(), torch.rand(41).double()
        target[0] = 3

        def pytorchs(x: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(x @ weight.t(), target, weights, reduction=plain(reduction))

        inputs = make(41, 7, 13)
        check_exact(ours(target, reduction, class_weight=weights), pytorchs, inputs)
        of_labels = weights[target.clamp_min(0)]
        got = ours(target, reduction, class_weight=weights, token_weight=more)
        check_exact(got, truth(target, reduction, token_weight=of_labels * more), inputs)

    def test_weights_that_are_all_zero(self, chunking):
        target, inputs = labels(20, 9), make(20, 5, 9)
        for reduction in _REDUCTIONS:
            got, _ = step(ours(target, reduction, token_weight=torch.zeros(20)), inputs)
            assert got["out 0"].isnan() if plain(reduction) == "mean" else (got["out 0"] == 0).all()
            assert (got["dx"] == 0).all()

    @REDUCTIONS
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    def test_weights_in_any_precision(self, dtype, reduction):
        """Weights of half precision, which the loss multiplies in float32; a model's are float32 beside bfloat16."""
        target, inputs = labels(60, 13, 0.0), make(60, 8, 13, dtype=dtype)
        for weights in (torch.rand(60), torch.rand(60).bfloat16(), torch.rand(60).double()):
            got = ours(target, reduction, token_weight=weights)(**inputs)
            each = ours(target, "none")(**inputs) * weights.float()
            want = {"none": each, "sum": each.sum(), "mean": each.sum() / weights.float().sum()}[plain(reduction)]
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)

    def test_no_tokens(self):
        inputs = make(0, 5, 9)
        target = torch.zeros(0, dtype=torch.int64)
        assert pyckpt.linear_cross_entropy(*inputs.values(), target, reduction="sum") == 0
        assert pyckpt.linear_cross_entropy(*inputs.values(), target, reduction="none").shape == (0,)
        assert pyckpt.linear_cross_entropy(*inputs.values(), target).isnan()


class TestPrecision:
    @REDUCTIONS
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize("smoothing", a_few([0.0, 0.1], always=(1,)))
    @pytest.mark.parametrize(
        ("tokens", "width", "vocab"),
        a_few([(64, 8, 5), (239, 16, 31), (700, 32, 203), (60, 32, 203)], always=(1, 3), names=3),
    )
    def test_against_pytorch(self, tokens, width, vocab, smoothing, dtype, reduction, some_chunks):
        if some_chunks == "triton":
            tokens = min(tokens, 64)  # its interpreter takes a row at a time
        target = labels(tokens, vocab, 0.1)
        target[0] = 3
        options = {"reduction": reduction, "label_smoothing": smoothing}

        def pytorchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight, bias), target, **options | {"reduction": plain(reduction)})

        inputs = make(tokens, width, vocab, True, dtype)
        count = int((target >= 0).sum()) if plain(reduction) == "mean" else 1
        self.check(ours(target, **options), pytorchs, truth(target, **options), inputs, count)

    @pytest.mark.parametrize("reduction", ["mean", "mean again"])
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    def test_softcap_and_z_loss_against_the_formula(self, dtype, reduction, some_chunks):
        tokens = 40 if reduction == "mean again" else 90 if some_chunks == "triton" else 300
        target = labels(tokens, 50)
        formula = truth(target, softcap=5.0, z_loss=1e-2)
        inputs = make(tokens, 16, 50, dtype=dtype)
        self.check(ours(target, reduction, softcap=5.0, z_loss=1e-2), formula, formula, inputs, tokens * 2 // 3)

    def check(self, mine: Any, pytorchs: Any, formula: Any, inputs: dict[str, Tensor], count: int = 1) -> None:
        want, douts = step(formula, {n: t.double() for n, t in inputs.items()})
        douts = [d.to(inputs["x"].dtype) for d in douts]
        want, _ = step(formula, {n: t.double() for n, t in inputs.items()}, douts)
        low, _ = step(pytorchs, inputs, douts)
        got, _ = step(mine, inputs, douts)
        assert got["out 0"].dtype == torch.float32
        # Gradients are sums of a probability times a value of about 1, times the upstream gradient.
        terms = dict.fromkeys(want, float(douts[0].abs().max()) / count)
        if "bias" in inputs:  # few numbers, each a sum over all tokens: their errors vary
            terms["dbias"] *= inputs["x"].shape[0] ** 0.5
        # The loss is one number, which PyTorch may round luckily: allow the rounding of the logits it comes from.
        coarser = torch.finfo(inputs["x"].dtype).eps / torch.finfo(torch.float32).eps
        terms["out 0"] = 3 * coarser * float(want["out 0"].abs().max())
        for n in want:
            assert_close_to_truth(got[n], low[n], want[n], what=n, terms=terms[n])

    @REDUCTIONS
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    def test_logits_are_rounded_once_and_the_loss_not_at_all(self, dtype, reduction):
        target, inputs = labels(300, 203), make(300, 32, 203, dtype=dtype)
        logits = F.linear(inputs["x"], inputs["weight"]).double()
        want = F.cross_entropy(logits, target, reduction=plain(reduction))
        got = ours(target, reduction=reduction)(**inputs).double()
        assert (got - want).abs().max() < 1e-6 * want.abs().max()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [1.0 / 3.0, 1024.0, 65536.0])
    @pytest.mark.parametrize("vocab", [500, 5000])
    @pytest.mark.parametrize("reduction", ["mean", "mean again"])
    def test_scaled_losses(self, reduction, vocab, scale, dtype):
        """A loss scale lifts float16 gradients before they vanish; a factor is not rounded to 8 bits first."""
        tokens = 2000
        target, inputs = labels(tokens, vocab), make(tokens, 16, vocab, dtype=dtype)
        dout = [torch.tensor(scale)]
        want, _ = step(truth(target), {n: t.double() for n, t in inputs.items()}, [dout[0].double()])
        got, _ = step(ours(target, reduction), inputs, dout)
        for n in ("dx", "dweight"):
            error = (got[n].double() - want[n]).norm() / want[n].norm()
            assert error < torch.finfo(dtype).eps, n

    def test_one_of_many_tokens_in_float16(self):
        """2000 equal columns: each token's gradient is as right as that of one."""
        x = torch.randn(1, 8).half().expand(2000, 8)
        weight, target = torch.randn(30, 8).half(), torch.full((2000,), 3)
        want, _ = step(truth(target), {"x": x.double(), "weight": weight.double()}, [torch.tensor(4096.0).double()])
        got, _ = step(ours(target), {"x": x, "weight": weight}, [torch.tensor(4096.0)])
        assert ((got["dx"].double() - want["dx"]).norm() / want["dx"].norm()) < 2e-3


@pytest.mark.usefixtures("backend")
class TestAutograd:
    @FEW_REDUCTIONS
    def test_frozen_inputs_get_no_gradient(self, reduction):
        target, inputs = labels(30, 9, 0.0), make(30, 5, 9, True)
        want, douts = step(ours(target, reduction=reduction), inputs)
        for size in range(1, 4):
            for live in itertools.combinations(inputs, size):
                leaves = {n: t.clone().requires_grad_(n in live) for n, t in inputs.items()}
                ours(target, reduction=reduction)(*leaves.values()).backward(douts[0])
                for n, t in leaves.items():
                    assert t.grad is None if n not in live else torch.equal(t.grad, want[f"d{n}"])

    @REDUCTIONS
    def test_backward_twice(self, reduction):
        target, inputs = labels(30, 9, 0.0), make(30, 5, 9)
        leaves = [t.requires_grad_() for t in inputs.values()]
        loss = ours(target, reduction=reduction)(*leaves).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss * 2, leaves)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(2 * a, b)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, leaves)

    @REDUCTIONS
    def test_autocast(self, reduction):
        target, inputs = labels(60, 50), make(60, 16, 50, True, torch.float32)
        low, douts = step(ours(target, reduction=reduction), {n: t.bfloat16() for n, t in inputs.items()})
        with torch.autocast("cpu", torch.bfloat16):
            got, _ = step(ours(target, reduction=reduction), inputs, douts)
        assert torch.equal(got["out 0"], low["out 0"])
        assert got["out 0"].dtype == torch.float32
        for n in ("dx", "dweight", "dbias"):
            assert got[n].dtype == torch.float32
            assert torch.equal(got[n], low[n].float())

    @FEW_REDUCTIONS
    def test_the_same_bits_every_time(self, reduction, backend, unpoisoned):
        tokens = 300 if backend == "torch" else 70
        target, inputs = labels(tokens, 90), make(tokens, 32, 90, True, torch.float32)
        first, douts = step(ours(target, reduction=reduction), inputs)
        # Triton's interpreter has no order to get wrong, and takes seconds for each.
        for _ in range(20 if backend == "torch" else 2):
            again, _ = step(ours(target, reduction=reduction), inputs, douts)
            assert all(torch.equal(again[n], first[n]) for n in first)

    @FEW_REDUCTIONS
    @pytest.mark.parametrize("dynamic", a_few([False, True], always=(1,)))
    def test_compiled(self, dynamic, reduction):
        def with_target(fn: Any) -> Any:
            return lambda x, weight: fn(x * 2, weight, labels_of(x), reduction=plain(reduction), softcap=3.0) * 2

        recomputing = functools.partial(pyckpt.linear_cross_entropy, recompute=reduction.endswith("again"))

        def labels_of(x: Tensor) -> Tensor:
            return torch.arange(x.shape[0]) % 9

        fn = torch.compile(with_target(recomputing), fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for tokens in (20, 33) if dynamic else (20,):
            check_exact(fn, with_target(reference.linear_cross_entropy), make(tokens, 5, 9))


@contextlib.contextmanager
def no_cycles_left() -> Iterator[None]:
    """Triton's interpreter leaves a kernel's arguments in a cycle, whose memory is let go when Python next looks."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def launched(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        gc.collect()

    gc.collect()
    gc.freeze()  # what there is already need not be looked at each time
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter.GridExecutor, "__call__", launched)
        yield
    gc.unfreeze()


@pytest.mark.usefixtures("backend")
class TestCost:
    VOCAB, WIDTH = 2000, 16

    def peak(self, tokens: int, reduction: str) -> int:
        inputs = make(tokens, self.WIDTH, self.VOCAB, dtype=torch.float32)
        target = labels(tokens, self.VOCAB)
        leaves = [t.requires_grad_() for t in inputs.values()]
        with pyckpt.measure.memory() as m, no_cycles_left():
            ours(target, reduction=reduction, softcap=20.0)(*leaves).sum().backward()
        return m.peak_bytes

    @pytest.mark.parametrize("reduction", ["mean", "none", "mean again"])
    @pytest.mark.parametrize("backend", a_few(["torch", "triton"], always=(0,)), indirect=True)
    def test_memory_is_flat_in_the_vocabulary(self, reduction, backend, monkeypatch):
        # The interpreter takes a row of a block of words at a time.
        few, many = (1000, 3000) if backend == "torch" else (150, 500)
        set_chunks(monkeypatch, 1 << 16, 32)
        small, large = self.peak(few, reduction), self.peak(many, reduction)
        per_token = (large - small) / (many - few)
        assert per_token < 4 * self.WIDTH * 4 + 64  # dx, its copies, and a few values of each token
        assert large < many * self.VOCAB * 4 / 4  # a quarter of the logits, of which PyTorch holds two or three

    @pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "label_smoothing": 0.1}], ids=["plain", "options"])
    @pytest.mark.parametrize("reduction", ["mean", "none", "mean again"])
    @pytest.mark.parametrize("backend", ["torch"], indirect=True)  # Triton's interpreter works on copies
    def test_one_chunk_of_logits_at_a_time(self, reduction, options, backend, monkeypatch):
        set_chunks(monkeypatch, 1, 32)  # 32 tokens
        inputs = {n: t.requires_grad_() for n, t in make(160, 8, self.VOCAB, dtype=torch.float32).items()}
        with pyckpt.measure.memory() as m:
            ours(labels(160, self.VOCAB), reduction=reduction, **options)(*inputs.values()).sum().backward()
        chunk, grads = 32 * self.VOCAB * 4, sum(t.nbytes for t in inputs.values())
        small = 40 * 160 * 4 + 4096  # a few values of each token
        assert m.peak_bytes < max(2 * grads, chunk + grads) + small < 2 * chunk + grads

    @pytest.mark.parametrize("reduction", ["none", "mean again"])
    @pytest.mark.parametrize("backend", ["torch"], indirect=True)
    def test_blocks_of_words_need_no_wide_gradient_of_the_weight(self, reduction, backend, monkeypatch):
        """Beyond the gradients: a block of logits in float32, what their gradient is rounded to, and dx in float32."""
        tokens, width, vocab, words = 64, 256, 16384, 256
        set_chunks(monkeypatch, 1, 32, words)
        inputs = {n: t.requires_grad_() for n, t in make(tokens, width, vocab, dtype=torch.bfloat16).items()}
        target = labels(tokens, vocab)

        def beyond(reduction: str) -> int:
            with pyckpt.measure.memory() as m:
                ours(target, reduction=reduction)(*inputs.values()).sum().backward()
            for t in inputs.values():
                t.grad = None
            return m.peak_bytes - sum(t.nbytes for t in inputs.values())

        block = words * (tokens * (4 + 2) + width * (4 + 2))  # its logits and its rows of dW, in float32 and rounded
        assert beyond(reduction) < 1.1 * block + tokens * width * 4 + 64 * tokens
        assert beyond("mean") > vocab * width * 4  # a float32 dW, beside the rounded one

    def test_what_is_saved_to_recompute(self):
        inputs = make(60, 16, 90, dtype=torch.float32)
        target = labels(60, 90)
        x, weight = (t.requires_grad_() for t in inputs.values())
        with pyckpt.measure.memory() as m:
            loss = ours(target, "mean again")(x, weight)
            gc.collect()
            lse = 60 * 4  # the others are the caller's
            assert m.saved_bytes == x.nbytes + weight.nbytes + target.nbytes + lse
            assert m.live_bytes <= loss.nbytes + 60 * 4
            del loss

    def test_what_is_saved(self):
        inputs = make(60, 16, 90, dtype=torch.float32)
        target = labels(60, 90)
        x, weight = (t.requires_grad_() for t in inputs.values())
        with pyckpt.measure.memory() as m:
            loss = pyckpt.linear_cross_entropy(x, weight, target)
            # dx, dW, and the labels, which the caller holds anyway.
            assert m.saved_bytes == x.nbytes + weight.nbytes + target.nbytes
            del loss
        with torch.no_grad(), pyckpt.measure.memory() as m:
            loss = pyckpt.linear_cross_entropy(x, weight, target)
            gc.collect()  # Triton's interpreter leaves a kernel's arguments in a cycle
            assert m.saved_bytes == 0
            assert m.live_bytes == loss.nbytes

    @pytest.mark.parametrize(("live", "products"), [("", 1), ("x", 2), ("weight", 2), ("x weight", 3)])
    def test_flops(self, live, products):
        leaves = {n: t.requires_grad_(n in live.split()) for n, t in make(30, 5, 9).items()}
        target = labels(30, 9)
        with FlopCounterMode(display=False) as m:
            loss = ours(target)(*leaves.values())
            if live:
                loss.backward()
        assert m.get_total_flops() == products * 2 * 30 * 5 * 9
        for reduction in ("none", "mean again"):
            with FlopCounterMode(display=False) as m:
                loss = ours(target, reduction=reduction)(*leaves.values())
                if live:
                    loss.sum().backward()
            # The logits are made again.
            assert m.get_total_flops() == (products + bool(live)) * 2 * 30 * 5 * 9


@pytest.mark.parametrize("name", ["softcap", "z_loss", "label_smoothing", "ignore_index"])
def test_numbers_that_vary_stay_in_one_graph(name):
    x, weight, target = torch.randn(4, 5), torch.randn(9, 5), torch.tensor([0, 3, 2, 1])

    def fn(value: float) -> Tensor:
        return pyckpt.linear_cross_entropy(
            x, weight, target, **{name: int(value * 4) if name == "ignore_index" else value}
        )

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for value in (0.5, 0.25, 0.75):
        torch.testing.assert_close(compiled(value), fn(value))


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"x": torch.randn(4, 6)},
                r"x must be \(\.\.\., D\) and weight \(V, D\), got shapes \(4, 6\) and \(9, 5\)",
            ),
            ({"weight": torch.randn(9)}, r"x must be \(\.\.\., D\) and weight \(V, D\)"),
            ({"x": torch.randn(4, 5).double()}, "x has dtype torch.float64 and weight has torch.float32"),
            ({"x": torch.ones(4, 5, dtype=torch.int64)}, "x has dtype torch.int64, expected one of"),
            ({"weight": torch.randn(9, 5, device="meta")}, "x is on cpu and weight is on meta"),
            ({"bias": torch.randn(8)}, r"bias has shape \(8,\), expected \(9,\)"),
            ({"bias": torch.randn(9, device="meta")}, "bias is on meta, x is on cpu"),
            ({"target": torch.zeros(3, dtype=torch.int64)}, r"target has shape \(3,\), expected \(4,\)"),
            ({"target": torch.zeros(4, dtype=torch.int32)}, "labels have dtype torch.int32, expected int64"),
            ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, "labels are on meta, x is on cpu"),
            ({"target": torch.tensor([0, 9, 1, 2])}, "label 9 is out of range: expected 0 to 8, or -100"),
            ({"target": torch.tensor([0, -1, 1, 2])}, "label -1 is out of range"),
            ({"target": torch.tensor([0, -100, 1, 2]), "ignore_index": -1}, "label -100 is out of range"),
            ({"reduction": "max"}, "reduction='max' does not exist; expected one of mean, sum, none"),
            ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
            ({"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\], got nan"),
            ({"softcap": -2.0}, "softcap must be None or a positive number, got -2.0"),
            ({"softcap": torch.tensor(2.0, requires_grad=True)}, "softcap gets no gradient here"),
            ({"z_loss": torch.tensor(0.1, requires_grad=True)}, "z_loss gets no gradient here"),
            ({"label_smoothing": torch.tensor(0.1, requires_grad=True)}, "label_smoothing gets no gradient here"),
            ({"token_weight": torch.ones(3)}, r"token_weight has shape \(3,\), expected \(4,\)"),
            ({"token_weight": torch.ones(4, dtype=torch.int64)}, "token_weight has dtype torch.int64, expected one of"),
            ({"token_weight": torch.ones(4, device="meta")}, "token_weight is on meta, the labels are on cpu"),
            (
                {"token_weight": torch.ones(4, requires_grad=True)},
                "token_weight gets no gradient: pass",
            ),
            ({"class_weight": torch.ones(4)}, r"class_weight has shape \(4,\), expected \(9,\)"),
            (
                {"class_weight": torch.ones(9), "label_smoothing": 0.1},
                "class_weight goes with no label_smoothing",
            ),
            ({"weight": torch.randn(0, 5)}, r"weight has no rows: expected \(V, D\).*, got shape \(0, 5\)"),
            ({"bias": torch.ones(9, dtype=torch.int64)}, "bias has dtype torch.int64, expected one of"),
            ({"bias": torch.ones(9) * 1j}, "bias has dtype torch.complex64, expected one of"),
            ({"z_loss": float("nan")}, "z_loss must be a finite number, got nan"),
            ({"ignore_index": 2**64}, "ignore_index must be an int of 64 bits, got 18446744073709551616"),
            ({"x": torch.randn(4, 5).to_sparse()}, "x has layout torch.sparse_coo, expected a dense tensor"),
        ],
        ids=range(32),
    )
    def test_values(self, change, message):
        good = {"x": torch.randn(4, 5), "weight": torch.randn(9, 5), "target": torch.zeros(4, dtype=torch.int64)}
        with pytest.raises(ValueError, match=message):
            pyckpt.linear_cross_entropy(**good | change)

    def test_types(self):
        good = {"x": torch.randn(4, 5), "weight": torch.randn(9, 5), "target": torch.zeros(4, dtype=torch.int64)}
        for name in (*good, "bias", "token_weight", "class_weight"):
            with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got list"):
                pyckpt.linear_cross_entropy(**good | {name: [1.0]})
        for index in (True, -100.0, None):
            with pytest.raises(TypeError, match=f"ignore_index must be an int, got {index}"):
                pyckpt.linear_cross_entropy(**good, ignore_index=index)
        with pytest.raises(TypeError, match="ignore_index must be an int, got "):
            pyckpt.linear_cross_entropy(**good, ignore_index=torch.tensor(-1.0))
        for name in ("softcap", "z_loss", "label_smoothing"):
            for value in ("1", True, torch.ones(2), [0.1]):
                with pytest.raises(TypeError, match=f"{name} must be .*, got "):
                    pyckpt.linear_cross_entropy(**good | {name: value})
        for name in ("z_loss", "label_smoothing"):
            with pytest.raises(TypeError, match=f"{name} must be .*, got None"):
                pyckpt.linear_cross_entropy(**good | {name: None})

    def test_numbers_of_every_kind(self):
        good = {"x": torch.randn(4, 5), "weight": torch.randn(9, 5), "target": torch.tensor([0, 3, 8, 2])}
        options = {"softcap": 2.0, "z_loss": 0.5, "label_smoothing": 0.25}
        want = pyckpt.linear_cross_entropy(**good, **options, ignore_index=3)
        for as_float, as_int in ((np.float32, np.int64), (torch.tensor, torch.tensor)):
            given = {n: as_float(v) for n, v in options.items()}
            assert torch.equal(pyckpt.linear_cross_entropy(**good, **given, ignore_index=as_int(3)), want)

    def test_nested_tensors(self):
        good = {"x": torch.randn(4, 5), "weight": torch.randn(9, 5), "target": torch.zeros(4, dtype=torch.int64)}
        with pytest.raises(ValueError, match="x is a nested tensor, expected a dense one"):
            pyckpt.linear_cross_entropy(**good | {"x": torch.nested.nested_tensor([torch.randn(2, 5)] * 2)})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1e-8, 3.0])
def test_small_weights_of_tokens_in_float16(size, recompute, reduction):
    """Gradients that are made in the forward, before a scale lifts them, are not nothing."""
    x, weight = torch.randn(40, 16).half(), (torch.randn(30, 16) / 4).half()
    target, token_weight = torch.randint(30, (40,)), torch.rand(40) * size
    found = []
    for dtype in (torch.float16, torch.float64):
        a, b = (t.clone().to(dtype).requires_grad_() for t in (x, weight))
        loss = pyckpt.linear_cross_entropy(
            a, b, target, token_weight=token_weight, reduction=reduction, recompute=recompute
        )
        loss.backward(torch.tensor(65536.0 * (1.0 if reduction == "mean" else 1e-4 / size), dtype=loss.dtype))
        found.append((a.grad.double(), b.grad.double()))
    for ours, truth in zip(*found, strict=True):
        assert (ours - truth).norm() <= 2e-3 * truth.norm()  # two roundings to half are 5e-4 each


@pytest.mark.parametrize("tokens", [40, 20], ids=["by-tokens", "by-words"])
@pytest.mark.parametrize(
    "how", [{"reduction": "sum"}, {"reduction": "sum", "recompute": True}, {"reduction": "none"}], ids=range(3)
)
def test_a_float32_bias_keeps_its_gradient_beside_half_weights(how, tokens, backend):
    x, weight, bias = torch.randn(tokens, 16).half(), torch.randn(30, 16).half(), torch.randn(30, requires_grad=True)
    target = torch.randint(3, (tokens,))
    loss = pyckpt.linear_cross_entropy(x, weight, target, bias=bias, **how)
    loss.backward(torch.full_like(loss, 3e4))
    exact = bias.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ weight.double().t() + exact, target, reduction="sum").backward(torch.tensor(3e4))
    assert bias.grad.dtype == torch.float32 and bias.grad.abs().max() > 66000
    # Of logits that are rounded to half, as the products of x and weight are: of some ten, by 2 ** -8.
    assert (bias.grad.double() - exact.grad).norm() <= 1e-2 * exact.grad.norm()


@pytest.mark.parametrize("size", [1e-5, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_weights_of_a_token_are_multiplied_in_the_losses_dtype(dtype, size):
    """float16 holds neither the product of two small ones nor that of two large ones."""
    x, weight = torch.randn(6, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    target = torch.randint(5, (6,))
    tokens, classes = ((torch.rand(n) * size + size).half() for n in (6, 5))
    weights = tokens.double() * classes.double()[target]
    losses = F.cross_entropy(x.double() @ weight.double().t(), target, reduction="none")
    loss = pyckpt.linear_cross_entropy(x, weight, target, token_weight=tokens, class_weight=classes)
    error = abs(loss.double() - (losses * weights).sum() / weights.sum())
    assert error <= 20 * torch.finfo(dtype).eps * losses.max()


def test_no_dims(backend):
    """The logits are the bias."""
    target, bias = torch.tensor([0, 3, -100]), torch.randn(5, requires_grad=True)
    x, weight = (torch.randn(n, 0, requires_grad=True) for n in (3, 5))
    loss = pyckpt.linear_cross_entropy(x, weight, target, bias=bias)
    loss.backward()
    exact = bias.detach().clone().requires_grad_()
    F.cross_entropy(exact.expand(3, 5), target).backward()
    torch.testing.assert_close(bias.grad, exact.grad)
    assert x.grad.shape == (3, 0) and weight.grad.shape == (5, 0)
