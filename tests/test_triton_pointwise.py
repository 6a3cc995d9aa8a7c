"""The Triton norm, activation and RoPE kernels where the ops' own tests do not reach: wide rows, many rows, a GPU.

On a GPU as they are, without one in Triton's interpreter. The ops' tests (test_norm_op, test_activation_op,
test_rope_op) run on these kernels as well.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from blocks import OPTIONS, assert_as_good, assert_same_bits, make_block, make_input, plain_twin, step
from helpers import a_few, assert_close_to_truth, assert_exact, check_exact, check_truth
from torch import Tensor

import pyckpt
from pyckpt.ops import linear_cross_entropy_triton, philox, reference, triton_backend
from pyckpt.ops.rope import rope_tables
from pyckpt.save import SAVE_SETS
from pyckpt.spec import GATED_MLPS, MLPS

norm, norm_bwd = triton_backend.kernels("norm"), triton_backend.kernels("norm_bwd")
place = triton_backend.kernels("activation")._place
ops = torch.ops.pyckpt
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LOW = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
EPS = 1e-3
NORMS = pytest.mark.parametrize("kind", ["rms", "layer"])


@pytest.fixture(autouse=True)
def forced(monkeypatch) -> None:
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def norms(kind: str) -> tuple[Any, Any, Any]:
    if kind == "rms":
        return (
            lambda x, w: pyckpt.rms_norm(x, w, EPS),
            lambda x, w: reference.rms_norm(x, w, EPS),
            lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        )
    return (
        lambda x, w, b: pyckpt.layer_norm(x, w, b, EPS),
        lambda x, w, b: reference.layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
    )


def norm_inputs(kind: str, rows: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    inputs = {"x": randn(rows, width, dtype=dtype), "weight": randn(width, dtype=dtype)}
    return inputs if kind == "rms" else inputs | {"bias": randn(width, dtype=dtype)}


class TestNorm:
    @NORMS
    @pytest.mark.parametrize(
        ("rows", "width"), a_few([(3, 16384), (2, 16385), (3, 20001), (50, 8193)], always=(0, 1, 2), names=2)
    )
    def test_wide_rows(self, rows, width, kind):
        check_exact(*norms(kind)[:2], norm_inputs(kind, rows, width), terms=100.0)

    @NORMS
    @pytest.mark.parametrize(
        ("rows", "width"), a_few([(700, 5), (2049, 64), (333, 128), (65, 1000)], always=(1, 3), names=2)
    )
    def test_many_rows(self, rows, width, kind):
        check_exact(*norms(kind)[:2], norm_inputs(kind, rows, width), terms=100.0)

    @NORMS
    @pytest.mark.parametrize("dtype", a_few(LOW, always=(1,)))
    @pytest.mark.parametrize(
        ("rows", "width"), a_few([(65, 1000), (9, 20001), (19, 4096), (9, 16384)], always=(0, 1, 2), names=2)
    )
    def test_against_pytorch(self, rows, width, dtype, kind):
        ours, formula, plain = norms(kind)
        # A weight's gradient sums over the rows, in another order than PyTorch's.
        terms = dict.fromkeys(("dweight", "dbias"), rows**0.5)
        check_truth(ours, plain, formula, norm_inputs(kind, rows, width, dtype), terms_of=terms)

    @NORMS
    @pytest.mark.parametrize("width", [33, 9000])
    def test_residual(self, width, kind, monkeypatch):
        """y is the norm of the stored sum; columns beyond `FORWARD_COLUMNS` go the wide way."""
        monkeypatch.setattr(norm, "FORWARD_COLUMNS", 4096)
        for dtype in (torch.float64, torch.float32, torch.float16):
            x, r, w = randn(7, width, dtype=dtype), randn(7, width, dtype=dtype), randn(width, dtype=dtype)
            y, total, mean, rstd = norm.forward(x, w, None, EPS, centered=kind == "layer", residual=r)
            assert torch.equal(total, x + r)
            again = norm.forward(total, w, None, EPS, centered=kind == "layer")
            for got, want in zip((y, mean, rstd), (again[0], *again[2:]), strict=True):
                assert got is want is None or torch.equal(got, want)

    @NORMS
    @pytest.mark.parametrize("width", [33, 9000])
    def test_strided_rows_and_gradients_over_their_inputs(self, width, kind):
        base = randn(9, 2 * width)
        x, dy, w = base[:, width:], randn(9, width + 3)[:, 3:], randn(width)
        _, _, mean, rstd = norm.forward(x, w, None, EPS, centered=kind == "layer")
        want = torch.empty_like(x)
        dw, _ = norm_bwd.backward(dy, x, w, mean, rstd, want, add=False, need_dw=True)
        for over in (dy.clone(), base.clone()[:, width:]):
            a, b = (over, x) if over.is_contiguous() else (dy, over)
            again, _ = norm_bwd.backward(a, b, w, mean, rstd, over, add=False, need_dw=True)
            assert_exact(over, want)
            assert torch.equal(dw, again)

    @NORMS
    @pytest.mark.parametrize("dtype", a_few(LOW, always=(1,)))
    @pytest.mark.parametrize(
        ("rows", "width"), a_few([(67, 96), (19, 4096), (65, 1000), (13, 5120), (9, 16384)], always=(0, 1), names=2)
    )
    def test_adding_to_a_gradient(self, rows, width, dtype, kind):
        """Whatever way the rows go, what was there and what comes to it are rounded once, together."""
        x, dy, w, before = (randn(*s, dtype=dtype) for s in ((rows, width), (rows, width), (width,), (rows, width)))
        exact = [t.double() for t in (x, dy, w, before)]
        dx, total, truth = torch.empty_like(x), before.clone(), exact[3].clone()
        _, _, mean, rstd = norm.forward(exact[0], exact[2], None, EPS, centered=kind == "layer")
        norm_bwd.backward(exact[1], exact[0], exact[2], mean, rstd, truth, add=True, need_dw=False)
        stats = (None if mean is None else mean.float(), rstd.float())
        dw = norm_bwd.backward(dy, x, w, *stats, dx, add=False, need_dw=True)
        again = norm_bwd.backward(dy, x, w, *stats, total, add=True, need_dw=True)
        assert_close_to_truth(total, before + dx, truth)
        for a, b in zip(dw, again, strict=True):  # the sums of as many rows, in an order that may differ
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * rows**0.5)

    @NORMS
    def test_the_same_bits_every_time(self, kind):
        inputs = norm_inputs(kind, 300, 96, torch.float32)
        leaves = [t.requires_grad_() for t in inputs.values()]
        dy = torch.randn_like(inputs["x"])
        runs = [torch.autograd.grad(norms(kind)[0](*leaves), leaves, dy) for _ in range(3)]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))

    @pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
    @pytest.mark.parametrize("width", [64, 20001])
    def test_squares_that_pass_float32(self, width):
        """The row becomes 0, as in PyTorch and from the other backends, and not NaN."""
        x = torch.full((2, width), 1e20, device=DEVICE)
        y, rstd = ops.rms_norm_fwd(x, None, EPS)
        assert (rstd == 0).all() and torch.equal(y, F.rms_norm(x, (width,), None, EPS))

    def test_an_eps_that_float32_has_not(self):
        x = torch.zeros(1, 4, dtype=torch.float64, device=DEVICE)
        assert_exact(ops.rms_norm_fwd(x, None, 0.1)[1], torch.full((1,), 0.1**-0.5, dtype=torch.float64, device=DEVICE))


@triton.jit
def last_place(p_out, width, last, BLOCK: tl.constexpr):
    """Row and first column of the last program."""
    if tl.program_id(0) == last:
        row, o_c, m = place(width, BLOCK)
        tl.store(p_out, row)
        tl.store(p_out + 1, tl.min(o_c, 0))
        tl.store(p_out + 2, tl.sum(m.to(tl.int32), 0))


class TestPointwise:
    @pytest.mark.parametrize("missing", [1, 100, 5000])
    def test_one_row_of_nearly_31_bits(self, missing):
        """As the launcher makes of rows without gaps."""
        width, block = 2**31 - missing, 1 << 16
        programs = -(-width // block)
        out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        last_place[(programs,)](out, width, programs - 1, BLOCK=block)
        start = (programs - 1) * block
        assert out.tolist() == [0, start, width - start]

    @pytest.mark.parametrize("kind", MLPS)
    def test_one_projection_for_gate_and_up(self, kind):
        """Halves of one product: rows with a gap between them."""
        both, dact = randn(20, 2 * 1025), randn(20, 1025)
        gate, up = both[:, :1025], both[:, 1025:]
        if kind in GATED_MLPS:
            want = ops.glu_bwd(dact, gate.contiguous(), up.contiguous(), kind)
            ops.glu_bwd_(dact, gate, up, kind)
            got = (dact, gate, up)
        else:
            want = ops.act_bwd(dact, gate.contiguous(), kind)
            ops.act_bwd_(dact, gate, kind)
            got = (dact, gate)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    @pytest.mark.parametrize("kind", MLPS)
    def test_not_a_number_is_passed_on(self, kind):
        x = torch.full((3,), float("nan"), device=DEVICE)
        act, *grads = ops.glu_bwd(x, x, x, kind) if kind in GATED_MLPS else ops.act_bwd(x, x, kind)
        assert all(t.isnan().all() for t in (act, *grads))

    @pytest.mark.parametrize("shape", [(20, 4096), (33, 1), (5, 2051)])
    def test_dropout_keeps_what_pytorch_keeps(self, shape):
        seed, first, rate = 2**41 + 3, 2**32 - 7, 0.2
        x, residual = (randn(*shape, dtype=torch.float32) for _ in range(2))
        keep = philox.kept_rows(rate, seed, (first, first + shape[0]), shape[1], x.device)
        out = torch.empty_like(x)
        ops.dropout_(x, residual, out, rate, seed, first)
        assert torch.equal(out[~keep], residual[~keep])
        wanted = residual.double() + x.double() * keep / (1 - rate)
        roundings = 2 * torch.finfo(torch.float32).eps * (residual.abs() + 2 * x.abs())  # of the product, of the sum
        assert ((out - wanted).abs() <= roundings).all()

    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 2), (16, 17)])
    @pytest.mark.parametrize(("dim", "rotary"), [(6, 4), (64, 64), (80, 32)])
    def test_rope_of_q_and_k_together(self, dim, rotary, heads, kv_heads, interleaved, monkeypatch):
        """One launch gives what one for each gives, to the bit, in place on views with other columns behind them."""
        width = (heads + kv_heads) * dim
        made = randn(2, 19, width + 3, dtype=torch.float32)
        q, k = (t.unflatten(-1, (-1, dim)) for t in made[..., :width].split([heads * dim, kv_heads * dim], -1))
        tables = rope_tables(torch.arange(38, device=DEVICE).view(2, 19), rotary, 1e4)
        launches, module = [], triton_backend.kernels("rope")
        rotate = module.rotate
        monkeypatch.setattr(module, "rotate", lambda *args: launches.append(args) or rotate(*args))
        for inverse in (False, True):
            want = [ops.rope(t.clone(), *tables, inverse, interleaved) for t in (q, k)]
            rest = made[..., width:].clone()
            launches.clear()
            ops.rope_qk_(q, k, *tables, inverse, interleaved)
            assert len(launches) == 1
            assert torch.equal(q, want[0])
            assert torch.equal(k, want[1])
            assert torch.equal(made[..., width:], rest)

    def test_rope_in_place_on_every_second_value(self):
        """What lies between them is not written."""
        large = torch.randn(7, 2, 32, device=DEVICE)
        before, x = large.clone(), large[..., ::2]
        tables = rope_tables(torch.arange(7, device=DEVICE), 16, 1e4)
        want = ops.rope(x.contiguous(), *tables, False, False)
        ops.rope_(x, *tables, False, False)
        assert torch.equal(x, want)
        assert torch.equal(large[..., 1::2], before[..., 1::2])
        other = before[..., ::2]
        ops.rope_qk_(other, x, *tables, False, False)
        assert torch.equal(other, want)

    @pytest.mark.parametrize("heads", [1, 7, 8, 17])
    @pytest.mark.parametrize("dim", [2, 80, 128, 256])
    def test_rope_in_place_on_a_view_of_qkv(self, dim, heads):
        qkv = randn(37, (heads + 2) * dim)
        before = qkv.clone()
        q = qkv[:, : heads * dim].unflatten(1, (heads, dim))
        tables = rope_tables(torch.arange(37, device=DEVICE), dim, 1e4, dtype=torch.float64)
        want = ops.rope(before[:, : heads * dim].unflatten(1, (heads, dim)), *tables, False, False)
        ops.rope_(q, *tables, False, False)
        assert torch.equal(q, want)
        assert torch.equal(qkv[:, heads * dim :], before[:, heads * dim :])
        ops.rope_(q, *tables, True, False)
        assert_exact(qkv, before)


class TestLoss:
    """What test_linear_cross_entropy, which runs on the kernel too, does not reach."""

    @pytest.mark.parametrize("vocab", [2048, 2049, 4096, 6151])
    @pytest.mark.parametrize("dtype", a_few(LOW, always=(1,)))
    def test_wide_vocabularies(self, vocab, dtype):
        target = torch.randint(0, vocab, (33,), device=DEVICE)
        target[5] = -100
        options = {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1}

        def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return pyckpt.linear_cross_entropy(x, w, target, bias=b, **options)

        def formula(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return reference.linear_cross_entropy(x, w, target, bias=b, **options)

        shapes = {"x": (33, 24), "weight": (vocab, 24), "bias": (vocab,)}
        inputs = {n: randn(*s, dtype=dtype) / s[-1] ** 0.5 for n, s in shapes.items()}
        # Gradients are sums of a probability times a value of about 1, times 1 / 32. The loss is one number, which
        # PyTorch may round luckily: allow the rounding of the logits that it comes from.
        terms = dict.fromkeys(("dx", "dweight"), 1 / 32) | {"dbias": 33**0.5 / 32}
        terms["out 0"] = 3 * 9.0 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        check_truth(ours, formula, formula, inputs, terms_of=terms)

    @pytest.mark.parametrize("dtype", LOW)
    def test_rows_of_logits_start_where_reads_are_wide(self, dtype):
        """`make aot` compiles the kernel for a stride that 16 divides; Triton has another one for the rest, slower."""
        head = linear_cross_entropy_triton.InPlaceHead(randn(50257, 8, dtype=dtype), None, -100, 0.0, 0.0, 0.0)
        logits = head._logits(randn(3, 8, dtype=dtype))
        assert logits.shape == (3, 50257)
        assert logits.stride(0) % 16 == 0

    def test_a_padded_vocabulary_in_memory(self):
        """Rows that start at multiples of 16 values: what lies between them is not read and not written."""
        rows = randn(3, 16, dtype=torch.float32)
        rows[:, 13:] = float("nan")
        target = torch.tensor([3, 0, 12], device=DEVICE)
        loss, lse = (torch.empty(3, device=DEVICE) for _ in range(2))
        want = F.cross_entropy(rows[:, :13].double(), target, reduction="none")
        run = triton_backend.kernels("cross_entropy").cross_entropy
        options = {"ignore_index": -100, "softcap": 0.0, "z_loss": 0.0, "smoothing": 0.0, "gradient": True}
        run(rows[:, :13], None, target, None, loss, lse, **options)
        assert (loss - want).abs().max() < 1e-5
        assert rows[:, 13:].isnan().all()
        assert rows[:, :13].sum(1).abs().max() < 1e-5

    def test_a_label_that_nobody_checked(self):
        """Compiled code checks no labels: one outside the vocabulary shows in the loss, and reads no foreign memory."""
        x, w = randn(4, 6, dtype=torch.float32), randn(7, 6, dtype=torch.float32)
        for bad in (7, -1, 2**40):
            target = torch.tensor([1, bad, 3, 0], device=DEVICE)
            options = (-100, 0.0, 0.0, 0.0)
            loss = ops.linear_cross_entropy_fwd(x, w, None, target, *options, None, "none", False, False, False)[0]
            assert loss.isnan().tolist() == [False, True, False, False]


class TestOps:
    @pytest.mark.slow
    def test_opcheck(self):
        x, w, b, dy = (randn(*s, dtype=torch.float32) for s in ((5, 6), (6,), (6,), (5, 6)))
        _, rstd = ops.rms_norm_fwd(x, w, EPS)
        _, mean, rstd_too = ops.layer_norm_fwd(x, w, b, EPS)
        cos, sin = rope_tables(torch.arange(5, device=DEVICE), 6, 1e4)
        samples = {
            "rms_norm_fwd": (x, w, EPS),
            "rms_norm_bwd": (dy, x, w, rstd, True),
            "rms_norm_bwd_add_": (dy, x, w, rstd, dy.clone(), True),
            "layer_norm_fwd": (x, w, b, EPS),
            "layer_norm_bwd": (dy, x, w, mean, rstd_too, True),
            "layer_norm_bwd_add_": (dy, x, w, mean, rstd_too, dy.clone(), False),
            "add_rms_norm_fwd": (x, dy, w, EPS),
            "add_layer_norm_fwd": (x, dy, w, b, EPS),
            "glu_fwd": (x, dy, "swiglu"),
            "glu_fwd_": (x.clone(), dy, "geglu"),
            "glu_bwd": (dy, x, dy.clone(), "swiglu"),
            "glu_bwd_": (dy.clone(), x.clone(), dy.clone(), "geglu_tanh"),
            "act_fwd": (x, "relu2"),
            "act_fwd_": (x.clone(), "gelu"),
            "act_bwd": (dy, x, "gelu"),
            "act_bwd_": (dy.clone(), x.clone(), "gelu_tanh"),
            "rope": (x.view(5, 1, 6), cos, sin, False, False),
            "attention_merge_": (randn(2, 5, 4, 3), randn(2, 4, 5), randn(2, 5, 4, 3), randn(2, 4, 5)),
            "rope_": (x.clone().view(5, 1, 6), cos, sin, True, True),
        }
        target, options = torch.tensor([1, -100, 3, 0, 4], device=DEVICE), (-100, 3.0, 0.01, 0.1)
        head = (x, randn(7, 6, dtype=torch.float32), None, target, *options)
        lse = ops.linear_cross_entropy_fwd(*head, None, "none", False, False, False)[1]
        samples["linear_cross_entropy_fwd"] = (*head, None, "mean", True, True, False)
        samples["linear_cross_entropy_bwd"] = (randn(5, dtype=torch.float32), lse, *head, True, False, False)
        for name, args in samples.items():
            torch.library.opcheck(getattr(ops, name).default, args)

    def test_every_op_has_kernels(self):
        from pyckpt.ops.registry import IMPLEMENTATIONS, choose

        for name in IMPLEMENTATIONS:
            if name != "add_product_":  # the library's
                assert choose(name, DEVICE)[0] == "triton", name
                assert choose(name, "cuda")[0] == "triton", name


class TestBlock:
    """The whole block on Triton kernels."""

    @pytest.mark.parametrize("packed", a_few([False, True], always=(1,)))
    @pytest.mark.parametrize("name", a_few(OPTIONS, always=range(0, len(OPTIONS), 7)))
    def test_parity(self, name, packed):
        options = OPTIONS[name]
        block = make_block(**options).to(DEVICE)
        x, cu = make_input(packed)
        x, cu = x.to(DEVICE), None if cu is None else cu.to(DEVICE)
        dy = torch.randn_like(x)
        truth = step(plain_twin(block, torch.float64, **options).to(DEVICE), x, dy, cu)
        dtype = torch.float32
        plain = step(plain_twin(block, dtype, **options).to(DEVICE), x.to(dtype), dy.to(dtype), cu)
        got = step(block.to(dtype), x.to(dtype), dy.to(dtype), cu)
        assert_as_good(got, plain, truth, dtype)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["llama", "gpt2-like", "parallel_shared", "gemma2-like", "bert-like"])
    def test_save_sets_and_tiles(self, name):
        block = make_block(torch.float32, **OPTIONS[name]).to(DEVICE)
        x = make_input(False, torch.float32)[0].to(DEVICE)
        dy = torch.randn_like(x)
        block.tile = 16
        first = step(block, x, dy)
        for save in SAVE_SETS:
            block.save = save
            assert_same_bits(step(block, x, dy), first)
