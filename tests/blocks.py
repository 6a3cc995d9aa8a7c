"""What the tests of the block share: a small block, its plain twin, and one step of either."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from helpers import assert_within
from torch import Tensor, nn

import pyckpt
from pyckpt.compare.baseline import PlainBlock

D_MODEL, N_HEADS = 48, 4
SMALL: dict[str, Any] = {"n_kv_heads": 2, "d_ff": 72}

# Every option of the block alone, and combinations that share code.
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mha": {"n_kv_heads": 4},
    "mqa": {"n_kv_heads": 1},
    "wide-heads": {"head_dim": 20},
    "layernorm": {"norm": "layernorm", "norm_eps": 1e-3},
    "bias": {"bias": True},
    "gpt2-like": {"norm": "layernorm", "mlp": "gelu_tanh", "bias": True, "rope_theta": None},
    "gelu": {"mlp": "gelu"},
    "relu2": {"mlp": "relu2"},
    "geglu": {"mlp": "geglu"},
    "geglu_tanh": {"mlp": "geglu_tanh"},
    "qk_norm": {"qk_norm": True},
    "qk_norm-bias-norope": {"qk_norm": True, "bias": True, "rope_theta": None},
    "rope-llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "bidirectional": {"causal": False},
    "window": {"window": 7},
    "window-both": {"causal": False, "window": (5, 3)},
    "softcap": {"softcap": 3.0},
    "softcap-window": {"softcap": 3.0, "window": 7},
    "neox-like": {"residual": "parallel", "norm": "layernorm", "mlp": "gelu", "bias": True, "rope_dim": 6},
    "gemma2-like": {
        "norm_placement": "sandwich",
        "norm_offset": 1.0,
        "mlp": "geglu_tanh",
        "softcap": 3.0,
        "attention_scale": 0.2,
    },
    "olmo2-like": {"norm_placement": "output", "qk_norm": "full"},
    "bert-like": {
        "norm_placement": "post",
        "norm": "layernorm",
        "mlp": "gelu",
        "bias": True,
        "rope_theta": None,
        "causal": False,
    },
    "qwen2-like": {"bias": "qkv"},
    "granite-like": {"residual_multiplier": 0.22, "attention_scale": 0.1, "bias": True},
    "neox-multiplied": {"residual": "parallel", "residual_multiplier": 1.7, "norm": "layernorm", "mlp": "gelu"},
    "rope-given": {
        "rope_scaling": {"rope_type": "given", "frequencies": [1.0, 0.41, 0.2, 0.03], "amplitude": 1.3},
        "rope_dim": 8,
    },
    "rope-axes": {"rope_axes": [0, 1, 2, 0], "rope_dim": 8, "qk_norm": True},
    "parallel_shared": {"residual": "parallel_shared", "qk_norm": True, "rope_interleaved": True},
}
CU_SEQLENS = [0, 5, 5, 23, 50]


def make_block(dtype: torch.dtype = torch.float64, **options: Any) -> pyckpt.CkptTransformerBlock:
    """A block with all parameters random: weights at their fresh values would hide a wrong gradient of a norm."""
    block = pyckpt.CkptTransformerBlock(D_MODEL, N_HEADS, **{**SMALL, **options}, dtype=torch.float64)
    randomise(block)
    return block.to(dtype)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5 if p.dim() == 2 else 1.0 + 0.3 * torch.randn_like(p))


def plain_twin(block: pyckpt.CkptTransformerBlock, dtype: torch.dtype, **options: Any) -> PlainBlock:
    plain = PlainBlock(D_MODEL, N_HEADS, **{**SMALL, **options}, dtype=dtype)
    plain.load_state_dict({n: t.to(dtype) for n, t in block.state_dict().items()})
    return plain


def make_input(packed: bool, dtype: torch.dtype = torch.float64, seq: int = 25) -> tuple[Tensor, Tensor | None]:
    """(x, cu_seqlens): (2, seq, d_model), or 50 packed tokens with an empty sequence among them."""
    if packed:
        return torch.randn(CU_SEQLENS[-1], D_MODEL, dtype=dtype), torch.tensor(CU_SEQLENS, dtype=torch.int32)
    return torch.randn(2, seq, D_MODEL, dtype=dtype), None


def step(
    block: nn.Module, x: Tensor, dy: Tensor, cu_seqlens: Tensor | None = None, positions: Tensor | None = None
) -> dict[str, Tensor]:
    """y, dx and every parameter's gradient, by name."""
    x = x.detach().clone().requires_grad_()
    y = block(x, positions=positions, cu_seqlens=cu_seqlens)
    params = dict(block.named_parameters())
    grads = torch.autograd.grad(y, [x, *params.values()], dy)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def relative_errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every result of a `step`.

    Without RoPE softmax does not see a key's bias, whose gradient is 0 up to the rounding of what sums to it: an error
    of a result far smaller than its fellows is measured against theirs.
    """
    assert got.keys() == truth.keys()
    sizes = {n: float(t.norm()) for n, t in truth.items()}
    usual = statistics.median(sizes.values())
    sizes = {n: size if size > 0.1 * usual else usual for n, size in sizes.items()}
    return {n: float((got[n].double() - t).norm()) / sizes[n] for n, t in truth.items()}


def pooled_errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """`relative_errors`, those of all gradients of vectors and of LoRA's adapters as one: their root mean square.

    Such a gradient is few numbers (a matrix of rank three is little more than three vectors), each of them a sum over
    tokens that cancels, so that its own error is chance: most of all that of a single number. Each counts by its
    numbers; a wrong one among a thousand is still thirty thousand times what rounding leaves.
    """
    errors = relative_errors(got, truth)
    few = {n: t.numel() for n, t in truth.items() if (t.dim() == 1 or "lora_" in n) and n != "loss"}
    squares = sum(count * errors.pop(n) ** 2 for n, count in few.items())
    return errors | ({"gradients of vectors and adapters": math.sqrt(squares / sum(few.values()))} if few else {})


def assert_as_good(
    got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Every error is at most twice that of plain PyTorch, plus the rounding of the truth to the dtype."""
    reference = pooled_errors(plain, truth)
    for name, error in pooled_errors(got, truth).items():
        allowed = 2 * reference[name] + torch.finfo(dtype).eps / 4
        assert_within(error, allowed, f"{name}: {error:.3g}, more than the {allowed:.3g} allowed")
