"""Arguments for the fused ops, as `torch.library.opcheck` wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Sample = tuple[Any, ...]


def fused_samples(rand: Callable[..., Tensor]) -> dict[str, list[Callable[[], Sample]]]:
    """Samples by op's name. rand(*shape) makes float32 tensors."""
    tokens, width, d_ff = 5, 8, 6

    def norm(centered: bool = False) -> Sample:
        mean, bias = (rand(tokens), rand(width)) if centered else (None, None)
        return rand(tokens, width), mean, rand(tokens).abs(), rand(width), bias

    def mlp(gated: bool) -> Sample:
        gate = (rand(d_ff, width), rand(d_ff)) if gated else (None, None)
        return *gate, rand(d_ff, width), rand(d_ff), "swiglu" if gated else "relu2"

    def outs(gated: bool) -> list[Tensor | None]:
        return [rand(tokens, d_ff), rand(tokens, d_ff) if gated else None, rand(tokens, d_ff)]

    def residual(statistics: bool, centered: bool) -> Sample:
        given = (rand(tokens, width), rand(d_ff, width), rand(d_ff) if centered else None)
        return *given, rand(tokens, d_ff), rand(tokens, d_ff), statistics, centered, 1e-5

    def qkv(raw: bool) -> Sample:
        weights = (rand(8, width), rand(4, width), rand(4, width))
        angles = (rand(tokens, 2), rand(tokens, 2))
        made = (rand(tokens, 8), rand(tokens, 4), None if raw else rand(tokens, 4))
        raws = (rand(tokens, 8), rand(tokens, 4)) if raw else (None, None)
        scales = (rand(4), rand(4)) if raw else (None, None)
        return *norm(raw), *weights, None, None, None, *scales, 1e-5, *angles, raw, 4, *made, *raws

    return {
        "row_statistics": [lambda: (rand(5, 8), True, 1e-5), lambda: (rand(5, 8), False, 1e-5)],
        "norm_qkv_": [lambda: qkv(False), lambda: qkv(True)],
        "qk_finish_": [lambda: (rand(5, 8), rand(4), 1e-5, rand(5, 2), rand(5, 2), False, 4, rand(5, 8))],
        "qk_finish_bwd_": [
            lambda: (rand(5, 8), rand(5, 8), rand(4), 1e-5, rand(5, 2), rand(5, 2), True, 4, True),
            lambda: (rand(5, 8).bfloat16(), rand(5, 8).bfloat16(), rand(4), 1e-5, None, None, False, 4, False),
        ],
        "linear_residual_": [
            lambda: residual(True, True),
            lambda: residual(True, False),
            lambda: residual(False, False),
        ],
        "linear_delta_": [lambda: (rand(5, 6), rand(6, 8), rand(5, 8), rand(5, 8), rand(2, 5))],
        "norm_mlp_": [
            lambda: (*norm(), *mlp(True), *outs(True)),
            lambda: (*norm(True), *mlp(False), rand(5, 6), None, None),
        ],
        "norm_mlp_bwd_": [
            lambda: (rand(5, 7), rand(7, 6), *norm(), *mlp(True), None, None, *outs(True)),
            lambda: (rand(5, 7), rand(7, 6), *norm(True), *mlp(False), None, rand(5, 6), *outs(False)),
        ],
        "linears_input_grad_": [
            lambda: ([rand(5, 6)], [rand(6, 8)], rand(5, 8)),
            lambda: ([rand(5, 6), rand(5, 4), rand(5, 4)], [rand(6, 8), rand(4, 8), rand(4, 8)], rand(5, 8)),
        ],
        "norm_wgrad_": [
            lambda: (rand(5, 6), *norm(), rand(6, 8), True),
            lambda: (rand(5, 6).bfloat16(), *norm(True), rand(6, 8).to(torch.bfloat16), False),
        ],
    }
