"""The functions that the CUDA C++ kernels are made of, built for the host and held against PyTorch. No nvcc needed."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_truth
from torch import Tensor

from pyckpt.ops import philox, reference
from pyckpt.ops.activation import FUNCTIONS

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(shutil.which, ("g++", "c++", "clang++")), None)

pytestmark = [
    pytest.mark.xdist_group("csrc_host"),
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("host") / "host.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command = [str(COMPILER), *flags, f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "csrc_host.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.log_sum_exp.restype = loaded.sum_over_warps.restype = ctypes.c_float
    return loaded


def call(function: Any, *args: Tensor | int) -> Any:
    """Call a C function with the data of tensors and with 64-bit integers."""
    assert all(t.is_contiguous() for t in args if isinstance(t, Tensor))
    return function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in args))


NAMES = ("silu", "gelu", "gelu_tanh", "relu2")
KIND_OF = {function: kind for kind, function in FUNCTIONS.items()}


@pytest.mark.parametrize("scale", [1.0, 4.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_activations_and_their_slopes(host, name, scale):
    x = torch.randn(4099) * scale
    value, value_too, slope = (torch.empty_like(x) for _ in range(3))
    call(host.activation, NAMES.index(name), x.numel(), x, value, value_too, slope)
    assert torch.equal(value, value_too)

    def differentiated(x: Tensor, fn: Any) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = fn(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    plain = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x).square(),
    }[name]
    truth = differentiated(x.double(), lambda x: reference.phi(x, KIND_OF[name]))
    ordinary = differentiated(x, plain)
    for what, got, ref, want in zip(("value", "slope"), (value, slope), ordinary, truth, strict=True):
        assert_close_to_truth(got, ref, want, what=f"{name}'s {what}")


@pytest.mark.parametrize("name", NAMES)
def test_activations_of_what_is_not_finite(host, name):
    x = torch.tensor([float("nan"), float("inf"), -0.0, -3e38])
    value, value_too, slope = (torch.empty_like(x) for _ in range(3))
    call(host.activation, NAMES.index(name), 4, x, value, value_too, slope)
    assert value[0].isnan() and slope[0].isnan()
    assert value[1] == float("inf")
    assert value[2] == 0 and value[3] == 0


def test_philox_draws_what_pytorch_draws(host):
    seed = int(torch.randint(0, 2**62, ()))
    counters = torch.randint(0, 2**32, (257, 4))
    narrow = counters.to(torch.int32)  # the same 32 bits
    words = torch.empty_like(narrow)
    call(host.philox_words, seed, 257, narrow, words)
    want = torch.stack(philox.philox(seed, tuple(counters.unbind(1))), 1)
    assert torch.equal(words.long() & 0xFFFFFFFF, want)


def test_philox_known_answer(host):
    """The authors' own: counter and key of ones (Random123, kat_vectors)."""
    ones = torch.full((1, 4), -1, dtype=torch.int32)
    words = torch.empty_like(ones)
    call(host.philox_words, -1, 1, ones, words)
    want = [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert (words.long() & 0xFFFFFFFF)[0].tolist() == want


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**40 + 1])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.999])
def test_dropout_keeps_what_pytorch_keeps(host, first, rate):
    seed = 2**41 + 3
    keep = torch.empty(7, 1031, dtype=torch.bool)
    call(host.kept_rows, seed, first, 7, 1031, philox.threshold(rate), keep)
    assert torch.equal(keep, philox.kept_rows(rate, seed, (first, first + 7), 1031, keep.device))


def test_rotation_and_its_inverse(host):
    a, b, angle = torch.randn(3, 1001)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.complex(a, b).to(torch.complex128) * torch.complex(cos, sin).to(torch.complex128)
    x, y = a.clone(), b.clone()
    call(host.rotate_pairs, 1001, x, y, cos, sin)
    plain = torch.complex(a, b) * torch.complex(cos, sin)
    assert_close_to_truth(x, plain.real, turned.real)
    assert_close_to_truth(y, plain.imag, turned.imag)
    call(host.rotate_pairs, 1001, x, y, cos, -sin)
    assert torch.allclose(x, a, atol=1e-5) and torch.allclose(y, b, atol=1e-5)


def test_merging_two_attentions(host):
    lse0, lse1 = torch.randn(2, 1003) * 20
    inf = float("inf")
    lse0[:3], lse1[:3] = torch.tensor([-inf, 1.0, -inf]), torch.tensor([2.0, -inf, -inf])
    lse, first, second = torch.empty(3, 1003)
    call(host.merge, 1003, lse0, lse1, lse, first, second)
    want = torch.logaddexp(lse0.double(), lse1.double())
    assert_close_to_truth(lse, torch.logaddexp(lse0, lse1), want)
    for share, part in ((first, lse0), (second, lse1)):
        want_share = torch.exp(part.double() - want.masked_fill(want == -inf, 0.0))
        plain = torch.exp(part - torch.logaddexp(lse0, lse1).masked_fill(want == -inf, 0.0))
        assert_close_to_truth(share, plain, want_share)
    assert first[:3].tolist() == [0.0, 1.0, 0.0] and second[:3].tolist() == [1.0, 0.0, 0.0]
    assert lse[:3].tolist() == [2.0, 1.0, -inf]


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16, 32])
def test_sums_over_lanes(host, lanes):
    values = torch.randn(32)
    sums = torch.empty(32)
    call(host.sum_over_lanes, values, lanes, sums)
    groups = values.double().view(-1, lanes).sum(1, keepdim=True).expand(-1, lanes).reshape(-1)
    assert (sums - groups).abs().max() <= 32 * torch.finfo(torch.float32).eps * values.abs().max()
    assert torch.equal(sums.view(-1, lanes), sums.view(-1, lanes)[:, :1].expand(-1, lanes))  # every lane has it


@pytest.mark.parametrize("warps", [1, 2, 5, 32])
def test_sums_over_warps_are_in_order(host, warps):
    parts = torch.randn(warps)
    want = parts[0]
    for part in parts[1:]:
        want = want + part
    assert call(host.sum_over_warps, parts, warps) == float(want)


@pytest.mark.parametrize("warps", [1, 8, 32])
@pytest.mark.parametrize("n", [1, 31, 32, 997, 5000])
def test_log_sum_exp_over_a_block(host, n, warps):
    z = torch.randn(n) * 30
    z[:: max(2, n // 3)] = float("-inf")
    got = torch.tensor(call(host.log_sum_exp, n, z, warps)).view(1)
    assert_close_to_truth(got, torch.logsumexp(z, 0).view(1), torch.logsumexp(z.double(), 0).view(1))


def test_log_sum_exp_of_what_is_not_a_number(host):
    z = torch.randn(100)
    z[57] = float("nan")
    got = torch.tensor(call(host.log_sum_exp, 100, z, 2))
    assert got.isnan()


def test_reciprocal_roots_are_rounded_twice(host):
    x = torch.rand(1000) * 100
    y = torch.empty_like(x)
    call(host.reciprocal_roots, 1000, x, y)
    assert torch.equal(y, 1.0 / torch.from_numpy(x.numpy() ** 0.5))
