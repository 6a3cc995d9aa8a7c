"""Which calls PYCKPT_ATTENTION=cudnn hands to cuDNN, without a GPU; what it computes there is in test_gpu.py."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from blocks import assert_as_good
from hypothesis import given
from hypothesis import strategies as st

import pyckpt
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
    assert_right(found, visible_keys(sq, sk, (left, right), 0 if top_left else None))


@given(sq=LENGTHS, sk=LENGTHS, left=BOUNDS, right=BOUNDS, q_start=st.integers(0, 20), k_start=st.integers(0, 20))
def test_so_is_the_mask_of_a_pair_of_tiles(sq, sk, left, right, q_start, k_start):
    found = chosen(sq, sk, options=Options(window=(left, right), q_start=q_start, k_start=k_start))
    assert_right(found, visible_keys(sq, sk, (left, right), q_start - k_start))


def assert_right(found, wanted):
    """What cuDNN would let be seen is what is wanted, and it is left to us only where it has no mask for that."""
    whole = torch.ones_like(wanted)
    if wanted.shape[1] == 1:  # a single key, which it does not know
        assert found is None
        return
    if found is None:
        causal = wanted.shape[0] == wanted.shape[1] and torch.equal(whole.tril(), wanted)
        assert not causal and not torch.equal(whole, wanted)
    else:
        assert torch.equal(whole.tril() if found else whole, wanted)


def by_products(q, k, v, scale, is_causal):
    """(o, lse) as cuDNN makes them."""
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


def shares_by_products(do, q, k, v, o, lse, scale, is_causal):
    """(dq, dk, dv) of these keys, from o and lse over all keys."""
    group = q.shape[2] // k.shape[2]
    q, k, v, o, do = (t.transpose(1, 2).float() for t in (q, k, v, o, do))
    wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
    p = (q @ wide_k.mT * scale - lse[..., None]).exp()
    if is_causal:
        p = p.tril()
    ds = p * (do @ wide_v.mT - (do * o).sum(-1, keepdim=True)) * scale
    dk, dv = ((m.mT @ t).unflatten(1, (-1, group)).sum(2) for m, t in ((ds, q), (p, do)))
    return tuple(t.transpose(1, 2).half() for t in (ds @ wide_k, dk, dv))


def test_the_pairs_of_a_stream_that_are_cudnns(monkeypatch):
    """What it makes of a tile of keys is merged, and its gradients are added, to those of the other tiles."""
    found = {"forward": [], "backward": []}
    for name, fn in (("forward", by_products), ("backward", shares_by_products)):
        monkeypatch.setattr(attention_cudnn, name, lambda *a, n=name, f=fn: found[n].append(a[-1]) or f(*a))
    right = attention_cudnn.causal
    monkeypatch.setattr(attention_cudnn, "causal", lambda *a: right(*map(as_on_cuda, a[:3]), a[3]))
    monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    block = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    tokens = torch.randint(0, 50, (1, 41))
    model = pyckpt.CkptCausalLM(vocab_size=50, n_layers=2, **block, dtype=torch.float16)

    def step(model, stream):
        model.zero_grad()
        loss = model.loss(tokens, stream=stream)
        (1000 * loss).backward()  # a token's share is small enough for float16 to lose bits of it
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    got = step(model, pyckpt.Stream(16))
    # Tiles of 16, 16 and 9 tokens in two layers, the last with its loss: on the diagonal, and whole before it.
    assert sorted(found["forward"]) == [False] * 6 + [True] * 6
    assert sorted(found["backward"]) == [False] * 6 + [True] * 6
    monkeypatch.setenv("PYCKPT_ATTENTION", "triton")
    ours = step(model, pyckpt.Stream(16))
    assert len(found["forward"]) == 12
    assert_as_good(got, ours, step(copy.deepcopy(model).double(), None), torch.float16)


def as_on_cuda(t):
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=t.dtype, shape=t.shape, numel=t.numel)


def test_a_single_key_is_left_to_us():
    """The last pair of a stream whose tiles leave one token: cuDNN's attention knows no key length of 1."""
    assert chosen(1, 1) is None and chosen(7, 1, options=Options(window=(-1, -1))) is None
    assert chosen(2, 2) is True


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
