"""Which calls PYCKPT_ATTENTION=cudnn hands to cuDNN, without a GPU; what it computes there is in test_gpu.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyckpt.ops import attention_cudnn
from pyckpt.ops.reference import visible_keys
from pyckpt.triton_kernels.attention import Options

LENGTHS = st.integers(1, 12)
BOUNDS = st.one_of(st.just(-1), st.integers(0, 30))


def on_cuda(length, heads=2, dim=64, dtype=torch.bfloat16):
    """What `causal` looks at of a tensor (1, length, heads, dim) on a GPU."""
    shape = (1, length, heads, dim)
    return SimpleNamespace(
        device=SimpleNamespace(type="cuda"), dtype=dtype, shape=shape, numel=lambda: length * heads * dim
    )


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("PYCKPT_ATTENTION", "cudnn")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    torch.use_deterministic_algorithms(False)  # conftest puts back what was


def chosen(sq=7, sk=7, v_dim=64, options=None, **kind):
    q, k, v = on_cuda(sq, **kind), on_cuda(sk, **kind), on_cuda(sk, **{**kind, "dim": v_dim})
    return attention_cudnn.causal(q, k, v, options or Options(window=(-1, 0)))


@given(sq=LENGTHS, sk=LENGTHS, left=BOUNDS, right=BOUNDS, top_left=st.booleans())
def test_a_mask_is_cudnns_or_is_left_to_us(sq, sk, left, right, top_left):
    found = chosen(sq, sk, options=Options(window=(left, right), top_left=top_left))
    wanted = visible_keys(sq, sk, (left, right), 0 if top_left else None)
    if found is None:
        return
    theirs = torch.ones(sq, sk, dtype=torch.bool)
    assert torch.equal(theirs.tril() if found else theirs, wanted)


def test_the_usual_masks_are_taken():
    assert chosen() is True
    assert chosen(options=Options()) is False
    assert chosen(5, 9, options=Options()) is False
    assert chosen(5, 9) is None  # aligned at the end: not their causal mask
    assert chosen(dtype=torch.float16) is True


@pytest.mark.parametrize(
    "kind", [{"dtype": torch.float32}, {"dim": 160, "v_dim": 64}, {"v_dim": 160}, {"dim": 63}, {"sk": 0, "sq": 0}]
)
def test_other_tensors_are_ours(kind):
    assert chosen(**kind) is None


@pytest.mark.parametrize(
    "option",
    [
        {"softcap": 5.0},
        {"dropout": 0.1, "seed": 1},
        {"sinks": torch.zeros(2)},
        {"alibi_slopes": torch.ones(2)},
        {"cu_seqlens_q": torch.tensor([0, 7])},
    ],
    ids=lambda option: next(iter(option)),
)
def test_other_scores_are_ours(option):
    assert chosen(options=Options(window=(-1, 0), **option)) is None


def test_tensors_on_a_cpu_are_ours():
    q = torch.randn(1, 7, 2, 64, dtype=torch.bfloat16)
    assert attention_cudnn.causal(q, q, q, Options()) is None


def test_only_where_asked_for(monkeypatch):
    monkeypatch.delenv("PYCKPT_ATTENTION")
    assert chosen() is None
    monkeypatch.setenv("PYCKPT_ATTENTION", "triton")
    assert chosen() is None


def test_not_with_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    assert chosen() is None


def test_not_without_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert chosen() is None


def test_another_value_says_what_is_expected(monkeypatch):
    monkeypatch.setenv("PYCKPT_ATTENTION", "flash")
    with pytest.raises(ValueError, match="PYCKPT_ATTENTION='flash': expected one of triton, cudnn, hopper"):
        chosen()
