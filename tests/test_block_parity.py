"""The block against plain PyTorch: in float64 to rounding, in float32 and bf16 by the 2x rule, over all options."""

from __future__ import annotations

import itertools

import pytest
import torch
from blocks import (
    CU_SEQLENS,
    OPTIONS,
    assert_as_good,
    assert_same_bits,
    make_block,
    make_input,
    plain_twin,
    randomise,
    relative_error,
    relative_errors,
    step,
)
from helpers import a_few, assert_within

import pyckpt
from pyckpt.compare.baseline import PlainBlock

# Sums of about a hundred terms in another order: some hundred units in the last place of a float64; times ten for
# gradients that nearly cancel.
ROUNDING = 1e-12
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
ALL_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def test_the_plain_block_passes_gradcheck():
    torch.manual_seed(0)
    plain = PlainBlock(8, 2, n_kv_heads=1, d_ff=6, qk_norm=True, bias=True, dtype=torch.float64)
    randomise(plain)
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    names = list(dict(plain.named_parameters()))

    def run(x, *weights):
        return torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *plain.parameters()))


def test_the_block_passes_gradcheck():
    block = pyckpt.CkptTransformerBlock(
        8, 2, n_kv_heads=1, d_ff=6, qk_norm=True, bias=True, tile=2, dtype=torch.float64
    )
    randomise(block)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    names = list(dict(block.named_parameters()))

    def run(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


@ALL_OPTIONS
@PACKED
def test_equals_plain_pytorch_in_float64(options, packed):
    block = make_block(**options)
    plain = plain_twin(block, torch.float64, **options)
    x, cu = make_input(packed)
    dy = torch.randn_like(x)
    truth = step(plain, x, dy, cu)
    for tile in (None, 7, 1):
        block.tile = tile
        assert max(relative_errors(step(block, x, dy, cu), truth).values()) < ROUNDING, tile


@ALL_OPTIONS
@pytest.mark.parametrize("packed", a_few([False, True], always=(1,)))
def test_every_save_set_gives_the_same_bits(options, packed):
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(dtype, **options)
        x, cu = make_input(packed, dtype)
        dy = torch.randn_like(x)
        for tile in (None, 7):
            block.tile = tile
            block.save = "all"
            first = step(block, x, dy, cu)
            for save in pyckpt.SAVE_SETS[1:]:
                block.save = save
                assert_same_bits(first, step(block, x, dy, cu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2-like", "qk_norm", "softcap-window", "geglu"])
def test_error_is_at_most_twice_pytorchs_own(dtype, name):
    """Error against float64 from the same low-precision weights and inputs, of ours and of plain PyTorch."""
    options = OPTIONS[name]
    tile = 32
    block = make_block(dtype, **options, tile=tile)
    x = torch.randn(2, 131, 48, dtype=dtype)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64, **options), x.double(), dy.double())
    plain = step(plain_twin(block, dtype, **options), x, dy)
    got = step(block, x, dy)
    assert {t.dtype for t in got.values()} == {dtype}
    assert_as_good(got, plain, truth, dtype)


def test_weight_gradients_of_many_tiles_stay_precise_in_bf16():
    """128 tiles summed: in float32, not in bf16, where every addition would lose bits."""
    block = make_block(torch.bfloat16, tile=8)
    x = torch.randn(1, 1024, 48, dtype=torch.bfloat16)
    dy = torch.randn_like(x)
    truth = step(plain_twin(block, torch.float64), x.double(), dy.double())
    many = step(block, x, dy)
    block.tile = 1024
    one = step(block, x, dy)
    for key in truth:
        if key not in ("y", "dx"):
            error, reference = (relative_error(r[key], truth[key]) for r in (many, one))
            assert_within(error, 1.5 * reference, f"{key}: {error:.3g} with many tiles, {reference:.3g} with one")


@pytest.mark.parametrize("seq", [1, 2, 25])
@pytest.mark.parametrize("tile", [1, 3, 24, 25, 26, 1000])
def test_tile_size_does_not_change_the_result(seq, tile):
    block = make_block(tile=seq * 2)
    x, _ = make_input(packed=False, seq=seq)
    dy = torch.randn_like(x)
    whole = step(block, x, dy)
    block.tile = tile
    tiled = step(block, x, dy)
    assert max(relative_errors(tiled, whole).values()) < ROUNDING


def test_positions_shift_and_permute():
    block = make_block(tile=7)
    plain = plain_twin(block, torch.float64)
    x, _ = make_input(packed=False)
    dy = torch.randn_like(x)
    for positions in (
        torch.arange(25) + 1000,
        torch.randint(0, 99, (2, 25)),
        torch.arange(25, dtype=torch.int32),
    ):
        truth, got = step(plain, x, dy, positions=positions), step(block, x, dy, positions=positions)
        assert max(relative_errors(got, truth).values()) < ROUNDING


def test_packed_equals_one_sequence_at_a_time():
    block = make_block(tile=7)
    x, cu = make_input(packed=True)
    with torch.no_grad():
        whole = block(x, cu_seqlens=cu)
        parts = [block(x[None, a:b])[0] for a, b in itertools.pairwise(CU_SEQLENS) if b > a]
    assert relative_error(torch.cat(parts), whole) < ROUNDING


def test_strided_inputs():
    block = make_block(tile=7)
    x = torch.randn(25, 2, 48, dtype=torch.float64)
    dy = torch.randn_like(x)
    flat = step(block, x.transpose(0, 1).contiguous(), dy.transpose(0, 1).contiguous())
    strided = step(block, x.transpose(0, 1), dy.transpose(0, 1))
    assert_same_bits(flat, strided)


def test_repeats_to_the_bit():
    block = make_block(torch.float32, tile=16)
    x, _ = make_input(packed=False, dtype=torch.float32, seq=64)
    dy = torch.randn_like(x)
    first = step(block, x, dy)
    for _ in range(20):
        assert_same_bits(first, step(block, x, dy))
