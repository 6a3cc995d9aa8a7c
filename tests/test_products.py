"""Products that are summed into a wider accumulator."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyckpt.ops import products
from pyckpt.tokenwise.gradients import WeightGradients

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums(dtype):
    a, b = torch.randn(70, 30).to(DEVICE, dtype), torch.randn(30, 50).to(DEVICE, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = products.product(a, b, wide)
    assert total.dtype == wide
    torch.ops.pyckpt.add_product_(total, a, b)
    want = 2 * (a.double() @ b.double())
    # Without the wide products, each is rounded to its factors' dtype.
    eps = torch.finfo(wide if GPU else dtype).eps
    assert (total - want).abs().max() <= 30 * eps * want.abs().max()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_temporary_on_a_gpu(dtype):
    dy, x = (torch.randn(512, 1024, device="cuda", dtype=dtype) for _ in range(2))
    grads = WeightGradients(["w"], 3)
    grads.add_product("w", dy, x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        grads.add_product("w", dy, x)
    # Less than a product: what the library keeps for itself aside.
    assert torch.cuda.max_memory_allocated() - before < 1024 * 1024 * dtype.itemsize
    want = 3 * dy.double().t() @ x.double()
    got = grads.result("w", torch.empty(1024, 1024, device="cuda"))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


META_WIDENS = pytest.mark.skipif(torch.__version__ < "2.12", reason="the meta kernel of addmm knows no out_dtype")


@META_WIDENS
def test_a_wide_product_is_asked_for_where_it_exists(monkeypatch):
    """On a CPU there is none: the calls are looked at, by shape and dtype alone."""
    monkeypatch.setattr(products, "_widens", lambda *_: True)
    a, b = (torch.empty(4, 4, device="meta", dtype=torch.bfloat16) for _ in range(2))
    total = products.product(a, b, torch.float32)
    assert total.dtype == torch.float32
    products.add_product_(total, a, b)


@META_WIDENS
def test_a_counter_of_flops_does_not_decide_whether_it_exists():
    """The answer is kept: a first backward under the counter would round every product from then on."""
    products._tried.cache_clear()
    with FlopCounterMode(display=False) as m:
        assert products._tried(torch.device("meta"), torch.bfloat16, torch.float32)
    assert m.get_total_flops() == 0


def test_flops_are_counted():
    """Through the op: PyTorch's counter fails on the wide addmm."""
    total, a, b = torch.zeros(4, 6), torch.randn(4, 5).bfloat16(), torch.randn(5, 6).bfloat16()
    with FlopCounterMode(display=False) as m:
        torch.ops.pyckpt.add_product_(total, a, b)
    assert m.get_total_flops() == 2 * 4 * 5 * 6
    assert (total - a.double() @ b.double()).abs().max() < 0.1
