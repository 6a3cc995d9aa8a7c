"""Positions of several axes (`rope_axes`): time, height and width, or the rows and columns of an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import (
    CU_SEQLENS,
    D_MODEL,
    N_HEADS,
    assert_as_good,
    assert_same_bits,
    make_block,
    make_input,
    plain_twin,
    relative_errors,
    step,
)
from torch import Tensor

import pyckpt

AXES = [0, 0, 1, 2, 2, 1]  # heads of 12 dims
ROUNDING = 1e-10  # of float64, relative, with sums of some hundred terms


def make_positions(*shape: int) -> Tensor:
    return torch.randint(0, 500, (*shape, 3))


def by_hand(x: Tensor, positions: Tensor, axes: list[int], theta: float = 10000.0) -> Tensor:
    """RoPE of x (..., H, D) in float64, pair by pair: (i, i + D/2)."""
    half, y = x.shape[-1] // 2, x.double().clone()
    for i, axis in enumerate(axes):
        angle = positions[..., axis].double()[..., None] * theta ** (-i / half)
        a, b = x[..., i].double(), x[..., half + i].double()
        y[..., i], y[..., half + i] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return y


# --- rope ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(25,), (1, 25), (2, 25)], ids=str)
def test_each_pair_turns_by_its_axis(shape):
    x, positions = torch.randn(2, 25, 4, 12, dtype=torch.float64), make_positions(*shape)
    truth = by_hand(x, positions.expand(2, 25, 3), AXES)
    torch.testing.assert_close(pyckpt.rope(x, positions, axes=AXES), truth, rtol=ROUNDING, atol=ROUNDING)


def test_axes_that_are_all_alike_are_one():
    """And so are those that nobody gives; pairs of neighbours and fewer dims than a head has, too."""
    x = torch.randn(50, 2, 16)
    for options in ({}, {"interleaved": True}, {"rotary_dim": 12}, {"theta": 500.0}):
        axes = [0, 1] * (options.get("rotary_dim", 16) // 4)
        one = pyckpt.rope(x, **options)
        places = torch.arange(50)[:, None].expand(50, 2)
        assert torch.equal(pyckpt.rope(x, places, axes=axes, **options), one)
        assert torch.equal(pyckpt.rope(x, axes=axes, **options), one)


def test_two_axes_are_two_ropes():
    """Half of the pairs by rows and half by columns, as vision transformers have them."""
    q = torch.randn(2, 24, 3, 8, dtype=torch.float64)
    rows, columns = torch.arange(24) // 6, torch.arange(24) % 6
    scaling = {"rope_type": "given", "frequencies": [1.0, 0.1, 1.0, 0.1]}
    got = pyckpt.rope(q, torch.stack([rows, columns], -1), axes=[0, 0, 1, 1], scaling=scaling)
    part = {"rope_type": "given", "frequencies": [1.0, 0.1]}
    for places, dims in ((rows, [0, 1, 4, 5]), (columns, [2, 3, 6, 7])):
        torch.testing.assert_close(got[..., dims], pyckpt.rope(q[..., dims], places, scaling=part))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"axes": [0, 1]}, "axes gives 2 axes, expected 6: one for each pair of the 12 dims"),
        ({"axes": [0, 0, 0, 2, 2, 2]}, "leaves out axis 1"),
        ({"axes": [0, 0, -1, 0, 0, 0]}, "list of ints >= 0"),
        ({"axes": 3}, "list of ints >= 0"),
        ({"axes": []}, "list of ints >= 0"),
        (
            {"axes": AXES, "positions": torch.zeros(25, 2, dtype=torch.long)},
            r"\(2, 25, 3\) or \(25, 3\), got \(25, 2\)",
        ),
        ({"axes": AXES, "positions": torch.zeros(25, dtype=torch.long)}, r"\(2, 25, 3\) or \(25, 3\), got \(25,\)"),
        ({"positions": torch.zeros(25, 3, dtype=torch.long)}, r"\(2, 25\) or \(25,\), got \(25, 3\)"),
    ],
    ids=range(8),
)
def test_what_does_not_fit(options, said):
    with pytest.raises(ValueError, match=said):
        pyckpt.rope(torch.randn(2, 25, 4, 12), **options)


# --- blocks ----------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "interleaved": {"rope_interleaved": True},
    "partial": {"rope_dim": 6, "rope_axes": [2, 0, 1]},
    "given": {"rope_scaling": {"rope_type": "given", "frequencies": [1.0, 0.4, 0.2, 0.1, 0.03, 0.01]}},
    "bidirectional": {"causal": False, "rope_axes": [0, 0, 0, 1, 1, 1]},
}


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("name", WAYS)
def test_a_block_is_its_plain_twin(cpu_backend, name, packed):
    options = {"rope_axes": AXES} | WAYS[name]
    block, (x, cu) = make_block(**options, tile=7), make_input(packed)
    axes, dy = max(options["rope_axes"]) + 1, torch.randn_like(x)
    plain = plain_twin(block, torch.float64, **options)
    for positions in (make_positions(*x.shape[:-1])[..., :axes], make_positions(x.shape[-2])[..., :axes], None):
        truth = step(plain, x, dy, cu, positions)
        results = []
        for save in pyckpt.SAVE_SETS:
            block.save = save
            results.append(step(block, x, dy, cu, positions))
        assert max(relative_errors(results[0], truth).values()) < ROUNDING
        for other in results[1:]:
            assert_same_bits(results[0], other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_pytorchs_own(dtype):
    options = {"rope_axes": AXES, "qk_norm": True}
    block, x = make_block(dtype, **options, tile=32), torch.randn(2, 131, D_MODEL, dtype=dtype)
    positions, dy = make_positions(2, 131), torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64, **options), x.double(), dy.double(), positions=positions)
    plain = step(plain_twin(block, dtype, **options), x, dy, positions=positions)
    assert_as_good(step(block, x, dy, positions=positions), plain, truth, dtype)


def test_a_compiled_block_is_the_block():
    block, (x, _) = make_block(torch.float32, rope_axes=AXES), make_input(False, torch.float32)
    compiled, dy = torch.compile(block, fullgraph=True, backend="aot_eager"), torch.randn_like(x)
    for positions in (make_positions(25), make_positions(2, 25)):
        eager = step(block, x, dy, positions=positions)
        grads = torch.autograd.grad(compiled(x, positions), list(block.parameters()), dy)
        for (name, _), grad in zip(block.named_parameters(), grads, strict=True):
            assert torch.equal(grad, eager[name])


def test_segments_and_streams():
    """Of a model, with images in its sequences: the loss and gradients of what keeps everything."""
    options = {"n_kv_heads": 2, "d_ff": 72, "rope_axes": AXES, "dtype": torch.float64}
    model = pyckpt.CkptCausalLM(31, 4, D_MODEL, N_HEADS, **options)
    tokens, positions = torch.randint(0, 31, (2, 33)), make_positions(2, 33)

    def run(**how: Any) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model.loss(tokens, positions=positions, **how)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    truth = run()
    assert not torch.equal(truth["loss"], model.loss(tokens))
    model.model.layers.segments = 2
    for how in ({}, {"stream": pyckpt.Stream(7, store="host")}):
        found = run(**how)
        for name, t in truth.items():
            torch.testing.assert_close(found[name], t, rtol=ROUNDING, atol=ROUNDING)


def test_a_model_keeps_its_axes(tmp_path):
    model = pyckpt.CkptCausalLM(31, 1, D_MODEL, N_HEADS, rope_axes=AXES)
    model.save_pretrained(tmp_path)
    again = pyckpt.CkptCausalLM.from_pretrained(tmp_path)
    assert again.spec == model.spec
    assert again.spec.rope_axes == tuple(AXES)


def test_positions_of_other_axes_are_refused():
    block, (x, cu) = make_block(rope_axes=AXES), make_input(True)
    for shape in ((50,), (50, 2), (3, 50), (CU_SEQLENS[-1], 3, 1)):
        with pytest.raises(ValueError, match=r"expected \(50, 3\) or \(50, 3\), 3 axes of RoPE's \(rope_axes\)"):
            block(x, torch.zeros(shape, dtype=torch.long), cu)
    with pytest.raises(ValueError, match="expected"):
        make_block()(x, make_positions(50), cu)
    both = pyckpt.CkptTransformer([make_block(rope_axes=AXES), make_block()], segments=2)
    with pytest.raises(ValueError, match="positions have 3 axes, and this block's RoPE has none"):
        both(x, make_positions(50), cu)
    with pytest.raises(ValueError, match="rope_axes was given with rope_theta=None"):
        make_block(rope_axes=AXES, rope_theta=None)
