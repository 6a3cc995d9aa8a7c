"""Ops of the namespace `pyckpt`: importing this package declares them all (see `registry`)."""

from pyckpt.ops import (
    activation,
    attention,
    attention_cpp,
    attention_triton,
    cuda_backend,
    dropout,
    fused,
    fused_triton,
    linear_cross_entropy,
    linear_cross_entropy_triton,
    norm,
    pointwise_triton,
    products,
    registry,
    rope,
)

__all__ = [
    "activation",
    "attention",
    "attention_cpp",
    "attention_triton",
    "cuda_backend",
    "dropout",
    "fused",
    "fused_triton",
    "linear_cross_entropy",
    "linear_cross_entropy_triton",
    "norm",
    "pointwise_triton",
    "products",
    "registry",
    "rope",
]
