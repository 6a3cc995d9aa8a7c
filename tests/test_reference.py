"""The references are right: gradients against finite differences, values against PyTorch's own functions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_exact
from torch import Tensor
from torch.autograd import gradcheck

from pyckpt.ops import reference
from pyckpt.spec import MLPS


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class TestAttention:
    @pytest.mark.parametrize("softcap", [0.0, 1.5])
    @pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (1, 0), (1, 2), (-1, 1)])
    @pytest.mark.parametrize(("sq", "sk"), [(1, 1), (3, 5), (4, 4)])
    def test_gradients(self, sq, sk, window, softcap):
        fn = functools.partial(reference.attention, window=window, softcap=softcap, scale=0.7)
        assert gradcheck(fn, (randn(1, sq, 4, 3), randn(1, sk, 2, 3), randn(1, sk, 2, 2)))

    def test_gradients_where_a_query_sees_nothing(self):
        def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            o, lse = reference.attention(q, k, v, window=(-1, 0))
            return o, lse[:, :, 2:]  # differences of infinities are NaN

        q, k, v = randn(1, 5, 2, 3), randn(1, 3, 1, 3), randn(1, 3, 1, 2)
        assert gradcheck(fn, (q, k, v))
        o, lse = reference.attention(q, k, v, window=(-1, 0))
        assert (o[:, :2] == 0).all()
        assert (lse[:, :, :2] == float("-inf")).all()
        assert lse[:, :, 2:].isfinite().all()

    def test_gradients_of_packed_sequences(self):
        cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        fn = functools.partial(reference.attention, window=(-1, 0), cu_seqlens=cu_seqlens)
        assert gradcheck(fn, (randn(5, 2, 3), randn(5, 1, 3), randn(5, 1, 2)))

    @pytest.mark.parametrize("causal", [False, True])
    def test_values(self, causal):
        q, k, v = randn(2, 7, 4, 3), randn(2, 7, 2, 3), randn(2, 7, 2, 3)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        wanted = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        got, lse = reference.attention(q, k, v, window=(-1, 0 if causal else -1))
        assert_exact(got, wanted.transpose(1, 2))
        assert_exact(lse[:, :, :1], torch.logsumexp(self.first_scores(q, k, causal), -1))

    def first_scores(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        scores = q[:, :1].transpose(1, 2) @ k.repeat_interleave(2, 2).permute(0, 2, 3, 1) / 3**0.5
        return scores[..., :1] if causal else scores

    def test_visible_keys(self):
        def rows(*args) -> list[str]:
            return ["".join(".x"[int(v)] for v in row) for row in reference.visible_keys(*args)]

        assert rows(3, 3, (-1, 0)) == ["x..", "xx.", "xxx"]
        assert rows(2, 4, (-1, 0)) == ["xxx.", "xxxx"]
        assert rows(4, 2, (-1, 0)) == ["..", "..", "x.", "xx"]
        assert rows(4, 4, (1, 0)) == ["x...", "xx..", ".xx.", "..xx"]
        assert rows(3, 5, (1, 1)) == [".xxx.", "..xxx", "...xx"]
        assert rows(2, 3, (-1, -1)) == ["xxx", "xxx"]
        assert rows(3, 3, (0, -1)) == ["xxx", ".xx", "..x"]


class TestNorms:
    def test_gradients(self):
        x, weight, bias = randn(3, 5), randn(5), randn(5)
        assert gradcheck(reference.rms_norm, (x, weight))
        assert gradcheck(reference.rms_norm, (x,))
        assert gradcheck(reference.layer_norm, (x, weight, bias))
        assert gradcheck(reference.layer_norm, (x,))

    def test_values(self):
        x, weight, bias = randn(3, 5), randn(5), randn(5)
        assert_exact(reference.rms_norm(x, weight, 1e-3), F.rms_norm(x, (5,), weight, 1e-3))
        assert_exact(reference.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (5,), weight, bias, 1e-3))


class TestRope:
    @pytest.mark.parametrize("interleaved", [False, True])
    @pytest.mark.parametrize("rotary_dim", [None, 4])
    def test_gradients(self, rotary_dim, interleaved):
        fn = functools.partial(
            reference.rope, positions=torch.tensor([0, 3, 50]), rotary_dim=rotary_dim, interleaved=interleaved
        )
        assert gradcheck(fn, (randn(2, 3, 2, 6),))

    def test_values(self):
        # The pair at position p turns by p, the next by p * theta^(-1/2).
        x = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 4)
        a, b = torch.tensor(7.0, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
        got = reference.rope(x, torch.tensor([7]), theta=100.0, interleaved=True)
        assert_exact(got, torch.stack([a.cos(), a.sin(), -b.sin(), b.cos()]).view(1, 1, 4))
        halves = reference.rope(x[..., [0, 2, 1, 3]], torch.tensor([7]), theta=100.0)
        assert_exact(halves, got[..., [0, 2, 1, 3]])


@pytest.mark.parametrize("kind", MLPS)
def test_activation_gradients(kind):
    assert gradcheck(functools.partial(reference.activation, kind=kind), (randn(4, 6),))
    assert gradcheck(functools.partial(reference.glu, kind=kind), (randn(4, 6), randn(4, 6)))


def test_activation_values():
    x = randn(50) * 3
    for kind, fn in {
        "swiglu": F.silu,
        "gelu": F.gelu,
        "geglu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "geglu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu2": lambda x: F.relu(x).square(),
    }.items():
        assert_exact(reference.phi(x, kind), fn(x), kind)


class TestLinearCrossEntropy:
    TARGET = torch.tensor([0, 3, -100, 6, 2])

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"softcap": 2.0},
            {"z_loss": 0.1},
            {"label_smoothing": 0.2},
            {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2},
        ],
        ids=lambda options: "+".join(options) or "plain",
    )
    def test_gradients(self, options, reduction):
        def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return reference.linear_cross_entropy(x, weight, self.TARGET, bias=bias, reduction=reduction, **options)

        assert gradcheck(fn, (randn(5, 3), randn(7, 3), randn(7)))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    def test_values(self, reduction, label_smoothing):
        x, weight, bias = randn(5, 3), randn(7, 3), randn(7)
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        got = reference.linear_cross_entropy(x, weight, self.TARGET, bias=bias, **options)
        assert_exact(got, F.cross_entropy(F.linear(x, weight, bias), self.TARGET, **options))

    def test_ignored_tokens_by_another_index(self):
        x, weight, target = randn(5, 3), randn(7, 3), torch.tensor([0, 3, 4, 6, 3])
        got = reference.linear_cross_entropy(x, weight, target, ignore_index=3)
        assert_exact(got, F.cross_entropy(F.linear(x, weight), target, ignore_index=3))
