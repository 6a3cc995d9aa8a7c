"""How many products a block's forward and backward make, by PyTorch's FLOP counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.compare.baseline import PlainBlock
from pyckpt.spec import GATED_MLPS, MLPS

TOKENS, WIDTH, F = 96, 48, 64
GATED = pytest.mark.parametrize("mlp", MLPS)


def flops(block: torch.nn.Module, checkpointed: bool = False) -> int:
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        y.sum().backward()
    return counter.get_total_flops()


def mlp_products(kind: type[torch.nn.Module], mlp: str, checkpointed: bool = False, **options) -> float:
    """Products of tokens x width x d_ff: all that a wider MLP costs more."""
    narrow, wide = (flops(kind(WIDTH, 4, d_ff=f, mlp=mlp, **options), checkpointed) for f in (F, 2 * F))
    return (wide - narrow) / (2 * TOKENS * WIDTH * F)


@GATED
@pytest.mark.parametrize("tile", [None, 20])
@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
def test_products_of_the_mlp(save, tile, mlp):
    """Recomputed are gate and up (and nothing where they are kept), never the down projection."""
    gated = mlp in GATED_MLPS
    stored = 9 if gated else 6
    extra = 0 if save == "all" else (2 if gated else 1)
    assert mlp_products(pyckpt.CkptTransformerBlock, mlp, save=save, tile=tile) == stored + extra


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("placement", ["sandwich", "output", "post"])
@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
def test_a_norm_after_the_mlp_takes_the_down_projection_again(save, placement, mlp):
    """Its backward needs what it read: kept by "all", else one product more."""
    stored, again = (9, 3) if mlp in GATED_MLPS else (6, 2)
    found = mlp_products(pyckpt.CkptTransformerBlock, mlp, save=save, tile=20, norm_placement=placement)
    assert found == stored + (0 if save == "all" else again)


@pytest.mark.parametrize(("placement", "save", "again"), [("pre", "attention", 1), ("pre", "all", 0)])
@pytest.mark.parametrize("after", [False, True])
def test_output_projections(placement, save, again, after):
    """A save set with mid needs none again, with a norm after it neither: its input is what is kept."""
    placement = "sandwich" if after else placement
    options = {"d_ff": F, "save": save, "norm_placement": placement, "n_kv_heads": 1}
    narrow, wide = (flops(pyckpt.CkptTransformerBlock(WIDTH, h, head_dim=12, **options)) for h in (2, 4))
    # Two more query heads of 12: q and o projections, and attention's seven products.
    attention = 7 * 2 * TOKENS * TOKENS * 2 * 12
    q_again = 0 if save == "all" else 1
    assert (wide - narrow - attention) / (2 * TOKENS * WIDTH * 2 * 12) == 6 + again + q_again


@GATED
def test_products_of_the_others(mlp):
    """What the figures above are compared with: storing everything, and running the layer again.

    PyTorch's checkpoint stops early, before the last product, where a layer is checkpointed by itself.
    """
    gated = mlp in GATED_MLPS
    assert mlp_products(PlainBlock, mlp) == (9 if gated else 6)
    assert mlp_products(PlainBlock, mlp, checkpointed=True) == (11 if gated else 7)
    with set_checkpoint_early_stop(False):
        assert mlp_products(PlainBlock, mlp, checkpointed=True) == (12 if gated else 8)


@pytest.mark.parametrize(("save", "again"), [("all", 0), ("attention+qkv", 0), ("attention", 1), ("input", 1)])
def test_projections_of_q_k_v(save, again):
    """Forward, two in the backward, and once more where they are not kept."""
    narrow, wide = (
        flops(pyckpt.CkptTransformerBlock(WIDTH, 4, n_kv_heads=h, head_dim=12, d_ff=F, save=save)) for h in (2, 4)
    )
    # Two more heads of 12 for k and for v; attention's own products are by query head.
    assert (wide - narrow) / (2 * TOKENS * WIDTH * 2 * 2 * 12) == 3 + again
